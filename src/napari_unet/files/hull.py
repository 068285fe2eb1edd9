"""How much of its convex hull an object fills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import ConvexHull, QhullError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# A pixel on the hull belongs to it, whatever the rounding; as scikit-image has it.
TOLERANCE = 1e-10
# Facets with lines that are looked at together.
AT_ONCE = 2**20


class Outline:
    """Where each line of an object's pixels begins and ends, gathered part by part.

    No other pixels can be corners of the convex hull.

    Parameters
    ----------
    shape : sequence of int
        Of the object's bounding box, 2D or 3D.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(map(int, shape))
        self._count = 0
        self._firsts: list[NDArray[np.int32]] = []
        self._lasts: list[NDArray[np.int32]] = []

    def add(self, mask: NDArray[Any], start: Sequence[int]) -> None:
        """Take a part of the object; parts come in C order.

        Parameters
        ----------
        mask : bool array
            The part; whole lines of the bounding box, along the last axis.
        start : sequence of int
            Where it lies in the bounding box.
        """
        touched = mask.any(axis=-1)
        lines = mask[touched]
        where = np.argwhere(touched) + np.asarray(start)[:-1]
        last = mask.shape[-1] - 1 - lines[:, ::-1].argmax(axis=1)
        ends = ((self._firsts, lines.argmax(axis=1)), (self._lasts, last))
        for gathered, end in ends:
            gathered.append(np.column_stack([where, end]).astype(np.int32))
        self._count += int(np.count_nonzero(lines))

    def solidity(self) -> float:
        """Return the part of the pixels in its convex hull that the object has.

        The number is that of scikit-image's ``regionprops``, which tests every pixel
        against every facet and takes many seconds for one object of 64³ voxels. Here
        a facet says for a whole line of pixels where it enters and leaves the hull.
        Flat objects in a volume have a solidity, too.

        Returns
        -------
        float
            Between 0 and 1.
        """
        corners = np.concatenate([*self._firsts, *self._lasts])
        # A pixel reaches half a pixel to every side.
        unit = np.eye(len(self._shape))
        half = np.concatenate([unit, -unit]) / 2
        points = (corners[:, None] + half).reshape(-1, len(self._shape))
        try:
            facets = ConvexHull(points).equations
        except QhullError:
            return float("nan")
        return float(self._count / _count_inside(facets, self._shape))


def _count_inside(facets: NDArray[Any], shape: tuple[int, ...]) -> int:
    """Count the pixels of a box that lie on the inner side of all facets."""
    lines = np.indices(shape[:-1]).reshape(len(shape) - 1, -1)
    first = np.full(lines.shape[1], -np.inf)
    last = np.full(lines.shape[1], np.inf)
    step = max(1, AT_ONCE // lines.shape[1])
    for start in range(0, len(facets), step):
        part = facets[start : start + step]
        slope = part[:, -2]
        room = TOLERANCE - part[:, :-2] @ lines - part[:, -1:]
        up, down = slope > TOLERANCE, slope < -TOLERANCE
        ends = room[up] / slope[up, None]
        np.minimum(last, ends.min(axis=0, initial=np.inf), out=last)
        starts = room[down] / slope[down, None]
        np.maximum(first, starts.max(axis=0, initial=-np.inf), out=first)
        # Along these facets: the whole line is inside or outside.
        outside = (room[~(up | down)] <= 0).any(axis=0)
        last[outside] = -np.inf
    inside = last > -np.inf
    lengths = np.floor(last[inside]) - np.ceil(first[inside]) + 1
    return int(np.maximum(lengths, 0).sum())
