"""The tile engine: from an image to probabilities, exactly, with progress.

The result is that of the network run once on the whole image, mirrored at its
edges: it does not depend on the tile size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, wait
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from napari_unet.errors import BadInput
from napari_unet.inference.assembly import Blend, Strips
from napari_unet.inference.backends import Backend, Precision, choose_device
from napari_unet.inference.classify import keep_all
from napari_unet.inference.grid import Grid
from napari_unet.inference.machine import Machine
from napari_unet.inference.opener import Opener
from napari_unet.inference.plan import TilePlan
from napari_unet.inference.source import open_source
from napari_unet.inference.tile_run import TileRun, result_steps
from napari_unet.network.program_config import ProgramConfig
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.inference.assembly import Assembly, Part
    from napari_unet.inference.classify import Reduction
    from napari_unet.inference.opener import Box, Opened
    from napari_unet.inference.tiling import Tile
    from napari_unet.models.model import Model

Result = TypeVar("Result")


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
        if isinstance(config, ProgramConfig):
            config.check_turned(test_time_augmentation)
        self._augment = test_time_augmentation
        self._tile_shape = self._check_tile_shape(tile_shape)
        sizes = self._check_pixel_size(pixel_size)
        factors = model.rescaling(sizes)
        if factors:
            self.notes.append(model.describe_fit(sizes).capitalize() + ".")
        self._grid = Grid.over(self.source.spatial_shape, factors)
        chosen = choose_device(device).that_runs(model.network)
        backend_on = partial(
            Backend, model.network, precision=precision, memory_limit=memory_limit
        )
        self._machine = Machine(backend_on, chosen.name)
        self.notes += [note for note in (chosen.note, self._machine.note) if note]
        self._opener = Opener(
            self.source,
            self._grid,
            model.passport.normalization,
            lambda values: self._machine.backend.transfers.count(values),
            self.notes.append,
            self._machine.submit,
        )
        self._is_part = False
        try:
            self._set_tiles()
        except BaseException:
            self.close()
            raise
        if model.inexact_reason and len(self._plan.tiles) > 1:
            self.notes.append(
                "The tiles are blended, so that the result depends a little on the "
                f"tile size: {model.inexact_reason}."
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

    def _check_tile_shape(self, shape: Sequence[int] | None) -> Sequence[int] | None:
        if shape is not None and (
            np.shape(shape) != (self.model.ndim,) or min(shape) < 1
        ):
            raise BadInput(
                f"tile_shape={shape} does not name {self.model.ndim} positive sides "
                f"for {self.source.spatial}."
            )
        return shape

    def _check_pixel_size(self, sizes: Mapping[str, float] | None) -> dict[str, float]:
        if sizes is not None and not isinstance(sizes, Mapping):
            raise BadInput(
                f"pixel_size={sizes} does not name the axes; give micrometres for "
                'each, for example {"Y": 0.3, "X": 0.3}.'
            )
        return dict(sizes or {})

    def _set_tiles(self) -> None:
        self._wanted = [self.region[axis] for axis in self.source.spatial]
        self._opening: dict[int, Future[Opened]] = {}
        self._plan = TilePlan(
            self.model.network.config,
            self._grid.region(self._wanted),
            self._grid.shape,
            tile_shape=self._tile_shape,
            max_input_pixels=self._machine.max_input_pixels,
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
        yield from self._note_steps(index, 0)
        opening = self._opening.pop(index, None) or self._open(index)
        opened = yield from result_steps(opening, partial(self._progress, index, 0))
        if index + 1 < len(self.units):  # read while this one is computed
            self._opening[index + 1] = self._open(index + 1)
        hand_on = partial(self._hand_on, opened, reduce, take)
        parts = self._part_steps(opened, index, reduce)
        handing: Future[None] | None = None
        try:
            # Closed before what is handed on is waited for.
            with closing(parts):
                for item in parts:
                    if isinstance(item, Progress):
                        yield item
                        continue
                    if handing is not None:
                        yield from self.wait_steps(handing, index)
                    handing = self.submit(hand_on, *item)
                    del item
            assert handing is not None
            yield from self.wait_steps(handing, index)
        finally:
            # Nothing may be written into files that are being removed.
            if handing is not None and not handing.cancel():
                wait([handing])
        if index == len(self.units) - 1 and not self._is_part:
            self.notes += self.last_notes()
        yield from self._note_steps(index, len(self._plan.tiles))

    @property
    def _is_whole(self) -> bool:
        """Whether nothing can be handed on before all tiles are there."""
        return self._grid.rescales or self._plan.is_blended

    def _part_steps(
        self, opened: Opened, index: int, reduce: Reduction
    ) -> Generator[Progress | Part, None, None]:
        """Predict the tiles, and yield parts of the grid as soon as they are complete.

        They are reduced, but not if they have to be whole.
        """
        plan = self._plan
        assembly: Assembly = Strips(plan.region, plan.tiles)
        if self._is_whole:
            assembly = Blend(plan.region, self._grid.shape, plan.is_blended)
        read = partial(self._upload, opened)
        kept = keep_all if self._is_whole else reduce
        run = TileRun(self._machine, plan, read, kept, augment=self._augment)
        with closing(run.steps(partial(self._progress, index))) as tiles:
            for item in tiles:
                if isinstance(item, Progress):
                    yield item
                else:
                    yield from assembly.add(*item)
        assembly.check_complete()

    def _hand_on(
        self,
        opened: Opened,
        reduce: Reduction,
        take: Callable[[slice, NDArray], None],
        rows: slice,
        part: NDArray,
    ) -> None:
        """Give what is complete to who wants it."""
        if self._is_whole:
            part = self._grid.back(part, self._wanted)
            rows = slice(0, part.shape[1])
            part = reduce(torch.from_numpy(part)).numpy()
        if opened.source.dtype.kind == "f":
            background = torch.zeros(self.output_shape[0], 1)
            background[0] = len(background) > 1  # a sigmoid has none
            start = [wanted.start for wanted in self._wanted]
            start[0] += rows.start
            cleared = reduce(background).numpy()
            self._opener.clear_non_finite(opened, part, start, cleared)
        take(rows, part)

    def last_notes(self) -> list[str]:
        """Return what is known only when all parts of the image are predicted."""
        count = self._opener.non_finite
        if not count:
            return []
        if count == 1:
            return ["1 pixel is NaN or infinite; it is background."]
        return [f"{count} pixels are NaN or infinite; they are background."]

    def _open(self, index: int) -> Future[Opened]:
        box = self._reach() if self._is_part else None
        return self.submit(self._opener.open, self.units[index], box)

    def _reach(self) -> Box:
        """Return the box of the image that the tiles of this part are made of."""
        boxes = [self._plan.input_box(tile)[:2] for tile in self._plan.tiles]
        start = np.min([box[0] for box in boxes], axis=0).tolist()
        stop = np.max([box[1] for box in boxes], axis=0).tolist()
        return self._grid.reach(start, stop)

    def _upload(self, opened: Opened, tile: Tile) -> Tensor:
        """Read what a tile needs, and bring it to the device."""
        start, stop, _ = self._plan.input_box(tile)
        return self._machine.backend.transfers.upload(*opened.read(start, stop))

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run something beside the prediction; see `wait_steps`."""
        return self._machine.submit(function, *args)

    def submit_steps(self, steps: Generator[Any, None, Result]) -> Future[Result]:
        """Run a generator beside the prediction, at most until that is closed."""
        return self._machine.submit_steps(steps)

    def wait_steps(
        self, future: Future[Result], index: int
    ) -> Generator[Progress, None, Result]:
        """Wait for what `submit` gave, after all tiles of a unit, with heartbeats."""
        tick = partial(self._progress, index, len(self._plan.tiles))
        return result_steps(future, tick)

    def _note_steps(self, index: int, done: int) -> Generator[Progress, None, None]:
        """Say what was not said yet."""
        while self.notes:
            yield self._progress(index, done, self.notes.pop(0))

    def _progress(self, index: int, done: int, note: str = "") -> Progress:
        before = index * len(self._plan.tiles)
        number = min(before + done + 1, self.total)
        message = f"tile {number} of {self.total}"
        return Progress(before + done, self.total, message, note)

    def release(self) -> None:
        """Give the network's working memory back, until the next tile."""
        self._machine.backend.release()

    def close(self) -> None:
        """End everything that still runs, without waiting for it."""
        self._machine.close()
