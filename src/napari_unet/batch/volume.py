"""One image of any size: from pixels to labels, in arrays that are written in parts."""

from __future__ import annotations

import ctypes
import math
import sys
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from napari_unet.batch.stitch import Stitcher, check_numbers
from napari_unet.errors import OutOfMemory
from napari_unet.files.scratch import Scratch
from napari_unet.inference.classify import encode, foreground, to_codes
from napari_unet.inference.segment import Found, Numbering, segment_units_steps
from napari_unet.steps import Progress, mapped_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import zarr
    from numpy.typing import NDArray

    from napari_unet.batch.pieces import Box
    from napari_unet.inference.engine import Predictor
    from napari_unet.inference.runs import Runs
    from napari_unet.inference.segment import Place
    from napari_unet.inference.settings import ObjectSettings
    from napari_unet.inference.source import Source

Result = TypeVar("Result")

BLOCK_PIXELS = 1 << 25  # of a plane or volume; larger ones go block by block
# Fixed, so that no result depends on the memory that happens to be free.
BLOCK_SHAPES = {2: (4096, 4096), 3: (128, 512, 512)}
CHUNK_SIDES = {2: 512, 3: 128}  # of temporary files


def segment_into_steps(
    predictor: Predictor,
    settings: ObjectSettings,
    labels: Any,
    probabilities: Any = None,
    *,
    scratch: Path | None = None,
    block_shape: Sequence[int] | None = None,
) -> Generator[Progress, None, Found]:
    """Segment an image into arrays that may be larger than the memory.

    What is in memory depends on a plane (or volume, of a network of volumes) and
    not on their number; and on a block where a plane is large. The objects of
    blocks are joined to those of the whole plane, see `napari_unet.batch.stitch`.

    Parameters
    ----------
    predictor : Predictor
        Of the image; it is left open.
    settings : ObjectSettings
        How objects are made.
    labels : writable array of uint32, numpy or zarr
        Of the shape ``predictor.output_shape[1:]``. Written whole, large planes
        several times.
    probabilities : writable array of float32, optional
        Of the shape ``predictor.output_shape``. Written whole, if given.
    scratch : path, optional
        An existing folder for temporary files, which are removed at the end; the
        system's by default.
    block_shape : sequence of int, optional
        Sides of a block. By default planes and volumes up to `BLOCK_PIXELS` are
        not cut, and larger ones into `BLOCK_SHAPES`.

    Yields
    ------
    Progress

    Returns
    -------
    Found

    Raises
    ------
    BadOutput
        If there are more objects than ``labels`` can number.
    BadInput, OutOfMemory
        See `predict`.
    OSError
        If ``labels``, ``probabilities`` or temporary files cannot be written.
    """
    sides = [
        part.stop - part.start
        for axis, part in predictor.region.items()
        if axis in predictor.source.spatial
    ]
    if block_shape is None and math.prod(sides) > BLOCK_PIXELS:
        block_shape = BLOCK_SHAPES[predictor.source.ndim]
    try:
        if block_shape is None:
            steps = _units_steps(predictor, settings, labels, probabilities)
            return (yield from steps)
        with TemporaryDirectory(
            prefix="napari-unet-", dir=scratch, ignore_cleanup_errors=True
        ) as folder:
            steps = _blocks_steps(
                predictor, settings, labels, probabilities, block_shape, Path(folder)
            )
            return (yield from steps)
    except MemoryError as error:
        raise OutOfMemory(
            "Memory ran out for a plane of the image, or a block of it. Close other "
            "programs and try again."
        ) from error


def _units_steps(
    predictor: Predictor, settings: ObjectSettings, labels: Any, probabilities: Any
) -> Generator[Progress, None, Found]:
    def paint(place: Place, runs: Runs) -> None:
        if runs.value.itemsize > labels.dtype.itemsize:
            check_numbers(labels, int(runs.value.max(initial=0)))
        labels[place] = predictor.to_output(runs.array())

    keep = None if probabilities is None else probabilities.__setitem__
    return (yield from segment_units_steps(predictor, settings, paint, keep))


@dataclass(frozen=True)
class _View:
    """One plane or volume of an array, with the axes as the network sees them."""

    array: Any
    source: Source
    place: tuple[int | slice, ...]

    @property
    def _axes(self) -> list[str]:
        return [a for a in self.source.output_axes if a in self.source.spatial]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = dict(zip(self.source.output_axes, self.array.shape, strict=True))
        return tuple(sizes[axis] for axis in self.source.spatial)

    @property
    def dtype(self) -> np.dtype:
        dtype: np.dtype = np.dtype(self.array.dtype)
        return dtype

    def index(self, box: Box) -> tuple[int | slice, ...]:
        parts = dict(zip(self.source.spatial, box, strict=True))
        axes = self.source.output_axes
        return tuple(parts.get(a, i) for a, i in zip(axes, self.place, strict=True))

    def __getitem__(self, box: Box) -> NDArray:
        order = [self._axes.index(axis) for axis in self.source.spatial]
        return np.asarray(self.array[self.index(box)]).transpose(order)

    def __setitem__(self, box: Box, values: NDArray) -> None:
        order = [self.source.spatial.index(axis) for axis in self._axes]
        self.array[self.index(box)] = values.transpose(order)


