"""Runs of equal pixels along the last axis: objects without visiting every pixel.

All that connects, sizes and numbers objects needs of each of their rows is where it
begins and ends. Positions count through rows that are one pixel longer than those of
the image, and planes that are one row longer, so that nothing lies side by side
across an edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

BAND = 1 << 20  # pixels looked at together: they stay in the processor's cache


def bands(shape: Sequence[int]) -> list[slice]:
    """Cut an array of some shape along its first axis."""
    rows = max(1, BAND // max(1, math.prod(shape[1:])))
    return [slice(a, min(a + rows, shape[0])) for a in range(0, shape[0], rows)]


@dataclass(frozen=True)
class Runs:
    """Runs of pixels that are not 0, in C order.

    Parameters
    ----------
    shape : tuple of int
        Of the plane or volume.
    start, stop : int64 array of shape (runs,)
        Positions of the first pixel and behind the last one.
    value : array of shape (runs,)
        Of their pixels.
    """

    shape: tuple[int, ...]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    value: NDArray

    @classmethod
    def find(cls, values: NDArray) -> Self:
        """Find the runs of an array of shape (Y, X) or (Z, Y, X)."""
        shape = values.shape
        return cls.gather(shape, ((band, values[band]) for band in bands(shape)))

    @classmethod
    def gather(
        cls, shape: tuple[int, ...], parts: Iterable[tuple[slice, NDArray]]
    ) -> Self:
        """Find the runs of an array that comes in parts.

        Parameters
        ----------
        shape : tuple of int
            Of the whole.
        parts : iterable of (slice, array)
            Where each lies along the first axis, in order, and what is there.
        """
        stride = _strides(shape)[0]
        found = [
            _find(values, shape, band.start * stride)
            for band, values in parts
            if values.size
        ]
        if not found:
            none = np.zeros(0, dtype=np.int64)
            return cls(shape, none, none, none)
        start, stop, value = (np.concatenate(part) for part in zip(*found, strict=True))
        return cls(shape, start, stop, value)

    @classmethod
    def merge(cls, several: Sequence[Runs]) -> Self:
        """Put runs of one array together that do not overlap."""
        start = np.concatenate([runs.start for runs in several])
        order = np.argsort(start, kind="stable")
        stop = np.concatenate([runs.stop for runs in several])
        value = np.concatenate([runs.value for runs in several])
        return cls(several[0].shape, start[order], stop[order], value[order])

    def __len__(self) -> int:
        return len(self.start)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Pixels of each run."""
        return self.stop - self.start

    @cached_property
    def index(self) -> list[NDArray[np.int64]]:
        """Indices of the first pixels, one array for each axis."""
        rest, index = self.start, []
        for stride in _strides(self.shape):
            index.append(rest // stride)
            rest = rest - index[-1] * stride
        return index

    @cached_property
    def flat(self) -> NDArray[np.int64]:
        """Where the runs begin in the flattened array."""
        flat = np.zeros(len(self), dtype=np.int64)
        for index, size in zip(self.index, self.shape, strict=True):
            flat *= size
            flat += index
        return flat

    def where(self, is_kept: NDArray) -> Runs:
        """Return some of them, by a boolean or an integer index in order."""
        start, stop, value = self.start, self.stop, self.value
        return Runs(self.shape, start[is_kept], stop[is_kept], value[is_kept])

    def valued(self, value: NDArray) -> Runs:
        """Return the same runs with other values, without those that get 0."""
        runs = Runs(self.shape, self.start, self.stop, value)
        return runs if value.all() else runs.where(value != 0)

    def moved(self, shape: tuple[int, ...], by: Sequence[int]) -> Runs:
        """Return the same runs in a larger array, or in a part that holds them."""
        start = np.zeros(len(self), dtype=np.int64)
        strides = _strides(shape)
        for index, stride, offset in zip(self.index, strides, by, strict=True):
            start += (index + offset) * stride
        return Runs(shape, start, start + self.sizes, self.value)

    def join(self, *, corners: bool = False) -> tuple[NDArray[np.int64], int]:
        """Join runs of the same value that are connected by faces.

        Parameters
        ----------
        corners : bool
            Whether edges connect, too: in planes, these are corners.

        Returns
        -------
        component : int64 array of shape (runs,)
            From 0 without gaps.
        count : int
            The number of components.
        """
        strides = _strides(self.shape)
        steps = [(stride, corners) for stride in strides[:-1]]
        if corners and len(self.shape) == 3:
            plane, row, _ = strides
            steps += [(plane + row, False), (plane - row, False)]
        pairs = [self._neighbours(*step) for step in steps]
        here = np.concatenate([np.zeros(0, np.int64), *(a for a, _ in pairs)])
        there = np.concatenate([np.zeros(0, np.int64), *(b for _, b in pairs)])
        if not len(self):
            return here, 0
        links = sparse.coo_array(
            (np.ones(len(here), dtype=np.int8), (here, there)), (len(self),) * 2
        )
        count, component = sparse.csgraph.connected_components(links, directed=False)
        return component.astype(np.int64), int(count)

    def _neighbours(
        self, step: int, diagonal: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find pairs of runs that overlap once the first is moved back by ``step``."""
        reach = int(diagonal)
        first = np.searchsorted(self.stop, self.start - (step + reach), side="right")
        end = np.searchsorted(self.start, self.stop - (step - reach), side="left")
        count = np.maximum(end - first, 0)
        here = np.repeat(np.arange(len(self)), count)
        before = np.cumsum(count) - count
        there = np.arange(len(here)) + np.repeat(first - before, count)
        is_same = self.value[here] == self.value[there]
        return here[is_same], there[is_same]

    def boxes(
        self, number: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the boxes around groups of runs.

        Parameters
        ----------
        number : int64 array of shape (runs,)
            The group of each run.
        count : int
            Groups that there are.

        Returns
        -------
        low, high : int64 array of shape (count, axes)
        """
        low = np.full((count, len(self.shape)), np.iinfo(np.int64).max)
        high = np.zeros_like(low)
        sizes = self.sizes
        for axis, index in enumerate(self.index):
            width = sizes if axis == len(self.shape) - 1 else 1
            np.minimum.at(low[:, axis], number, index)
            np.maximum.at(high[:, axis], number, index + width)
        return low, high

    def array(self) -> NDArray:
        """Return the values in an array of the smallest dtype, 0 elsewhere."""
        largest = int(self.value.max(initial=0))
        out = np.empty(self.shape, dtype=np.min_scalar_type(largest))
        self.paint(out)
        return out

    def paint(self, out: NDArray) -> None:
        """Write the values of the runs, and 0 elsewhere.

        Parameters
        ----------
        out : array of the runs' shape
            Written to.
        """
        start, stop = self.flat, self.flat + self.sizes
        values = np.zeros(2 * len(self) + 1, dtype=out.dtype)
        values[1::2] = self.value  # a gap before each run, and one at the end
        row = math.prod(self.shape[1:])
        places = bands(self.shape)
        cuts = [0, *np.searchsorted(start, [band.stop * row for band in places])]
        for band, (first, end) in zip(places, pairwise(cuts), strict=True):
            edges = np.empty(2 * (end - first) + 2, dtype=np.int64)
            edges[0], edges[-1] = band.start * row, band.stop * row
            edges[1:-1:2], edges[2:-1:2] = start[first:end], stop[first:end]
            pixels = np.repeat(values[2 * first : 2 * end + 1], np.diff(edges))
            out[band] = pixels.reshape(out[band].shape)

    def sums(self, values: NDArray) -> NDArray:
        """Add up what an array of the runs' shape holds in each of them."""
        start, stop = self.flat, self.flat + self.sizes
        is_whole = values.dtype.kind in "ub"
        sums = np.zeros(len(self), dtype=np.int64 if is_whole else np.float64)
        row = math.prod(self.shape[1:])
        places = bands(self.shape)
        cuts = [0, *np.searchsorted(start, [band.stop * row for band in places])]
        for band, (first, end) in zip(places, pairwise(cuts), strict=True):
            part = values[band].reshape(-1)
            so_far = np.zeros(part.size + 1, dtype=sums.dtype)
            np.cumsum(part, out=so_far[1:])
            begin = band.start * row
            high, low = (
                so_far[stop[first:end] - begin],
                so_far[start[first:end] - begin],
            )
            sums[first:end] = high - low
        return sums


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """How far the positions of neighbours along each axis are apart."""
    return tuple(
        math.prod(n + 1 for n in shape[axis:]) for axis in range(1, len(shape) + 1)
    )


def _find(
    values: NDArray, shape: tuple[int, ...], offset: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray]:
    """Find the runs of some rows, or planes, of an array of a shape."""
    changes = np.zeros((len(values), *(n + 1 for n in shape[1:])), dtype=bool)
    inner = changes[tuple(slice(n) for n in values.shape[:-1])]
    np.not_equal(values[..., 1:], values[..., :-1], out=inner[..., 1:-1])
    np.not_equal(values[..., 0], 0, out=inner[..., 0])
    np.not_equal(values[..., -1], 0, out=inner[..., -1])
    points = np.flatnonzero(changes)
    index = np.unravel_index(points, changes.shape)
    is_inside = index[-1] < shape[-1]
    value = np.zeros(len(points), dtype=values.dtype)
    value[is_inside] = values[tuple(i[is_inside] for i in index)]
    is_kept = value != 0
    stop = np.append(points[1:], changes.size)[is_kept]
    return points[is_kept] + offset, stop + offset, value[is_kept]
