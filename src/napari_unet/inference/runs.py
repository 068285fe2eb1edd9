"""Runs of equal pixels along the last axis: objects without visiting every pixel.

All that connects, sizes and numbers objects needs of each of their rows is where it
begins and ends. Positions count through rows that are one pixel longer than those of
the image, and planes that are one row longer, so that nothing lies side by side
across an edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy import sparse

from napari_unet.inference.spread import spread_steps
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BAND = 1 << 20  # pixels looked at together: they stay in the processor's cache
CHUNK = 1 << 15  # runs, likewise


def bands(shape: Sequence[int], pixels: int | None = None) -> list[slice]:
    """Cut an array along its first axis, into parts of `BAND` pixels if not told."""
    rows = max(1, (pixels or BAND) // max(1, math.prod(shape[1:])))
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

        def find(band: slice) -> Runs:
            return cls.find_in(shape, band, values[band])

        return cls.merge(shape, run_to_end(spread_steps(find, bands(shape))))

    @classmethod
    def find_in(cls, shape: tuple[int, ...], band: slice, values: NDArray) -> Self:
        """Find the runs of a part of an array.

        Parameters
        ----------
        shape : tuple of int
            Of the whole.
        band : slice
            Where the part lies along the first axis.
        values : array
            What is there.
        """
        if not values.size:
            return cls.merge(shape, [])
        return cls(shape, *_find(values, shape, band.start * _strides(shape)[0]))

    @classmethod
    def merge(cls, shape: tuple[int, ...], several: Sequence[Runs]) -> Self:
        """Put runs of one array together that do not overlap."""
        if not several:
            none = np.zeros(0, dtype=np.int64)
            return cls(shape, none, none, none)
        start = np.concatenate([runs.start for runs in several])
        stop = np.concatenate([runs.stop for runs in several])
        value = np.concatenate([runs.value for runs in several])
        if (start[1:] > start[:-1]).all():
            return cls(shape, start, stop, value)
        order = np.argsort(start)
        return cls(shape, start[order], stop[order], value[order])

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

    def where(self, is_kept: NDArray | slice) -> Runs:
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

    def met(self, others: Runs) -> Runs:
        """Return what of each is left from its first pixel on that others have, too."""
        others_start = np.append(others.start, np.iinfo(np.int64).max)

        def meet(chunk: slice) -> Runs:
            own = self.where(chunk)
            number = np.searchsorted(others.stop, own.start, side="right")
            start = np.maximum(own.start, others_start[number])
            met = Runs(self.shape, start, own.stop, own.value)
            return met.where(start < own.stop)

        found = run_to_end(spread_steps(meet, self._chunks()))
        return Runs.merge(self.shape, found)

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
        link = partial(self._link, steps)
        found = run_to_end(spread_steps(link, self._chunks()))
        none = np.zeros(0, dtype=np.int64)
        root, here, there = (
            np.concatenate([none, *(links[i] for links in found)]) for i in range(3)
        )
        is_root = root == np.arange(len(self))
        tree = (np.cumsum(is_root) - 1)[root]
        if not len(tree):
            return tree, 0
        trees = int(tree.max()) + 1
        links = np.ones(len(here), dtype=np.int8), (tree[here], tree[there])
        graph = sparse.coo_array(links, (trees, trees))
        count, component = sparse.csgraph.connected_components(graph, directed=False)
        return component.astype(np.int64)[tree], int(count)

    def _link(
        self, steps: list[tuple[int, bool]], chunk: slice
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Join the runs of a chunk to trees, which are few.

        Returns
        -------
        root : int64 array
            The first run of the tree of each.
        here, there : int64 array
            What else is to be joined: to other trees, or to chunks before.
        """
        pairs = [self._neighbours(*step, chunk) for step in steps]
        here, there = (np.concatenate(part) for part in zip(*pairs, strict=True))
        first = chunk.start
        root = np.arange(chunk.start, chunk.stop)
        is_inside = there >= first
        # Each run follows one of its links, which lead to earlier runs.
        root[here[is_inside] - first] = there[is_inside]
        while not np.array_equal(further := root[root - first], root):
            root = further
        is_open = ~is_inside
        ends = here[is_inside], there[is_inside]
        is_open[is_inside] = root[ends[0] - first] != root[ends[1] - first]
        return root, here[is_open], there[is_open]

    def _chunks(self) -> list[slice]:
        edges = [*range(0, len(self), CHUNK), len(self)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def _neighbours(
        self, step: int, diagonal: bool, chunk: slice
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find pairs of runs that overlap once the first is moved back by ``step``."""
        reach = int(diagonal)
        start, stop = self.start[chunk], self.stop[chunk]
        first = np.searchsorted(self.stop, start - (step + reach), side="right")
        end = np.searchsorted(self.start, stop - (step - reach), side="left")
        count = np.maximum(end - first, 0)
        here = np.repeat(np.arange(chunk.start, chunk.stop), count)
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
        values = np.zeros(2 * len(self) + 1, dtype=out.dtype)
        values[1::2] = self.value  # a gap before each run, and one at the end

        def paint(part: tuple[slice, slice]) -> None:
            band, own = part
            edges = self._edges(band, own)
            widths = np.diff(edges, prepend=0, append=out[band].size)
            pixels = np.repeat(values[2 * own.start : 2 * own.stop + 1], widths)
            out[band] = pixels.reshape(out[band].shape)

        run_to_end(spread_steps(paint, self._parts()))

    def sums(self, values: NDArray) -> NDArray:
        """Add up what an array of the runs' shape holds in each of them."""
        is_whole = values.dtype.kind in "ub"
        dtype = np.int64 if is_whole else np.float64

        def add(part: tuple[slice, slice]) -> NDArray:
            band, own = part
            edges = self._edges(band, own)
            pixels = np.append(values[band], values.dtype.type(0))  # none ends behind
            sums: NDArray = np.add.reduceat(pixels, edges, dtype=dtype)
            return sums[::2]  # the others are those of the gaps

        parts = run_to_end(spread_steps(add, self._parts()))
        return np.concatenate([np.zeros(0, dtype=dtype), *parts])

    def _parts(self) -> list[tuple[slice, slice]]:
        """Return bands of the array, and which of the runs lie in each."""
        places = bands(self.shape)
        stride = _strides(self.shape)[0]
        cuts = np.searchsorted(self.start, [band.stop * stride for band in places])
        ends = pairwise([0, *cuts.tolist()])
        return [(band, slice(*end)) for band, end in zip(places, ends, strict=True)]

    def _edges(self, band: slice, own: slice) -> NDArray[np.int64]:
        """Return where runs begin and end, in turn, in the flattened band."""
        runs = self.where(own)
        start = runs.flat - band.start * math.prod(self.shape[1:])
        return np.stack([start, start + runs.sizes], axis=1).reshape(-1)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """How far the positions of neighbours along each axis are apart."""
    return tuple(
        math.prod(n + 1 for n in shape[axis:]) for axis in range(1, len(shape) + 1)
    )


def _find(
    values: NDArray, shape: tuple[int, ...], offset: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray]:
    """Find the runs of some rows, or planes, of an array of a shape."""
    sides = (len(values), *(n + 1 for n in shape[1:]))
    pixels = np.zeros(1 + math.prod(sides), dtype=values.dtype)
    pixels[1:].reshape(sides)[tuple(slice(n) for n in values.shape)] = values
    points = np.flatnonzero(pixels[1:] != pixels[:-1])
    value = pixels[1:][points]
    is_kept = value != 0
    stop = np.append(points[1:], len(pixels) - 1)[is_kept]
    return points[is_kept] + offset, stop + offset, value[is_kept]
