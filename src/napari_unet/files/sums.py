"""What can be added up over the pixels of each label, however they are divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Pixels that are sorted by their label at once: bounds the memory.
AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class Sums:
    """One row for each label, in ascending order.

    Parameters
    ----------
    labels, count : array of shape (row,)
        The label and its number of pixels.
    centre, low, high : array of shape (row, 3)
        Mean, smallest and largest Z, Y and X.
    spread : array of shape (row, 3)
        Sums of YY, XX and YX, each from the centre.
    finite, total, smallest, largest : array of shape (row, channel)
        Number of finite pixels, their sum, minimum and maximum.
    """

    labels: NDArray[Any]
    count: NDArray[Any]
    centre: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]
    spread: NDArray[Any]
    finite: NDArray[Any]
    total: NDArray[Any]
    smallest: NDArray[Any]
    largest: NDArray[Any]

    def eccentricity(self, size_y: float, size_x: float) -> NDArray[Any]:
        """Return that of the ellipses with the same second moments.

        Parameters
        ----------
        size_y, size_x : float
            Of a pixel.
        """
        scale = np.array([size_y**2, size_x**2, size_y * size_x])
        yy, xx, yx = (self.spread * scale).T
        middle, half = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
        long, short = middle + half, np.maximum(middle - half, 0)
        ratio = np.divide(short, long, out=np.ones_like(long), where=long > 0)
        result: NDArray[Any] = np.sqrt(1 - ratio)
        return result


def sum_pixels(
    labels: NDArray[Any], values: NDArray[Any], start: Sequence[int]
) -> Sums:
    """Add up the pixels of every label in a block.

    Parameters
    ----------
    labels : array of shape (Z, Y, X)
        0 is left out.
    values : array of shape (channel, Z, Y, X)
        Of the image.
    start : sequence of int
        Where the block lies: Z, Y and X of its first pixel.

    Returns
    -------
    Sums
    """
    flat, brightness = labels.reshape(-1), values.reshape(len(values), -1)
    parts = []
    for first in range(0, max(flat.size, 1), AT_ONCE):
        chosen = first + np.flatnonzero(flat[first : first + AT_ONCE])
        places = np.column_stack(np.unravel_index(chosen, labels.shape)) + start
        parts.append(_sum(flat[chosen], places, brightness[:, chosen].T))
    return merge(parts)


def _sum(labels: NDArray[Any], places: NDArray[Any], values: NDArray[Any]) -> Sums:
    order, starts, names = _group(labels)
    count = np.diff(starts, append=labels.size)
    places = places[order]
    centre = np.add.reduceat(places, starts) / count[:, None]
    y, x = (places - np.repeat(centre, count, axis=0))[:, 1:].T
    spread = np.column_stack([y * y, x * x, y * x])
    values = values[order].astype(np.float64)
    finite = np.isfinite(values)
    return Sums(
        labels=names,
        count=count,
        centre=centre,
        low=np.minimum.reduceat(places, starts),
        high=np.maximum.reduceat(places, starts),
        spread=np.add.reduceat(spread, starts),
        finite=np.add.reduceat(finite, starts, dtype=np.int64),
        total=np.add.reduceat(np.where(finite, values, 0), starts),
        smallest=np.minimum.reduceat(np.where(finite, values, np.inf), starts),
        largest=np.maximum.reduceat(np.where(finite, values, -np.inf), starts),
    )


def merge(parts: Sequence[Sums]) -> Sums:
    """Put the sums over parts of the pixels together.

    Parameters
    ----------
    parts : sequence of Sums
        Of different pixels, at least one.

    Returns
    -------
    Sums
        Of all of them.
    """

    def rows(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    order, starts, names = _group(np.concatenate([part.labels for part in parts]))
    counts, centres = rows("count")[:, None], rows("centre")
    count = np.add.reduceat(counts, starts)
    centre = np.add.reduceat(centres * counts, starts) / count
    repeats = np.diff(starts, append=order.size)
    y, x = (centres - np.repeat(centre, repeats, axis=0))[:, 1:].T
    moved = np.column_stack([y * y, x * x, y * x]) * counts
    return Sums(
        labels=names,
        count=count[:, 0],
        centre=centre,
        low=np.minimum.reduceat(rows("low"), starts),
        high=np.maximum.reduceat(rows("high"), starts),
        spread=np.add.reduceat(rows("spread") + moved, starts),
        finite=np.add.reduceat(rows("finite"), starts),
        total=np.add.reduceat(rows("total"), starts),
        smallest=np.minimum.reduceat(rows("smallest"), starts),
        largest=np.maximum.reduceat(rows("largest"), starts),
    )


def _group(labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return an order by label, where each label starts in it, and the labels."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    is_new = np.ones(order.size, bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_new)
    return order, starts, ordered[starts]
