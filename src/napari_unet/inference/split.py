"""Which pixels belong together, and cutting what only touches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cc3d
import numpy as np
from scipy import ndimage
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The smoothing looks 4 pixels aside, at distances to what lies within 4 * sqrt(3).
CONTEXT = 12


def components(mask: NDArray) -> NDArray:
    """Label what is connected by faces: objects touching at a corner stay apart.

    Parameters
    ----------
    mask : bool or unsigned integer array of shape (Y, X) or (Z, Y, X)
        Pixels of different numbers are not connected.

    Returns
    -------
    unsigned integer array of the same shape
        0 where ``mask`` is 0, else from 1 without gaps.
    """
    # cc3d 4.1 loses pixels of a column (n, 1, 1) that is cut out of a larger array.
    labels: NDArray = cc3d.connected_components(
        np.ascontiguousarray(mask), connectivity=6 if mask.ndim == 3 else 4
    )
    return labels


def split_touching(mask: NDArray) -> NDArray:
    """Fill small holes, which would attract cuts, and cut objects at their necks.

    Parameters
    ----------
    mask : bool array of shape (Y, X) or (Z, Y, X)
        True in objects.

    Returns
    -------
    integer array of the same shape
        Numbers with gaps.
    """
    sizes = np.bincount(components(mask).ravel())[1:]
    return split_at_necks(fill_small_holes(mask, largest_hole(sizes)))


def largest_hole(sizes: NDArray) -> float:
    """Return the size that holes to fill are below: a tenth of a typical object."""
    return float(np.median(sizes)) / 10 if len(sizes) else 0


def split_at_necks(mask: NDArray) -> NDArray:
    """Cut objects at their necks, by a watershed on the distance to the edge.

    Two hills of the distance map stay apart if the lower one rises above the
    saddle between them by 0.3 of its height and by a pixel, so that rough
    outlines are not cut. What becomes of an object depends on nothing that is
    more than `CONTEXT` pixels away.

    Parameters
    ----------
    mask : bool array of shape (Y, X) or (Z, Y, X)
        True in objects.

    Returns
    -------
    integer array of the same shape
        Numbers with gaps.
    """
    height = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
    seeds = components(local_maxima(height) & mask).astype(np.int32)
    hills: NDArray = watershed(-height, seeds, mask=mask)
    # Of a tiny object the smoothed maximum may lie beside it.
    rest = mask & (hills == 0)
    hills[rest] = components(rest)[rest] + hills.max()
    peaks = np.append(0, ndimage.maximum(height, hills, np.arange(1, hills.max() + 1)))
    root = np.arange(len(peaks))
    for saddle, first, second in _saddles(hills, height):
        one, other = _find(root, first), _find(root, second)
        if one == other:
            continue
        low, high = sorted((one, other), key=lambda hill: peaks[hill])
        if peaks[low] - saddle < max(1.0, 0.3 * peaks[low]):
            root[low] = high
    roots = np.array([_find(root, hill) for hill in range(len(root))])
    joined: NDArray = roots[hills]
    return joined


def _find(root: NDArray, hill: int) -> int:
    while root[hill] != hill:
        hill = root[hill]
    return hill


def _saddles(hills: NDArray, height: NDArray) -> list[tuple[float, int, int]]:
    """The highest pass between any two neighbouring hills, the highest first."""
    keys, passes = [], []
    count = int(hills.max()) + 1
    for axis in range(hills.ndim):
        here = np.moveaxis(hills, axis, 0)[:-1]
        there = np.moveaxis(hills, axis, 0)[1:]
        border = (here != there) & (here > 0) & (there > 0)
        a, b = here[border].astype(np.int64), there[border].astype(np.int64)
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
        levels = np.moveaxis(height, axis, 0)
        passes.append(np.minimum(levels[:-1][border], levels[1:][border]))
    key, level = np.concatenate(keys), np.concatenate(passes)
    order = np.lexsort((-level, key))
    pairs, first = np.unique(key[order], return_index=True)
    highest = level[order][first]
    columns = (highest, pairs // count, pairs % count)
    return sorted(zip(*(c.tolist() for c in columns), strict=True), reverse=True)


def fill_small_holes(mask: NDArray, size: float) -> NDArray:
    """Fill the holes of objects that have fewer pixels than ``size``.

    Parameters
    ----------
    mask : bool array of shape (Y, X) or (Z, Y, X)
        What reaches the edge of it is no hole.
    size : float
        See `largest_hole`.
    """
    if size <= 1:
        return mask
    # uint8 and 18: cc3d 4.1 can fail with boolean arrays and 26 neighbours.
    empty = (~mask).astype(np.uint8)
    outside: NDArray = cc3d.connected_components(
        empty, connectivity=18 if mask.ndim == 3 else 8
    )
    sizes = np.bincount(outside.ravel())
    small = sizes < size
    small[0] = False
    for axis in range(mask.ndim):
        small[np.take(outside, [0, -1], axis)] = False
    filled: NDArray = mask | small[outside]
    return filled
