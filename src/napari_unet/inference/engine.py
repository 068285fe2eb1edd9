"""The tile engine: from an image to probabilities, exactly, with progress.

The result is that of the network run once on the whole image, mirrored at its
edges: it does not depend on the tile size.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from napari_unet.errors import BadInput, OutOfMemory
from napari_unet.inference.backends import (
    Backend,
    Precision,
    choose_device,
    is_out_of_memory,
)
from napari_unet.inference.grid import Grid
from napari_unet.inference.source import Source, open_source
from napari_unet.inference.tiling import (
    Tile,
    blending_window,
    centred_input_box,
    choose_tile_shape,
    halve_longest,
    input_box,
    round_up,
    tile_grid,
)
from napari_unet.network.config import ProgramConfig
from napari_unet.network.receptive_field import receptive_field
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.models.model import Model
    from napari_unet.models.normalize import Scaling

Result = TypeVar("Result")

HEARTBEAT = 0.25  # seconds between two yields within a tile
MIN_TILE = 64  # pixels; smaller tiles are all halo


@dataclass
class _Shared:
    """What the parts of one prediction have in common."""

    backend: Backend
    pool: ThreadPoolExecutor
    # Of the whole image under (), of a plane under its place in the loop.
    scalings: dict[tuple[int, ...], Scaling] = field(default_factory=dict)
    non_finite: int = 0
    longest_side: int | None = None  # of a tile, once memory ran out


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
    ):
        self.model = model
        self.source, self.notes = open_source(image, model, axes, channels)
        self.region = self.source.full_region(region)
        self.units = list(self.source.units(self.region))
        config = model.network.config
        self.field = receptive_field(config)
        self._fixed: ProgramConfig | None = None  # takes inputs of one shape only
        if isinstance(config, ProgramConfig) and config.fixed_shape:
            self._fixed = config
            config.check_turned(test_time_augmentation)
        self._precision = precision
        self._augment = test_time_augmentation
        chosen = choose_device(device).that_runs(model.network)
        self.notes += [chosen.note] if chosen.note else []
        backend = Backend(model.network, chosen.name, precision)
        self._is_part = False
        factors = model.rescaling(dict(pixel_size or {}))
        if factors:
            fit = model.describe_fit(dict(pixel_size or {}))
            self.notes.append(fit.capitalize() + ".")
        self._grid = Grid.over(self.source.spatial_shape, factors)
        self._given_tile_shape = tile_shape
        self._shared = _Shared(backend, ThreadPoolExecutor(3, "napari-unet"))
        try:
            self._set_tiles()
        except BaseException:
            self.close()
            raise
        if self.model.inexact_reason and len(self._tiles) > 1:
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
        self._grid_region = self._grid.region(self._wanted)
        shape = [part.stop - part.start for part in self._grid_region]
        tile_shape = self._given_tile_shape
        if self._fixed is not None:
            tile_shape = self._fixed.tile_shape(self._grid_region, self._grid.shape)
        elif tile_shape is None:
            budget = self._shared.backend.max_input_pixels
            tile_shape = choose_tile_shape(shape, self.field, budget)
        elif np.shape(tile_shape) != (self.model.ndim,) or min(tile_shape) < 1:
            raise BadInput(
                f"tile_shape={tile_shape} does not name {self.model.ndim} "
                f"positive sides for {self.source.spatial}."
            )
        longest = self._shared.longest_side or max(tile_shape)
        self.tile_shape = tuple(
            round_up(min(n, longest), self.field.alignment) for n in tile_shape
        )
        self._tiles = tile_grid(
            self._grid_region, self.tile_shape, self.field.alignment
        )
        self._overlap = (0,) * self.model.ndim
        if self.model.inexact_reason and len(self._tiles) > 1:
            halo = round_up(max(self.field.halo), self.field.alignment)
            overlap = (halo,) * self.model.ndim
            if self._fixed is not None:
                overlap = self._fixed.overlaps
            self._overlap = tuple(
                min(n, side // 2)
                for n, side in zip(overlap, self.tile_shape, strict=True)
            )

    @property
    def computed_by(self) -> str:
        """What runs the network now, and how precisely: "cpu, OpenVINO, bfloat16"."""
        backend = self._shared.backend
        return f"{backend.device}, {backend.title}"

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(class, *axes of the image without channels)."""
        sides = [self.region[axis] for axis in self.source.output_axes]
        classes = self.model.network.config.num_classes
        return classes, *[part.stop - part.start for part in sides]

    def place(self, unit: Mapping[str, int]) -> tuple[int | slice, ...]:
        """Index of a unit in an output without the class axis."""
        return tuple(
            unit[axis] - self.region[axis].start if axis in unit else slice(None)
            for axis in self.source.output_axes
        )

    def to_output(self, unit_probabilities: NDArray) -> NDArray:
        """Bring a unit's spatial axes into the order of the image's axes."""
        order = [a for a in self.source.output_axes if a in self.source.spatial]
        axes = [1 + self.source.spatial.index(a) for a in order]
        return unit_probabilities.transpose([0, *axes])

    @property
    def total(self) -> int:
        """Number of tiles of all units."""
        return len(self._tiles) * len(self.units)

    def unit_steps(self, index: int) -> Generator[Progress, None, NDArray[np.float32]]:
        """Predict one plane or volume.

        Parameters
        ----------
        index : int
            Into `units`.

        Yields
        ------
        Progress
            Over all tiles of all units.

        Returns
        -------
        float32 array of shape (class, *spatial)
            On the image's grid, in the order of `Source.spatial`.

        Raises
        ------
        OutOfMemory
            If not even the smallest tile fits on the CPU.
        """
        unit = self.units[index]
        while self.notes:
            yield self._progress(index, 0, note=self.notes.pop(0))
        reading = self.submit(self._open_unit, unit)
        source, scaling = yield from self._heartbeats(reading, index, 0)
        probabilities = yield from self._tile_steps(source, scaling, unit, index)
        if self._grid.rescales:
            working = self.submit(self._grid.back, probabilities, self._wanted)
            probabilities = yield from self.wait_steps(working, index)
        if source.dtype.kind == "f":
            self._clear_non_finite(source, unit, probabilities)
        if index == len(self.units) - 1 and not self._is_part:
            self.notes += self.last_notes()
        while self.notes:
            yield self._progress(index, len(self._tiles), note=self.notes.pop(0))
        return probabilities

    def last_notes(self) -> list[str]:
        """Return what is known only when all parts of the image are predicted."""
        count = self._shared.non_finite
        if not count:
            return []
        if count == 1:
            return ["1 pixel is NaN or infinite; it is background."]
        return [f"{count} pixels are NaN or infinite; they are background."]

    def _open_unit(self, unit: Mapping[str, int]) -> tuple[Source, Scaling]:
        """Read a unit if it is lazy and small, and fit the normalisation."""
        how = self.model.passport.normalization
        source = self._read_part(unit) if self._is_part else self.source.in_memory(unit)
        of_plane = how.scope == "plane"
        key = tuple(unit.values()) if of_plane else ()
        scalings = self._shared.scalings
        if key not in scalings:
            # What was read holds all that is needed if there is nothing else.
            only = len(self.units) == 1 and not self.source.loop
            is_all = not self._is_part and (of_plane or only)
            fitted = source if is_all else self.source
            scalings[key] = fitted.scaling(how, unit if of_plane else None)
            if not of_plane and not scalings[key].gain.any():
                self.notes.append("The image is constant: nothing can be found in it.")
        return source, scalings[key]

    def _read_part(self, unit: Mapping[str, int]) -> Source:
        """Read at once what the tiles of a part need of a lazy image."""
        boxes = [self._input_box(tile)[:2] for tile in self._tiles]
        start = np.min([box[0] for box in boxes], axis=0).tolist()
        stop = np.max([box[1] for box in boxes], axis=0).tolist()
        return self.source.windowed(unit, *self._grid.reach(start, stop))

    def _tile_steps(
        self, source: Source, scaling: Scaling, unit: Mapping[str, int], index: int
    ) -> Generator[Progress, None, NDArray[np.float32]]:
        """Predict all tiles of a unit on the model's grid."""
        origin = [part.start for part in self._grid_region]
        shape = [part.stop - part.start for part in self._grid_region]
        classes = self.model.network.config.num_classes
        result = np.zeros((classes, *shape), dtype=np.float32)
        weight = np.zeros(shape, dtype=np.float32) if any(self._overlap) else None
        waiting = deque(self._tiles)
        ahead: dict[Tile, Future[NDArray[np.float32]]] = {}
        while waiting:
            done = len(self._tiles) - len(waiting)
            # The next tile is read while this one is computed.
            ahead = {
                tile: ahead.get(tile)
                or self.submit(self._read, source, scaling, unit, tile)
                for tile in itertools.islice(waiting, 2)
            }
            tile = waiting.popleft()
            computing = self.submit(self._predict, ahead.pop(tile), tile)
            out_of_memory = False
            try:
                kept, probabilities = yield from self._heartbeats(
                    computing, index, done
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
            if out_of_memory:
                # Outside the handler, whose traceback holds the tensors.
                del computing
                note = self._make_room(tile, waiting)
                done = len(self._tiles) - len(waiting)
                yield self._progress(index, done, note=note)
                continue
            box = tuple(
                slice(max(a - o, 0), b - o)
                for a, b, o in zip(kept.start, kept.stop, origin, strict=True)
            )
            if weight is None:
                result[(slice(None), *box)] = probabilities
            else:
                window = blending_window(kept, tile, self._grid.shape)
                result[(slice(None), *box)] += window * probabilities
                weight[box] += window
            yield self._progress(index, done + 1)
        if weight is not None:
            result /= weight
        return result

    def _read(
        self, source: Source, scaling: Scaling, unit: Mapping[str, int], tile: Tile
    ) -> NDArray[np.float32]:
        """Read what a tile needs, normalised."""
        start, stop, _ = self._input_box(tile)
        return self._grid.read(source, scaling, unit, start, stop)

    def _predict(
        self, pixels: Future[NDArray[np.float32]], tile: Tile
    ) -> tuple[Tile, NDArray[np.float32]]:
        """Predict one tile; with it return the box that is kept of it."""
        kept = tile.grown(self._overlap, self._grid_region)
        offset = self._input_box(tile)[2]
        backend = self._shared.backend
        run = backend.run_augmented if self._augment else backend.run
        box = [(o, o + n) for o, n in zip(offset, kept.shape, strict=True)]
        return kept, run(pixels.result(), box)

    def _input_box(
        self, tile: Tile
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        kept = tile.grown(self._overlap, self._grid_region)
        if self._fixed is not None:
            return centred_input_box(kept, self._fixed)
        return input_box(kept, self.field, symmetric=self._augment)

    def _clear_non_finite(
        self, source: Source, unit: Mapping[str, int], probabilities: NDArray
    ) -> None:
        """Make pixels background where any channel is NaN or infinite."""
        start = [part.start for part in self._wanted]
        stop = [part.stop for part in self._wanted]
        rows = max(1, (1 << 24) // math.prod(probabilities.shape[2:]))
        for first in range(start[0], stop[0], rows):
            last = min(first + rows, stop[0])
            pixels = source.read(unit, [first, *start[1:]], [last, *stop[1:]])
            bad = ~np.isfinite(pixels).all(axis=0)
            if bad.any():
                band = probabilities[:, first - start[0] : last - start[0]]
                band[:, bad] = 0
                if len(band) > 1:
                    band[0, bad] = 1
                self._shared.non_finite += int(bad.sum())

    def _make_room(self, tile: Tile, waiting: deque[Tile]) -> str:
        """After memory ran out: halve what is left, or leave the GPU."""
        shared, alignment = self._shared, self.field.alignment
        shared.backend.empty_cache()
        device = shared.backend.device.type
        longest = max(tile.shape)
        can_shrink = self._fixed is None and longest > max(MIN_TILE, alignment)
        if can_shrink and tile.halved(alignment):
            rest = halve_longest([tile, *waiting], longest, alignment)
            waiting.clear()
            waiting.extend(rest)
            # The units and parts to come are cut in the same way.
            self._tiles = halve_longest(self._tiles, longest, alignment)
            said = shared.longest_side is not None
            shared.longest_side = round_up(longest // 2, alignment)
            note = f"Memory ran out on {device}; going on with smaller tiles."
            return "" if said else note
        if device == "cpu":
            raise OutOfMemory(
                "Memory ran out even for the smallest tile. Close other programs or "
                "use a smaller model."
            )
        waiting.appendleft(tile)
        shared.backend.close()
        shared.backend = Backend(self.model.network, "cpu", self._precision)
        return f"Memory ran out on {device}; going on on the CPU, which is slower."

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run something beside the prediction; see `wait_steps`."""
        return self._shared.pool.submit(function, *args)

    def wait_steps(
        self, future: Future[Result], index: int
    ) -> Generator[Progress, None, Result]:
        """Wait for what `submit` gave, after all tiles of a unit, with heartbeats."""
        return (yield from self._heartbeats(future, index, len(self._tiles)))

    def _heartbeats(
        self, future: Future[Result], index: int, done: int
    ) -> Generator[Progress, None, Result]:
        """Wait for a future, yielding so that the caller can cancel."""
        while not wait([future], HEARTBEAT).done:
            yield self._progress(index, done)
        return future.result()

    def _progress(self, index: int, done: int, note: str = "") -> Progress:
        before = index * len(self._tiles)
        number = min(before + done + 1, self.total)
        message = f"tile {number} of {self.total}"
        return Progress(before + done, self.total, message, note)

    def close(self) -> None:
        """End everything that still runs, without waiting for it."""
        self._shared.backend.close()
        self._shared.pool.shutdown(wait=False, cancel_futures=True)
