"""Pieces of objects, each within one block, and which of them are one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
from scipy import sparse

from napari_unet.errors import BadOutput
from napari_unet.inference.objects import NOWHERE, first_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Box = tuple[slice, ...]

MAX_PIECES = np.iinfo(np.uint32).max


def blocks_of(shape: Sequence[int], block_shape: Sequence[int]) -> list[Box]:
    """Cut a plane or volume into blocks, in C order."""
    counts = [-(-n // side) for n, side in zip(shape, block_shape, strict=True)]
    return [
        tuple(
            slice(i * side, min((i + 1) * side, n))
            for i, side, n in zip(index, block_shape, shape, strict=True)
        )
        for index in np.ndindex(*counts)
    ]


def grown_box(box: Box, pixels: int, shape: Sequence[int]) -> Box:
    """Extend a box on all sides, but not beyond the edges."""
    return tuple(
        slice(max(part.start - pixels, 0), min(part.stop + pixels, n))
        for part, n in zip(box, shape, strict=True)
    )


def inner_box(box: Box, outer: Box) -> Box:
    """Return where a box lies in what was read of a larger one."""
    return tuple(
        slice(part.start - around.start, part.stop - around.start)
        for part, around in zip(box, outer, strict=True)
    )


@dataclass(frozen=True)
class Joined:
    """Objects that are made of pieces; number 0 is the background.

    Parameters
    ----------
    object_of : integer array
        The object of each piece.
    sizes, pieces : int64 array
        How many pixels and pieces each object has.
    first : int64 array
        Its first pixel above the threshold, in the flattened plane or volume.
    low, high : int64 array of shape (objects, axes)
        The box around it.
    """

    object_of: NDArray
    sizes: NDArray[np.int64]
    pieces: NDArray[np.int64]
    first: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]


class Pieces:
    """Gathers the pieces, block after block in C order, and joins them.

    Parameters
    ----------
    store : writable array of uint32
        Of the plane or volume; gets the number of the piece of each pixel.
    """

    def __init__(self, store: Any):
        self._store = store
        self._shape: tuple[int, ...] = store.shape
        self.count = 0
        none = np.zeros((1, len(self._shape)), dtype=np.int64)
        self._sizes = [np.zeros(1, dtype=np.int64)]
        self._first = [np.full(1, NOWHERE)]
        self._keys = [np.zeros(1, dtype=np.int64)]
        self._low, self._high = [none], [none]
        self._pairs: list[NDArray[np.uint64]] = []

    def add(
        self, box: Box, local: NDArray, above: NDArray, keys: NDArray | None = None
    ) -> None:
        """Take the pieces of one block.

        Parameters
        ----------
        box : tuple of slice
            The block.
        local : unsigned integer array
            Its pieces, from 1 without gaps.
        above : bool array
            What is above the threshold.
        keys : integer array, optional
            Of each local number; only pieces of the same key can be joined.
        """
        count = int(local.max(initial=0))
        if self.count + count > MAX_PIECES:
            raise BadOutput(
                "There are more than 2**32 spots above the threshold. Raise it, or "
                "segment the image in parts."
            )
        numbers = local.astype(np.uint32)
        np.add(numbers, np.uint32(self.count), out=numbers, where=local > 0)
        self._store[box] = numbers
        self._meet_neighbours(box, numbers)
        if not count:
            return
        self.count += count
        statistics = cc3d.statistics(local, no_slice_conversion=True)
        start = np.array([part.start for part in box])
        bounds = statistics["bounding_boxes"][1:].astype(np.int64)
        self._low.append(bounds[:, ::2] + start)
        self._high.append(bounds[:, 1::2] + start + 1)
        self._sizes.append(statistics["voxel_counts"][1:].astype(np.int64))
        first = first_pixels(np.where(above, local, 0), count + 1)[1:]
        self._first.append(self._in_whole(first, box))
        self._keys.append(np.zeros(count, np.int64) if keys is None else keys[1:])

    def _in_whole(self, first: NDArray[np.int64], box: Box) -> NDArray[np.int64]:
        """Turn indices into a flattened block into those into the whole."""
        is_there = first < NOWHERE
        place = np.unravel_index(
            np.where(is_there, first, 0), [part.stop - part.start for part in box]
        )
        moved = [i + part.start for i, part in zip(place, box, strict=True)]
        return np.where(is_there, np.ravel_multi_index(moved, self._shape), NOWHERE)

    def _meet_neighbours(self, box: Box, numbers: NDArray) -> None:
        """Note which pieces lie side by side across the lower faces of a block."""
        for axis, part in enumerate(box):
            if part.start == 0:
                continue
            face = list(box)
            face[axis] = slice(part.start - 1, part.start)
            there = np.asarray(self._store[tuple(face)]).ravel().astype(np.uint64)
            here = numbers.take(0, axis).ravel()
            both = (here > 0) & (there > 0)
            self._pairs.append(np.unique(there[both] << np.uint64(32) | here[both]))

    def join(self, *, by_key: bool = False) -> Joined:
        """Make objects of the pieces.

        Parameters
        ----------
        by_key : bool
            Whether all pieces of a key are one object, wherever they are; else
            those that are connected.
        """
        object_of = keys = np.concatenate(self._keys)
        if not by_key:
            pairs = np.concatenate([*self._pairs, np.zeros(0, dtype=np.uint64)])
            a, b = (pairs >> np.uint64(32)), pairs & np.uint64(MAX_PIECES)
            is_same = keys[a] == keys[b]
            a, b = a[is_same].astype(np.int64), b[is_same].astype(np.int64)
            shape = (len(keys), len(keys))
            links = sparse.coo_array((np.ones(len(a), dtype=bool), (a, b)), shape)
            _, object_of = sparse.csgraph.connected_components(links, directed=False)
        count = int(object_of.max()) + 1
        low, high = np.concatenate(self._low), np.concatenate(self._high)
        joined = Joined(
            object_of,
            np.zeros(count, dtype=np.int64),
            np.bincount(object_of, minlength=count),
            np.full(count, NOWHERE),
            np.full((count, low.shape[1]), NOWHERE),
            np.zeros((count, low.shape[1]), dtype=np.int64),
        )
        np.add.at(joined.sizes, object_of, np.concatenate(self._sizes))
        np.minimum.at(joined.first, object_of, np.concatenate(self._first))
        np.minimum.at(joined.low, object_of, low)
        np.maximum.at(joined.high, object_of, high)
        return joined
