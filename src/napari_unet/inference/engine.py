"""The tile engine: from an image to probabilities, exactly, with progress.

The result is that of the network run once on the whole image, mirrored at its
edges: it does not depend on the tile size.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

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
    choose_tile_shape,
    input_box,
    round_up,
    tile_grid,
)
from napari_unet.network.receptive_field import receptive_field
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.models.model import Model
    from napari_unet.models.normalize import Scaling

HEARTBEAT = 0.25  # seconds between two yields within a tile
MIN_TILE = 64  # pixels; smaller tiles are all halo


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
        self.field = receptive_field(model.network.config)
        self._precision = precision
        self._augment = test_time_augmentation
        chosen = choose_device(device)
        self.notes += [chosen.note] if chosen.note else []
        self._backend = Backend(model.network, chosen.name, precision)
        self._scaling: Scaling | None = None
        self._non_finite = 0
        self._tiles_were_split = False
        factors = model.rescaling(dict(pixel_size or {}))
        if factors:
            fit = model.describe_fit(dict(pixel_size or {}))
            self.notes.append(fit.capitalize() + ".")
        self._grid = Grid.over(self.source.spatial_shape, factors)
        self._wanted = [self.region[axis] for axis in self.source.spatial]
        self._grid_region = self._grid.region(self._wanted)
        self._set_tiles(tile_shape)
        self._pool = ThreadPoolExecutor(2, "napari-unet")

    def _set_tiles(self, tile_shape: Sequence[int] | None) -> None:
        shape = [part.stop - part.start for part in self._grid_region]
        if tile_shape is None:
            budget = self._backend.max_input_pixels
            tile_shape = choose_tile_shape(shape, self.field, budget)
        elif np.shape(tile_shape) != (self.model.ndim,) or min(tile_shape) < 1:
            raise BadInput(
                f"tile_shape={tile_shape} does not name {self.model.ndim} "
                f"positive sides for {self.source.spatial}."
            )
        self.tile_shape = tuple(round_up(n, self.field.alignment) for n in tile_shape)
        self._tiles = tile_grid(
            self._grid_region, self.tile_shape, self.field.alignment
        )
        self._overlap = (0,) * self.model.ndim
        if self.model.inexact_reason and len(self._tiles) > 1:
            self.notes.append(
                "The tiles are blended, so that the result depends a little on the "
                f"tile size: {self.model.inexact_reason}."
            )
            self._overlap = tuple(
                min(round_up(max(self.field.halo), self.field.alignment), n // 2)
                for n in self.tile_shape
            )

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
        reading = self._pool.submit(self._open_unit, unit)
        source, scaling = yield from self._heartbeats(reading, index, 0)
        probabilities = yield from self._tile_steps(source, scaling, unit, index)
        if self._grid.rescales:
            working = self._pool.submit(self._grid.back, probabilities, self._wanted)
            done = len(self._tiles)
            probabilities = yield from self._heartbeats(working, index, done)
        if source.image.dtype.kind == "f":
            self._clear_non_finite(source, unit, probabilities)
        if index == len(self.units) - 1 and self._non_finite:
            self.notes.append(
                f"{self._non_finite} pixels are NaN or infinite; they are background."
            )
        while self.notes:
            yield self._progress(index, len(self._tiles), note=self.notes.pop(0))
        return probabilities

    def _open_unit(self, unit: Mapping[str, int]) -> tuple[Source, Scaling]:
        how = self.model.passport.normalization
        source = self.source.in_memory(unit)
        if how.scope == "plane":
            return source, source.scaling(how, unit)
        if self._scaling is None:
            only = source is not self.source and len(self.units) == 1
            whole = only and not self.source.loop
            self._scaling = (source if whole else self.source).scaling(how, None)
            if not self._scaling.gain.any():
                self.notes.append("The image is constant: nothing can be found in it.")
        return source, self._scaling

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
        while waiting:
            done = len(self._tiles) - len(waiting)
            tile = waiting.popleft()
            computing = self._pool.submit(self._predict, source, scaling, unit, tile)
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

    def _predict(
        self, source: Source, scaling: Scaling, unit: Mapping[str, int], tile: Tile
    ) -> tuple[Tile, NDArray[np.float32]]:
        """Read and predict one tile; with it return the box that is kept of it."""
        kept = tile.grown(self._overlap, self._grid_region)
        start, stop, offset = input_box(kept, self.field, symmetric=self._augment)
        pixels = self._grid.read(source, scaling, unit, start, stop)
        if self._augment:
            turns = [_turned(self._backend, pixels, k, flip) for k, flip in EIGHT]
            probabilities = np.mean(turns, axis=0)
        else:
            probabilities = self._backend.run(pixels)
        box = tuple(slice(o, o + n) for o, n in zip(offset, kept.shape, strict=True))
        return kept, probabilities[(slice(None), *box)]

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
                self._non_finite += int(bad.sum())

    def _make_room(self, tile: Tile, waiting: deque[Tile]) -> str:
        """After memory ran out: halve what is left, or leave the GPU."""
        self._backend.empty_cache()
        device = self._backend.device.type
        if max(tile.shape) > max(MIN_TILE, self.field.alignment):
            halves = tile.halved(self.field.alignment)
            if halves:
                longest = max(tile.shape)
                rest = self._halve([tile, *waiting], longest)
                waiting.clear()
                waiting.extend(rest)
                # The units to come are cut in the same way.
                self._tiles = self._halve(self._tiles, longest)
                said, self._tiles_were_split = self._tiles_were_split, True
                note = f"Memory ran out on {device}; going on with smaller tiles."
                return "" if said else note
        if device == "cpu":
            raise OutOfMemory(
                "Memory ran out even for the smallest tile. Close other programs or "
                "use a smaller model."
            )
        waiting.appendleft(tile)
        self._backend = Backend(self.model.network, "cpu", self._precision)
        return f"Memory ran out on {device}; going on on the CPU, which is slower."

    def _halve(self, tiles: Sequence[Tile], longest: int) -> list[Tile]:
        """Halve those tiles that are as long as the one that was too large."""
        halved: list[Tile] = []
        for tile in tiles:
            is_small = max(tile.shape) < longest
            both = None if is_small else tile.halved(self.field.alignment)
            halved.extend([tile] if both is None else both)
        return halved

    def _heartbeats(
        self, future: Future[Any], index: int, done: int
    ) -> Generator[Progress, None, Any]:
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
        self._backend.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)


EIGHT = [(k, flip) for flip in (False, True) for k in range(4)]


def _turned(
    backend: Backend, pixels: NDArray[np.float32], quarters: int, flip: bool
) -> NDArray[np.float32]:
    """Predict a rotated and flipped tile, and turn the result back."""
    turned = np.rot90(pixels, quarters, axes=(-2, -1))
    if flip:
        turned = turned[..., ::-1]
    result = backend.run(turned)
    if flip:
        result = result[..., ::-1]
    return np.rot90(result, -quarters, axes=(-2, -1))


class PredictOptions(TypedDict, total=False):
    """The keyword arguments of `Predictor`, which see."""

    axes: str | None
    channels: Sequence[int] | None
    region: Mapping[str, slice] | None
    device: str
    tile_shape: Sequence[int] | None
    precision: Precision
    test_time_augmentation: bool
    pixel_size: Mapping[str, float] | None


def predict_steps(
    image: Any, model: Model, **options: Unpack[PredictOptions]
) -> Generator[Progress, None, NDArray[np.float32]]:
    """Predict the probabilities of every class; see `predict`."""
    predictor = Predictor(image, model, **options)
    try:
        result = np.empty(predictor.output_shape, dtype=np.float32)
        for index, unit in enumerate(predictor.units):
            probabilities = yield from predictor.unit_steps(index)
            place = (slice(None), *predictor.place(unit))
            result[place] = predictor.to_output(probabilities)
        return result
    finally:
        predictor.close()


def predict(
    image: Any, model: Model, **options: Unpack[PredictOptions]
) -> NDArray[np.float32]:
    """Predict the probabilities of every class, tile by tile and exactly.

    A network of planes goes through a stack plane by plane. The result does not
    depend on the tile size, unless the model says why (`Model.inexact_reason`).

    Parameters
    ----------
    image : array
        numpy, dask or zarr; any real dtype. NaN and infinity become background.
    model : Model
        From `load_model`, or ``Model(UNet(...))``.
    **options
        axes : str, e.g. "TCZYX"; by default "YX", "ZYX" or "TZYX".
        channels : which channels of the image the model gets.
        region : mapping of axis letter to slice; everything by default.
        device : "auto", "cpu", "cuda" or "mps".
        tile_shape : sides of a tile; chosen by memory by default.
        precision : "auto" or "float32".
        test_time_augmentation : average over 8 flips and rotations.
        pixel_size : mapping of axis letter to µm, for rescaling.

    Returns
    -------
    float32 array of shape (class, *axes of the image without channels)
        Sums to 1 over the classes; for a network with one output its sigmoid.

    Raises
    ------
    BadInput
        If image, axes or channels do not fit the model.
    OutOfMemory
        If not even the smallest tile fits.
    """
    return run_to_end(predict_steps(image, model, **options))