def _blocks_steps(
    predictor: Predictor,
    settings: ObjectSettings,
    labels: Any,
    probabilities: Any,
    block_shape: Sequence[int],
    folder: Path,
) -> Generator[Progress, None, Found]:
    """Segment plane after plane, or volume after volume, each block by block."""
    passport = predictor.model.passport
    numbering = Numbering(passport)
    found = Found.nothing(passport)
    tiles = 0
    for index, unit in enumerate(predictor.units):
        view = _View(labels, predictor.source, predictor.place(unit))
        scratch = Scratch(folder / str(index))
        new_array = partial(_new_array, scratch, view.shape, block_shape)
        try:
            stitcher = Stitcher(view, passport, settings, block_shape, new_array)
            count = len(stitcher.blocks)
            for number, box in enumerate(stitcher.blocks):
                part = _within(predictor, unit, box)
                tiles = tiles or part.total  # a block at the edge has fewer
                size = tiles * count + stitcher.total
                total = size * len(predictor.units)
                place = (
                    f"{index * count + number + 1} of {len(predictor.units) * count}"
                )
                yield from _shifted_steps(
                    _block_steps(part, stitcher, settings, box, probabilities, view),
                    index * size + number * tiles,
                    tiles,
                    total,
                    f"block {place}",
                )
                _trim_memory()
            predictor.release()  # the objects take as much
            found += yield from _shifted_steps(
                _beside_steps(predictor, stitcher.label_steps(numbering.next_label)),
                index * size + tiles * count,
                stitcher.total,
                total,
            )
            numbering.count = sum(found.objects)
        finally:
            scratch.remove()
    for note in predictor.last_notes():
        yield Progress(total, total, note=note)
    return found


def _trim_memory() -> None:
    """Return freed memory to the system, where glibc keeps it.

    Threads free what others took: holes add up to hundreds of MB, block by block.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _new_array(
    scratch: Scratch, shape: Sequence[int], block_shape: Sequence[int], dtype: np.dtype
) -> zarr.Array:
    """Make a temporary array of the shape of one plane or volume."""
    largest = CHUNK_SIDES[len(shape)]
    # Whole numbers of chunks make up a block.
    chunks = [n if n <= largest else math.gcd(n, largest) for n in block_shape]
    return scratch.new_array(shape, list(map(min, chunks, shape)), dtype)


def _within(predictor: Predictor, unit: dict[str, int], box: Box) -> Predictor:
    """Return a predictor of one block of one plane or volume."""
    region = {axis: slice(index, index + 1) for axis, index in unit.items()}
    for axis, part in zip(predictor.source.spatial, box, strict=True):
        start = predictor.region[axis].start
        region[axis] = slice(start + part.start, start + part.stop)
    return predictor.within(region)


def _block_steps(
    part: Predictor,
    stitcher: Stitcher,
    settings: ObjectSettings,
    box: Box,
    probabilities: Any,
    view: _View,
) -> Generator[Progress, None, None]:
    kinds = [info.kind for info in part.model.passport.classes[1:]]
    tick = Progress(part.total, part.total)
    if probabilities is None:
        codes = yield from part.unit_steps(0, to_codes(kinds, settings.threshold))
        codes = codes[0]
    else:
        predicted = yield from part.unit_steps(0)
        probabilities[(slice(None), *view.index(box))] = part.to_output(predicted)
        arguments = foreground(predicted), kinds, settings.threshold
        codes = yield from _finish_steps(part, tick, encode, *arguments)
    yield from _finish_steps(part, tick, stitcher.add, box, codes)


def _finish_steps(
    predictor: Predictor, tick: Progress, function: Callable[..., Result], *args: Any
) -> Generator[Progress, None, Result]:
    """Run a function with heartbeats; when cancelled, wait until it ends.

    Nothing may write into temporary files that are being removed.
    """
    future = predictor.submit(function, *args)
    try:
        for _ in predictor.wait_steps(future, 0):
            yield tick
    finally:
        wait([future])
    return future.result()


def _beside_steps(
    predictor: Predictor, steps: Generator[Progress, None, Found]
) -> Generator[Progress, None, Found]:
    """Go through a generator with heartbeats between its yields."""

    def items() -> Generator[Progress | Found, None, None]:
        yield (yield from steps)

    waiting = items()
    tick = Progress(0, 1)
    while True:
        item = yield from _finish_steps(predictor, tick, next, waiting)
        if isinstance(item, Found):
            return item
        yield item
        tick = replace(item, note="")


def _shifted_steps(
    steps: Generator[Progress, None, Result],
    before: int,
    share: int,
    total: int,
    message: str = "",
) -> Generator[Progress, None, Result]:
    """Let the progress of a part run from ``before`` on over its share of the whole."""
    done = before

    def shifted(tick: Progress) -> Generator[Progress, None, None]:
        nonlocal done
        done = max(done, before + share * tick.done // max(tick.total, 1))
        yield Progress(done, total, message or tick.message, tick.note)

    return mapped_steps(steps, shifted)
