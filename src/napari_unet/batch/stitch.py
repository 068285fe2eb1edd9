"""Objects of a plane or volume that is too large for the memory, block by block.

The labels, numbers included, are those of `label_classes` on the whole: components
are joined across the faces of the blocks, and whatever is decided by what lies
near a pixel is decided with as much around the block as that takes. Only objects
that reach across blocks in a larger box than `MAX_OBJECT_PIXELS` are not split,
and holes longer than `MAX_HOLE_SIDE` may be filled in one block but not the next.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.batch.pieces import Pieces, blocks_of, grown_box, inner_box
from napari_unet.errors import BadOutput
from napari_unet.inference.classify import code_type
from napari_unet.inference.grow import grow_objects
from napari_unet.inference.objects import number_objects
from napari_unet.inference.segment import Found
from napari_unet.inference.split import (
    CONTEXT,
    components,
    fill_small_holes,
    largest_hole,
    split_at_necks,
)
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray

    from napari_unet.batch.pieces import Box, Joined
    from napari_unet.inference.settings import ObjectSettings
    from napari_unet.models.model import Passport

MAX_HOLE_SIDE = 64
MAX_OBJECT_PIXELS = 1 << 24


class Stitcher:
    """Labels one plane or volume: `add` every block, then `label_steps`.

    Parameters
    ----------
    labels : writable array of unsigned integers
        Of the plane or volume; gets the result.
    passport : Passport
        Says which classes are objects.
    settings : ObjectSettings
        How objects are made.
    block_shape : sequence of int
        Sides of a block.
    new_array : callable
        Takes a dtype and returns a writable array of the shape of ``labels``, for
        what is known between two passes over the blocks.
    """

    def __init__(
        self,
        labels: Any,
        passport: Passport,
        settings: ObjectSettings,
        block_shape: Sequence[int],
        new_array: Callable[[np.dtype], Any],
    ):
        self.blocks = blocks_of(labels.shape, block_shape)
        self._labels = labels
        self._shape: tuple[int, ...] = labels.shape
        self._passport = passport
        self._settings = settings
        kinds = [info.kind for info in passport.classes]
        self._classes = [i for i, kind in enumerate(kinds) if kind == "objects"]
        self._regions = [i for i, kind in enumerate(kinds) if kind == "region"]
        # Twice the class of a pixel, and 1 more where it is above the threshold.
        self._codes = new_array(code_type(kinds[1:]))
        self._new_array = new_array
        self._objects = np.zeros(len(kinds), dtype=np.int64)
        self._pixels = np.zeros(len(kinds), dtype=np.int64)
        self._done = 0

    def add(self, box: Box, codes: NDArray) -> None:
        """Take one block.

        Parameters
        ----------
        box : tuple of slice
            One of `blocks`.
        codes : array of the shape of the block
            From `encode`.
        """
        self._codes[box] = codes
        owner = codes // 2
        is_region = np.isin(owner, self._regions)
        self._labels[box] = np.where(is_region, owner, 0).astype(self._labels.dtype)
        for index in self._regions:
            self._pixels[index] += np.count_nonzero(owner == index)

    @property
    def total(self) -> int:
        """Number of visits of a block that `label_steps` makes."""
        passes = 2
        if self._settings.split_touching:
            passes = 5
        elif self._settings.grow:
            passes = 3
        return passes * len(self._classes) * len(self.blocks)

    def label_steps(self, start: int) -> Generator[Progress, None, Found]:
        """Make the objects of all classes.

        Parameters
        ----------
        start : int
            The number of the first object.

        Yields
        ------
        Progress
            Over the visits of blocks.

        Returns
        -------
        Found
        """
        first, second = (self._new_array(np.dtype(np.uint32)) for _ in range(2))
        for index in self._classes:
            pieces, joined = yield from self._pieces_steps(index, first, second)
            number = number_objects(
                joined.sizes, joined.first, self._settings.minimal_size
            )
            count = int(number.max(initial=0))
            check_numbers(self._labels, start + count)
            number[number > 0] += start - 1
            yield from self._write_steps(pieces, number[joined.object_of])
            self._objects[index] = count
            self._pixels[index] = joined.sizes[number > 0].sum()
            start += count
        self._pixels[0] = math.prod(self._shape) - self._pixels.sum()
        return Found(
            self._passport, tuple(self._objects.tolist()), tuple(self._pixels.tolist())
        )

    def _pieces_steps(
        self, index: int, first: Any, second: Any
    ) -> Generator[Progress, None, tuple[Any, Joined]]:
        """Return the pieces of a class, and the objects that they are joined to."""
        if self._settings.split_touching:
            whole = yield from self._join_steps(index, second)
            hole = largest_hole(whole.sizes[1:])
            filled = yield from self._join_steps(index, first, hole)
            count = yield from self._split_steps(first, filled, second)
            objects = np.arange(count + 1)
            return first, (yield from self._grow_steps(index, second, objects, first))
        whole = yield from self._join_steps(index, first)
        if not self._settings.grow:
            return first, whole
        objects = whole.object_of
        return second, (yield from self._grow_steps(index, first, objects, second))

    def _join_steps(
        self, index: int, store: Any, hole: float = 0
    ) -> Generator[Progress, None, Joined]:
        """Find the connected components of a class, after filling its holes."""
        pieces = Pieces(store)
        margin = min(math.ceil(hole), MAX_HOLE_SIDE)
        for box in self.blocks:
            around = grown_box(box, margin, self._shape)
            above = np.asarray(self._codes[around]) == 2 * index + 1
            filled = fill_small_holes(above, hole)
            inner = inner_box(box, around)
            pieces.add(box, components(filled[inner]), above[inner])
            yield self._tick()
        return pieces.join()

    def _split_steps(
        self, store: Any, joined: Joined, into: Any
    ) -> Generator[Progress, None, int]:
        """Cut components at their necks; return the number of objects.

        What lies within a block is cut with the others there; what does not, by
        itself.
        """
        crosses = joined.pieces > 1
        crosses[0] = False
        size = (joined.high - joined.low + 2 * CONTEXT).clip(0).astype(float)
        is_large = crosses & (size.prod(axis=1) > MAX_OBJECT_PIXELS)
        count = int(np.count_nonzero(is_large))
        stays = np.zeros(len(crosses), dtype=np.uint32)
        stays[is_large] = np.arange(1, count + 1)
        for box in self.blocks:
            around = grown_box(box, CONTEXT, self._shape)
            pieces = np.asarray(store[around])
            inner = inner_box(box, around)
            component = joined.object_of[pieces[inner]]
            objects = stays[component]
            own = (component > 0) & ~crosses[component]
            count = _split_some(pieces > 0, inner, own, objects, count)
            into[box] = objects
            note = "" if box is not self.blocks[0] else _note_large(is_large)
            yield self._tick(note)
        for number in np.flatnonzero(crosses & ~is_large):
            low, high = joined.low[number].tolist(), joined.high[number].tolist()
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            around = grown_box(box, CONTEXT, self._shape)
            pieces = np.asarray(store[around])
            inner = inner_box(box, around)
            own = joined.object_of[pieces[inner]] == number
            objects = np.asarray(into[box])
            count = _split_some(pieces > 0, inner, own, objects, count)
            into[box] = objects
            yield self._progress()
        return count

    def _grow_steps(
        self, index: int, store: Any, object_of: NDArray, into: Any
    ) -> Generator[Progress, None, Joined]:
        """Grow objects, but never into what is no pixel of the class for certain."""
        pieces = Pieces(into)
        object_of = object_of.astype(np.uint32)
        met_certain = False
        for box in self.blocks:
            met_certain |= self._grow_block(index, store, object_of, box, pieces)
            yield self._tick()
        return pieces.join(by_key=not met_certain)

    def _grow_block(
        self, index: int, store: Any, object_of: NDArray, box: Box, pieces: Pieces
    ) -> bool:
        """Grow the objects of one block; tell whether they met what is certain."""
        around = grown_box(box, self._settings.grow, self._shape)
        objects = object_of[np.asarray(store[around])]
        if self._settings.grow and objects.any():
            objects = grow_objects(objects, self._settings.grow)
        objects = objects[inner_box(box, around)]
        codes = np.asarray(self._codes[box])
        certain = codes // 2 != index
        met_certain = bool(objects[certain].any())
        objects[certain] = 0
        local = components(objects)
        keys = np.zeros(int(local.max(initial=0)) + 1, dtype=np.int64)
        keys[local] = objects
        pieces.add(box, local, codes == 2 * index + 1, keys)
        return met_certain

    def _write_steps(
        self, store: Any, numbers: NDArray[np.int64]
    ) -> Generator[Progress, None, None]:
        """Put the numbers of a class into the labels."""
        numbers = numbers.astype(self._labels.dtype)
        for box in self.blocks:
            found = numbers[np.asarray(store[box])]
            if found.any():
                other = np.asarray(self._labels[box])
                self._labels[box] = np.where(found > 0, found, other)
            yield self._tick()

    def _tick(self, note: str = "") -> Progress:
        self._done += 1
        return self._progress(note)

    def _progress(self, note: str = "") -> Progress:
        return Progress(self._done, self.total, "making objects", note)


def _split_some(
    mask: NDArray, inner: Box, own: NDArray, objects: NDArray, count: int
) -> int:
    """Number the objects of some components on from ``count``; return the last."""
    if not own.any():
        return count
    hills = split_at_necks(mask)[inner][own]
    is_used = np.zeros(int(hills.max()) + 1, dtype=bool)
    is_used[hills] = True
    numbers = np.cumsum(is_used) + count
    objects[own] = numbers[hills]
    return int(numbers[-1])


def _note_large(is_large: NDArray) -> str:
    count = int(np.count_nonzero(is_large))
    if not count:
        return ""
    return (
        f"{count} connected area{'s' * (count != 1)} too large to split stay"
        f"{'s' * (count == 1)} whole; a higher threshold may separate the objects."
    )


def check_numbers(labels: Any, largest: int) -> None:
    """Raise `BadOutput` if labels cannot hold a number."""
    if largest > np.iinfo(labels.dtype).max:
        raise BadOutput(
            f"There are more objects than labels of type {labels.dtype} can number. "
            "Raise the minimal size, or segment the image in parts."
        )
