"""The tile engine: from an image to probabilities, exactly, with progress.

The result is that of the network run once on the whole image, mirrored at its
edges: it does not depend on the tile size.
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from napari_unet.errors import BadInput
from napari_unet.inference.assembly import Blend, Strips
from napari_unet.inference.backends import (
    Backend,
    Precision,
    choose_device,
    is_out_of_memory,
)
from napari_unet.inference.classify import keep_all
from napari_unet.inference.grid import Grid
from napari_unet.inference.plan import TilePlan
from napari_unet.inference.source import Source, open_source
from napari_unet.inference.tile_run import Machine, TileRun, heartbeats
from napari_unet.network.config import ProgramConfig
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.inference.assembly import Assembly
    from napari_unet.inference.classify import Reduction
    from napari_unet.inference.tiling import Tile
    from napari_unet.models.model import Model
    from napari_unet.models.normalize import Scaling

Result = TypeVar("Result")


@dataclass
class _Known:
    """What the parts of one prediction have found out about the image."""

    # Of the whole image under (), of a plane under its place in the loop.
    scalings: dict[tuple[int, ...], Scaling] = field(default_factory=dict)
    non_finite: int = 0


class Predictor:
    """One prediction: an image, a model and how to run it.

    Go through `units` and run `unit_steps` on each; `close` at the end.

    Parameters
    ----------
    image : array of any real dtype, numpy, dask or zarr
        Read tile by tile where a plane is large.
    model : Model
        Says how to normalise and rescale.
    axes, channels
        See `open_source`.
    region : mapping of str to slice, optional
        The part of the image that is wanted, by axis letter; what lies around
        it still counts as context. Everything by default.
    device : str
        "auto", "cpu", "cuda", "mps".
    tile_shape : sequence of int, optional
        Chosen by memory when None.
    precision : "auto" or "float32"
        See `Backend`.
    test_time_augmentation : bool
        Average over 8 flips and rotations (in YX).
    pixel_size : mapping of str to float, optional
        Of the image in µm, by axis letter; with it the image is rescaled to the
        model's pixel size and the result comes back on the image's grid.
    memory_limit : float, optional
        GB that the network may take of the device's memory. By default 60 % of what
        is free on a GPU, a third of it on a CPU.
    """

    def __init__(
        self,
        image: Any,
        model: Model,
        *,
        axes: str | None = None,
        channels: Sequence[int] | None = None,
        region: Mapping[str, slice] | None = None,
        device: str = "auto",
        tile_shape: Sequence[int] | None = None,
        precision: Precision = "auto",
        test_time_augmentation: bool = False,
        pixel_size: Mapping[str, float] | None = None,
        memory_limit: float | None = None,
    ):
        self.model = model
        self.source, self.notes = open_source(image, model, axes, channels)
        self.region = self.source.full_region(region)
        self.units = list(self.source.units(self.region))
        config = model.network.config
        if isinstance(config, ProgramConfig) and config.fixed_shape:
            config.check_turned(test_time_augmentation)
        self._augment = test_time_augmentation
        chosen = choose_device(device).that_runs(model.network)
        self.notes += [chosen.note] if chosen.note else []
        backend_on = partial(
            Backend, model.network, precision=precision, memory_limit=memory_limit
        )
        try:
            backend = backend_on(chosen.name)
        except Exception as error:
            if chosen.name == "cpu" or not is_out_of_memory(error):
                raise
            self.notes.append(f"{chosen.name} is full; computing on the CPU.")
            backend = backend_on("cpu")
        self._is_part = False
        factors = model.rescaling(dict(pixel_size or {}))
        if factors:
            fit = model.describe_fit(dict(pixel_size or {}))
            self.notes.append(fit.capitalize() + ".")
        self._grid = Grid.over(self.source.spatial_shape, factors)
        self._given_tile_shape = tile_shape
        self._machine, self._known = Machine(backend_on, backend), _Known()
        self._max_input_pixels = backend.max_input_pixels
        try:
            self._set_tiles()
        except BaseException:
            self.close()
            raise
        if self.model.inexact_reason and len(self._plan.tiles) > 1:
            self.notes.append(
                "The tiles are blended, so that the result depends a little on the "
                f"tile size: {self.model.inexact_reason}."
            )

    def within(self, region: Mapping[str, slice]) -> Predictor:
        """Return a predictor of another part of the image.

        It shares everything that does not depend on the part: the network, the
        grid, the statistics of the intensities and what was said already. It is
        closed with this one.

        Parameters
        ----------
        region : mapping of str to slice
            By axis letter; along the other axes this predictor's own region.
        """
        part = copy.copy(self)
        part._is_part = True
        part.region = self.source.full_region({**self.region, **region})
        part.units = list(part.source.units(part.region))
        part._set_tiles()
        return part

    def _set_tiles(self) -> None:
        self._wanted = [self.region[axis] for axis in self.source.spatial]
        self._opening: dict[int, Future[tuple[Source, Scaling]]] = {}
        shape = self._given_tile_shape
        if shape is not None and (
            np.shape(shape) != (self.model.ndim,) or min(shape) < 1
        ):
            raise BadInput(
                f"tile_shape={shape} does not name {self.model.ndim} positive sides "
                f"for {self.source.spatial}."
            )
        self._plan = TilePlan(
            self.model.network.config,
            self._grid.region(self._wanted),
            self._grid.shape,
            tile_shape=shape,
            max_input_pixels=self._max_input_pixels,
            longest_side=self._machine.longest_side,
            is_turned=self._augment,
            is_blended=bool(self.model.inexact_reason),
        )

    @property
    def computed_by(self) -> str:
        """What runs the network now, and how precisely: "cpu, OpenVINO, bfloat16"."""
        backend = self._machine.backend
        return f"{backend.device}, {backend.title}"

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(class, *axes of the image without channels)."""
        sides = [self.region[axis] for axis in self.source.output_axes]
        classes = self.model.network.config.num_classes
        return classes, *[part.stop - part.start for part in sides]

    def place(
        self, unit: Mapping[str, int], rows: slice = slice(None)
    ) -> tuple[int | slice, ...]:
        """Index of a unit, or of rows of it, in an output without the class axis."""
        parts: dict[str, int | slice] = {
            axis: index - self.region[axis].start for axis, index in unit.items()
        }
        parts[self.source.spatial[0]] = rows
        return tuple(parts.get(a, slice(None)) for a in self.source.output_axes)

    def to_output(self, part: NDArray) -> NDArray:
        """Bring the spatial axes, the last ones, into the order of the image's axes."""
        order = [a for a in self.source.output_axes if a in self.source.spatial]
        first = part.ndim - len(order)
        axes = [first + self.source.spatial.index(a) for a in order]
        return part.transpose([*range(first), *axes])

    @property
    def total(self) -> int:
        """Number of tiles of all units."""
        return len(self._plan.tiles) * len(self.units)

    def unit_steps(
        self, index: int, reduce: Reduction = keep_all
    ) -> Generator[Progress, None, NDArray]:
        """Predict one plane or volume, and return it whole; see `strip_steps`."""
        shape = tuple(part.stop - part.start for part in self._wanted)
        whole: NDArray | None = None

        def take(rows: slice, strip: NDArray) -> None:
            nonlocal whole
            if strip.shape[1:] == shape:
                whole = strip
                return
            if whole is None:
                whole = np.empty((len(strip), *shape), dtype=strip.dtype)
            whole[:, rows] = strip

        yield from self.strip_steps(index, take, reduce)
        assert whole is not None
        return whole

    def strip_steps(
        self,
        index: int,
        take: Callable[[slice, NDArray], None],
        reduce: Reduction = keep_all,
    ) -> Generator[Progress, None, None]:
        """Predict one plane or volume, and hand it on in parts.

        Parameters
        ----------
        index : int
            Into `units`.
        take : callable
            Gets the parts in order, while others are computed, in another thread but
            one at a time: where a part lies along the first spatial axis, counted from
            the start of the region, and an array of shape (kept, *spatial), which is
            on the image's grid and in the order of `Source.spatial`. It may keep it.
        reduce : callable
            What is kept of the probabilities: all of them, as float32 (class, ...),
            if it is not given.

        Yields
        ------
        Progress
            Over all tiles of all units.

        Raises
        ------
        OutOfMemory
            If not even the smallest tile fits on the CPU.
        """
        unit = self.units[index]
        while self.notes:
            yield self._progress(index, 0, note=self.notes.pop(0))
        opening = self._opening.pop(index, None) or self._open(index)
        source, scaling = yield from self._heartbeats(opening, index, 0)
        if index + 1 < len(self.units):  # read while this one is computed
            self._opening[index + 1] = self._open(index + 1)
        plan, is_whole = self._plan, self._grid.rescales or self._plan.is_blended
        assembly: Assembly = Strips(plan.region, plan.tiles)
        if is_whole:
            assembly = Blend(plan.region, self._grid.shape, plan.is_blended)
        read = partial(self._read, source, scaling, unit)
        hand_on = partial(self._hand_on, source, unit, is_whole, reduce, take)
        kept = keep_all if is_whole else reduce
        run = TileRun(self._machine, plan, read, kept, augment=self._augment)
        tiles = run.steps(partial(self._progress, index))
        handing: Future[None] | None = None
        try:
            # Closed before what is handed on is waited for.
            with closing(tiles):
                for item in tiles:
                    if isinstance(item, Progress):
                        yield item
                        continue
                    for rows, part in assembly.add(*item):
                        if handing is not None:
                            yield from self.wait_steps(handing, index)
                        handing = self.submit(hand_on, rows, part)
                        del part
            assert handing is not None
            assembly.check_complete()
            yield from self.wait_steps(handing, index)
        finally:
            # Nothing may be written into files that are being removed.
            if handing is not None and not handing.cancel():
                wait([handing])
        if index == len(self.units) - 1 and not self._is_part:
            self.notes += self.last_notes()
        while self.notes:
            yield self._progress(index, len(self._plan.tiles), note=self.notes.pop(0))

    def _hand_on(
        self,
        source: Source,
        unit: Mapping[str, int],
        is_whole: bool,
        reduce: Reduction,
        take: Callable[[slice, NDArray], None],
        rows: slice,
        part: NDArray,
    ) -> None:
        """Give what is complete to who wants it."""
        if is_whole:
            part = self._grid.back(part, self._wanted)
            rows = slice(0, part.shape[1])
            part = reduce(torch.from_numpy(part)).numpy()
        if source.dtype.kind == "f":
            background = torch.zeros(self.output_shape[0], 1)
            background[0] = len(background) > 1  # a sigmoid has none
            self._clear_non_finite(source, unit, rows, part, reduce(background).numpy())
        take(rows, part)

    def last_notes(self) -> list[str]:
        """Return what is known only when all parts of the image are predicted."""
        count = self._known.non_finite
        if not count:
            return []
        if count == 1:
            return ["1 pixel is NaN or infinite; it is background."]
        return [f"{count} pixels are NaN or infinite; they are background."]

    def _open(self, index: int) -> Future[tuple[Source, Scaling]]:
        return self.submit(self._open_unit, self.units[index])

    def _open_unit(self, unit: Mapping[str, int]) -> tuple[Source, Scaling]:
        """Read a unit if it is lazy and small, and fit the normalisation."""
        how = self.model.passport.normalization
        source = self._read_part(unit) if self._is_part else self.source.in_memory(unit)
        of_plane = how.scope == "plane"
        key = tuple(unit.values()) if of_plane else ()
        scalings = self._known.scalings
        if key not in scalings:
            # What was read holds all that is needed if there is nothing else.
            only = len(self.units) == 1 and not self.source.loop
            is_all = not self._is_part and (of_plane or only)
            fitted = source if is_all else self.source
            count = self._machine.backend.transfers.count
            scalings[key] = fitted.scaling(how, unit if of_plane else None, count)
            if not of_plane and not scalings[key].gain.any():
                self.notes.append("The image is constant: nothing can be found in it.")
        return source, scalings[key]

    def _read_part(self, unit: Mapping[str, int]) -> Source:
        """Read at once what the tiles of a part need of a lazy image."""
        boxes = [self._plan.input_box(tile)[:2] for tile in self._plan.tiles]
        start = np.min([box[0] for box in boxes], axis=0).tolist()
        stop = np.max([box[1] for box in boxes], axis=0).tolist()
        return self.source.windowed(unit, *self._grid.reach(start, stop))

    def _read(
        self, source: Source, scaling: Scaling, unit: Mapping[str, int], tile: Tile
    ) -> Tensor:
        """Read what a tile needs, and bring it to the device."""
        start, stop, _ = self._plan.input_box(tile)
        pixels = self._grid.read(source, scaling, unit, start, stop)
        return self._machine.backend.transfers.upload(*pixels)

    def _clear_non_finite(
        self,
        source: Source,
        unit: Mapping[str, int],
        rows: slice,
        part: NDArray,
        background: NDArray,
    ) -> None:
        """Make pixels background where any channel is NaN or infinite."""
        start = [wanted.start for wanted in self._wanted]
        stop = [wanted.stop for wanted in self._wanted]
        step = max(1, (1 << 24) // math.prod(part.shape[2:]))
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            low, high = [start[0] + first, *start[1:]], [start[0] + last, *stop[1:]]
            bad = ~np.isfinite(source.read(unit, low, high)).all(axis=0)
            if bad.any():
                part[:, first - rows.start : last - rows.start][:, bad] = background
                self._known.non_finite += int(bad.sum())

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run something beside the prediction; see `wait_steps`."""
        return self._machine.submit(function, *args)

    def wait_steps(
        self, future: Future[Result], index: int
    ) -> Generator[Progress, None, Result]:
        """Wait for what `submit` gave, after all tiles of a unit, with heartbeats."""
        return (yield from self._heartbeats(future, index, len(self._plan.tiles)))

    def _heartbeats(
        self, future: Future[Result], index: int, done: int
    ) -> Generator[Progress, None, Result]:
        yield from heartbeats([future], lambda: self._progress(index, done))
        return future.result()

    def _progress(self, index: int, done: int, note: str = "") -> Progress:
        before = index * len(self._plan.tiles)
        number = min(before + done + 1, self.total)
        message = f"tile {number} of {self.total}"
        return Progress(before + done, self.total, message, note)

    def close(self) -> None:
        """End everything that still runs, without waiting for it."""
        self._machine.close()
