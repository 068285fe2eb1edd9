"""Size, place, shape and brightness of every object, in pixels and micrometres."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.errors import BadInput
from napari_unet.files.hull import Outline
from napari_unet.files.source import pixels_size
from napari_unet.files.stack import BAND_ROWS, STACK_AXES, Stack
from napari_unet.files.sums import merge, sum_pixels
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Generator,
        Iterator,
        Mapping,
        Sequence,
    )

    from numpy.typing import NDArray

    from napari_unet.files.sums import Sums

ZYX = tuple(STACK_AXES.index(axis) for axis in "ZYX")

# What is read at once: a plane of 5800² or a part of a larger one.
PIECE_PIXELS = 2**25
# Objects between two ticks.
OBJECTS = 250

COLOURS = ("red", "green", "blue")


def measure_steps(
    labels: Any,
    image: Any,
    write: Callable[[dict[str, NDArray[Any]]], None],
    *,
    label_axes: str,
    image_axes: str,
    pixel_size: Mapping[str, float] | None = None,
    channel_names: Sequence[str] = (),
    ndim: int = 2,
    regions: Collection[int] = (),
) -> Generator[Progress, None, None]:
    """Measure every object in every plane, or in every volume.

    The numbers are those of scikit-image's ``regionprops_table``. Arrays of any kind
    are read piece by piece, so that memory does not depend on their size; only on
    the number of objects in one plane or volume.

    Parameters
    ----------
    labels : array
        Whole numbers; 0 is the background.
    image : array
        On the same grid. Pixels that are not finite are left out.
    write : callable
        Gets the table of each plane or volume, one after the other, as a dict of
        arrays. Its columns, the same each time, have a row for each label:
        ``frame`` and ``plane`` (from 0, where there are such axes), ``label``, size
        (``area_px`` or ``volume_vx``), centroid, bounding box (its end is one
        beyond), equivalent diameter, ``eccentricity`` in planes, ``solidity``, and
        mean, min, max and integrated intensity of each channel. Lengths are in
        pixels (``_px``) and, where the pixel size is known, also in micrometres
        (``_um``, ``_um2``, ``_um3``). What cannot be told is NaN.
    label_axes : str
        One letter for each dimension of the labels out of ``"TZYX"``.
    image_axes : str
        The same for the image, out of ``"TCZYXS"``. Of RGBA the A is left out.
    pixel_size : mapping, optional
        Axis letter to micrometres.
    channel_names : sequence of str, optional
        Names for the channels along C; numbers from 0 otherwise.
    ndim : int, optional
        Whether an object lies in one plane (2) or in a volume (3).
    regions : collection of int, optional
        Labels that are classes and not objects. They have no shape.

    Yields
    ------
    Progress
        Over the planes or volumes.

    Raises
    ------
    BadInput
        When labels and image do not have the same size, or a part of a lazy image
        is damaged.
    """
    grid = Stack(labels, label_axes)
    pixels = _Pixels(image, image_axes, channel_names)
    _check_same_grid(grid, pixels)
    size = {axis: (pixel_size or {}).get(axis, math.nan) for axis in "ZYX"[-ndim:]}
    loops = {"frame": "T", "plane": "Z"} if ndim == 2 else {"frame": "T"}
    units = list(_units(grid.shape, ndim))
    for number, unit in enumerate(units):
        tick = Progress(number, len(units), f"measuring {number + 1} of {len(units)}")
        table = yield from _unit_steps(grid, pixels, unit, size, regions, tick)
        where = {
            name: np.full(table["label"].size, unit[STACK_AXES.index(axis)].start)
            for name, axis in loops.items()
            if axis in label_axes
        }
        write({**where, **table})


def measure(labels: Any, image: Any, **options: Any) -> dict[str, NDArray[Any]]:
    """Measure every object: the blocking form of :func:`measure_steps`, in memory.

    Parameters
    ----------
    labels, image : array
        On the same grid.
    **options
        Those of :func:`measure_steps`.

    Returns
    -------
    dict of str to array
        The tables of all planes or volumes in one.
    """
    tables: list[dict[str, NDArray[Any]]] = []
    run_to_end(measure_steps(labels, image, tables.append, **options))
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


class _Pixels:
    """The channels of an image on the grid of its labels."""

    def __init__(self, image: Any, axes: str, channel_names: Sequence[str]) -> None:
        self._image = image
        self._axes = axes
        self.lengths = dict(zip(axes, image.shape, strict=True))
        self.is_whole = np.dtype(image.dtype).kind in "bui"
        channels = [*channel_names]
        if "C" in axes:
            channels += map(str, range(len(channels), self.lengths["C"]))
        # An alpha channel says nothing of the object.
        colours = COLOURS if "S" in axes else ("",)
        pairs = itertools.product(channels or [""], colours)
        self.names = ["_".join(filter(None, pair)) for pair in pairs]
        if len(set(self.names)) < len(self.names):
            self.names = [f"{name}_{i}" for i, name in enumerate(self.names)]

    def read(self, piece: Sequence[slice]) -> NDArray[Any]:
        """Return a region as an array of channel, Z, Y and X."""
        wanted = dict(zip(STACK_AXES, piece, strict=True))
        wanted |= {"C": slice(None), "S": slice(len(COLOURS))}
        part = np.asarray(self._image[tuple(wanted[axis] for axis in self._axes)])
        order = [self._axes.index(axis) for axis in "TCSZYX" if axis in self._axes]
        missing = [i for i, axis in enumerate("TCSZYX") if axis not in self._axes]
        block = np.expand_dims(part.transpose(order), missing)
        return np.ascontiguousarray(block.reshape(-1, *block.shape[3:]))


def _unit_steps(
    grid: Stack,
    pixels: _Pixels,
    unit: tuple[slice, ...],
    size: Mapping[str, float],
    regions: Collection[int],
    tick: Progress,
) -> Generator[Progress, None, dict[str, NDArray[Any]]]:
    """Measure what lies in one plane or volume."""
    parts = []
    for piece in _pieces(unit):
        yield tick
        start = [piece[i].start for i in ZYX]
        parts.append(sum_pixels(_volume(grid, piece), pixels.read(piece), start))
    sums = merge(parts)
    is_object = ~np.isin(sums.labels, list(regions))
    table = _size_and_place(sums, size)
    if len(size) == 2:
        shape = sums.eccentricity(*(size.values() if _is_known(size) else (1.0, 1.0)))
        table["eccentricity"] = np.where(is_object, shape, math.nan)
    table["solidity"] = yield from _solidity_steps(
        grid, unit, sums, is_object, len(size), tick
    )
    return {**table, **_brightness(sums, pixels)}


def _is_known(size: Mapping[str, float]) -> bool:
    return not math.isnan(math.prod(size.values()))


def _check_same_grid(grid: Stack, pixels: _Pixels) -> None:
    labelled = dict(zip(STACK_AXES, grid.shape, strict=True))
    shown = {axis: pixels.lengths.get(axis, 1) for axis in "TZYX"}
    if any(labelled[axis] != length for axis, length in shown.items()):
        raise BadInput(
            f"The labels of {pixels_size(grid.stored_shape)} ({grid.stored_axes}) do "
            f"not fit the image, which has {shown}; they must cover the same pixels."
        )


def _units(shape: tuple[int, ...], ndim: int) -> Iterator[tuple[slice, ...]]:
    """Yield the planes, or volumes, in which objects lie: slices along TZCYX."""
    times, depth, _, height, width = shape
    thick = 1 if ndim == 2 else depth
    for t, z in itertools.product(range(times), range(0, depth, thick)):
        yield (
            *(slice(t, t + 1), slice(z, z + thick), slice(0, 1)),
            *(slice(0, height), slice(0, width)),
        )


def _pieces(unit: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """Divide a plane or volume into what is read at once."""
    t, deep, c, rows, columns = unit
    width, height = columns.stop, rows.stop
    # Whole planes if they fit, otherwise bands of rows that are whole chunks.
    thick = max(1, PIECE_PIXELS // (width * height))
    band = height
    if width * height > PIECE_PIXELS:
        band = max(1, PIECE_PIXELS // width // BAND_ROWS) * BAND_ROWS
    for z, y in itertools.product(
        range(deep.start, deep.stop, thick), range(0, height, band)
    ):
        last_z, last_y = min(z + thick, deep.stop), min(y + band, height)
        yield t, slice(z, last_z), c, slice(y, last_y), columns


def _volume(grid: Stack, piece: Sequence[slice]) -> NDArray[Any]:
    """Read the labels of a piece as an array of Z, Y and X."""
    return np.ascontiguousarray(grid.read(piece)[0, :, 0])


def _solidity_steps(
    grid: Stack,
    unit: tuple[slice, ...],
    sums: Sums,
    is_object: NDArray[Any],
    ndim: int,
    tick: Progress,
) -> Generator[Progress, None, NDArray[Any]]:
    """Measure the solidity of each object in its bounding box."""
    result = np.full(sums.labels.size, math.nan)
    low, stop = sums.low, sums.high + 1
    # A box that is larger than what is read at once would not fit.
    is_small = (stop - low).prod(axis=1) <= PIECE_PIXELS
    left = np.flatnonzero(is_object & is_small)
    outlines: dict[int, Outline] = {}
    flat = 3 - ndim
    for piece in _pieces(unit):
        start = np.array([piece[i].start for i in ZYX])
        end = np.array([piece[i].stop for i in ZYX])
        left = left[stop[left, 0] > start[0]]
        met = left[((low[left] < end) & (stop[left] > start)).all(axis=1)]
        if not met.size:
            continue
        part = _volume(grid, piece)
        firsts, lasts = np.maximum(low[met], start), np.minimum(stop[met], end)
        for number, i in enumerate(met.tolist()):
            if number % OBJECTS == 0:
                yield tick
            box = tuple(map(slice, firsts[number] - start, lasts[number] - start))
            mask = (part[box] == sums.labels[i])[(0,) * flat]
            # An object may reach on into the next pieces.
            outline = outlines.pop(i, None) or Outline((stop[i] - low[i])[flat:])
            outline.add(mask, (firsts[number] - low[i])[flat:])
            if (stop[i] <= end).all():
                result[i] = outline.solidity()
            else:
                outlines[i] = outline
    return result


def _size_and_place(sums: Sums, size: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    """Make the columns of what can be said without the image."""
    ndim = len(size)
    axes = [axis.lower() for axis in size]
    what, px, um = ("area", "px", "um2") if ndim == 2 else ("volume", "vx", "um3")
    micrometres = sums.count * math.prod(size.values())
    table = {"label": sums.labels, f"{what}_{px}": sums.count}
    if _is_known(size):
        table[f"{what}_{um}"] = micrometres
    for axis, centre in zip(axes, sums.centre.T[-ndim:], strict=True):
        table[f"centroid_{axis}_px"] = centre
    if _is_known(size):
        for axis, centre in zip(axes, sums.centre.T[-ndim:], strict=True):
            table[f"centroid_{axis}_um"] = centre * size[axis.upper()]
    for axis, low in zip(axes, sums.low.T[-ndim:], strict=True):
        table[f"bbox_{axis}_min_px"] = low
    for axis, high in zip(axes, sums.high.T[-ndim:], strict=True):
        table[f"bbox_{axis}_max_px"] = high + 1
    table["equivalent_diameter_px"] = _diameter(sums.count, ndim)
    if _is_known(size):
        table["equivalent_diameter_um"] = _diameter(micrometres, ndim)
    return table


def _diameter(content: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Return the diameter of a circle or ball of some area or volume."""
    result: NDArray[Any] = (2 * ndim * content / math.pi) ** (1 / ndim)
    return result


def _brightness(sums: Sums, pixels: _Pixels) -> dict[str, NDArray[Any]]:
    table = {}
    for i, name in enumerate(pixels.names):
        nothing = sums.finite[:, i] == 0
        mean = sums.total[:, i] / np.where(nothing, 1, sums.finite[:, i])
        columns = {
            "mean": mean,
            "min": sums.smallest[:, i],
            "max": sums.largest[:, i],
            "integrated": sums.total[:, i],
        }
        for what, values in columns.items():
            column = np.where(nothing, math.nan, values)
            if pixels.is_whole and what != "mean":
                column = column.astype(np.int64)
            table[f"{what}_intensity" + (f"_{name}" if name else "")] = column
    return table
