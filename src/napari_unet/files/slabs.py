"""Stored arrays whose chunks are several planes deep, read plane by plane."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bounds = tuple[tuple[int, int], ...]

# Planes that are kept decoded, all together.
SLAB_BYTES = 2**28
# Axes that are read whole for each plane.
_OF_PLANES = "CYXS"


class Slabs:
    """Keeps the last planes decoded: else each chunk is, as often as it is deep.

    Parameters
    ----------
    data : array
        Of zarr and the like: has a shape, a dtype and numpy's slicing.
    axes : str
        One letter for each dimension. Along all but C, Y, X and S the array is
        expected to be gone through.
    chunks : sequence of int
        Sides of what can only be decoded whole.
    """

    def __init__(self, data: Any, axes: str, chunks: Sequence[int]) -> None:
        self._data, self._axes = data, axes
        # dask makes its blocks of whole ones of these.
        self.chunks = getattr(data, "chunks", None)
        self.shape: tuple[int, ...] = tuple(data.shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(data.dtype)
        self._chunks = tuple(chunks)
        self._depths = self._choose_depths()
        self._kept: OrderedDict[Bounds, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()  # dask reads with several threads

    def __reduce__(self) -> tuple[Any, ...]:
        # What is sent to another process begins anew.
        return Slabs, (self._data, self._axes, self._chunks)

    def _choose_depths(self) -> dict[int, int]:
        """Return by axis how many planes are kept, if more than one."""
        lengths = dict(enumerate(self.shape))
        nbytes = self.dtype.itemsize
        for axis, letter in enumerate(self._axes):
            nbytes *= lengths[axis] if letter in _OF_PLANES else 1
        depths = {}
        for axis in reversed(range(self.ndim)):
            depth = min(self._chunks[axis], lengths[axis], SLAB_BYTES // nbytes)
            if self._axes[axis] not in _OF_PLANES and depth > 1:
                depths[axis] = depth
                nbytes *= depth
        return depths

    def __getitem__(self, key: tuple[int | slice, ...]) -> NDArray[Any]:
        wanted = [
            part.indices(length)
            if isinstance(part, slice)
            else (int(part), int(part) + 1, 1)
            for part, length in zip(key, self.shape, strict=True)
        ]
        slab = self._slab(wanted)
        if slab is None:
            return np.asarray(self._data[key])
        pixels = self._decoded(slab)
        inner = tuple(
            slice(start - first, stop - first)
            if isinstance(part, slice)
            else start - first
            for part, (start, stop, _), (first, _) in zip(
                key, wanted, slab, strict=True
            )
        )
        return pixels[inner].copy()

    def _slab(self, wanted: Sequence[tuple[int, int, int]]) -> Bounds | None:
        """Return what to decode for a region, or None if that should not be kept."""
        bounds = []
        is_deeper = False
        for axis, (start, stop, step) in enumerate(wanted):
            if step != 1 or not 0 <= start < stop:
                return None
            first, last = start, stop
            if axis in self._depths:
                begin = start - start % self._chunks[axis]
                depth = self._depths[axis]
                first = start - (start - begin) % depth
                end = min(begin + self._chunks[axis], self.shape[axis])
                last = min(first + depth, end)
                is_deeper |= last - first > stop - start
            if last < stop:
                return None
            bounds.append((first, last))
        return tuple(bounds) if is_deeper else None

    def _decoded(self, slab: Bounds) -> NDArray[Any]:
        with self._lock:
            if slab in self._kept:
                self._kept.move_to_end(slab)
                return self._kept[slab]
        pixels = np.asarray(self._data[tuple(slice(*part) for part in slab)])
        with self._lock:
            self._kept[slab] = pixels
            while sum(kept.nbytes for kept in self._kept.values()) > SLAB_BYTES:
                self._kept.popitem(last=False)
        return pixels
