"""Tile grid, mirrored edges and the blending window. Only numpy; any number of axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from napari_unet.network.program_config import ProgramConfig
    from napari_unet.network.receptive_field import ReceptiveField


@dataclass(frozen=True)
class Tile:
    """A box of the output; ``start`` is included, ``stop`` is not.

    Parameters
    ----------
    start, stop : tuple of int
        In pixels of the image; starts are multiples of the network's alignment.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides in pixels."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def grown(self, overlap: Sequence[int], region: Sequence[slice]) -> Tile:
        """Extend every side by the overlap, but not out of a region."""
        limits = list(zip(overlap, region, strict=True))
        starts = zip(self.start, limits, strict=True)
        stops = zip(self.stop, limits, strict=True)
        return Tile(
            tuple(max(a - n, part.start) for a, (n, part) in starts),
            tuple(min(b + n, part.stop) for b, (n, part) in stops),
        )

    def halved(self, alignment: int) -> tuple[Tile, Tile] | None:
        """Split along the longest side, on the grid; None if it is too small."""
        axis = int(np.argmax(self.shape))
        half = round_up(self.shape[axis] // 2, alignment)
        if half >= self.shape[axis] or half == 0:
            return None
        middle = self.start[axis] + half
        first_stop, second_start = list(self.stop), list(self.start)
        first_stop[axis] = second_start[axis] = middle
        return Tile(self.start, tuple(first_stop)), Tile(tuple(second_start), self.stop)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def tile_grid(
    region: Sequence[slice], tile_shape: Sequence[int], alignment: int
) -> list[Tile]:
    """Cover a region with tiles whose starts lie on the pooling grid.

    Parameters
    ----------
    region : sequence of slice
        Start and stop per axis, in pixels of the image.
    tile_shape : sequence of int
        Sides of a tile, rounded up to the alignment.
    alignment : int
        2**depth of the network.

    Returns
    -------
    list of Tile
        In C order; together they are the region, without overlap.
    """
    spans: list[list[tuple[int, int]]] = []
    for axis, side in zip(region, tile_shape, strict=True):
        step = round_up(max(side, 1), alignment)
        origin = axis.start // alignment * alignment
        edges = range(origin, axis.stop, step)
        spans.append([(max(e, axis.start), min(e + step, axis.stop)) for e in edges])
    tiles = []
    for index in np.ndindex(*[len(span) for span in spans]):
        box = [span[i] for span, i in zip(spans, index, strict=True)]
        tiles.append(Tile(tuple(a for a, _ in box), tuple(b for _, b in box)))
    return tiles


def halve_longest(tiles: Sequence[Tile], longest: int, alignment: int) -> list[Tile]:
    """Halve the tiles that are as long as one that was too large.

    Parameters
    ----------
    tiles : sequence of Tile
        Of any sides.
    longest : int
        Shorter tiles, and those that cannot be halved, stay as they are.
    alignment : int
        2**depth of the network.
    """
    halved: list[Tile] = []
    for tile in tiles:
        is_small = max(tile.shape) < longest
        both = None if is_small else tile.halved(alignment)
        halved.extend([tile] if both is None else both)
    return halved


def input_box(
    tile: Tile, field: ReceptiveField, *, symmetric: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return what a network must read to compute a tile exactly.

    Parameters
    ----------
    tile : Tile
        What is wanted of the output.
    field : ReceptiveField
        Of the network.
    symmetric : bool
        Read the larger halo on both sides, as flipped tiles need it.

    Returns
    -------
    start, stop : tuple of int
        The input, of legal sides; it may reach beyond the image.
    offset : tuple of int
        Where the tile begins in the network's output.
    """
    before, after = field.halo
    if symmetric:
        before = max(before, field.shrink + round_up(field.after, field.alignment))
        after = max(before, after)
    starts, stops, offsets = [], [], []
    for a, b in zip(tile.start, tile.stop, strict=True):
        aligned = a // field.alignment * field.alignment
        start = aligned - before
        end = round_up(b, field.alignment)
        starts.append(start)
        stops.append(start + field.input_size(end + after - start))
        offsets.append(a - start - field.shrink)
    return tuple(starts), tuple(stops), tuple(offsets)


def centred_input_box(
    tile: Tile, config: ProgramConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return what a network of one input shape must read to compute a tile.

    Parameters
    ----------
    tile : Tile
        What is wanted of the output; not larger than that.
    config : ProgramConfig
        With a ``fixed_shape``; its ``alignment`` is the grid of the starts.

    Returns
    -------
    start, stop, offset : tuple of int
        As `input_box` gives them; what is more than needed lies on both sides.
    """
    starts, grid = [], config.alignment
    for a, b, side in zip(tile.start, tile.stop, config.output_shape, strict=True):
        first = a // grid * grid
        spare = side - (b - first)
        starts.append(first - spare // 2 // grid * grid - config.shrink)
    shape = config.fixed_shape or ()
    stops = [a + n for a, n in zip(starts, shape, strict=True)]
    offset = [a - b - config.shrink for a, b in zip(tile.start, starts, strict=True)]
    return tuple(starts), tuple(stops), tuple(offset)


def mirror_indices(start: int, stop: int, size: int) -> NDArray[np.intp]:
    """Indices of an axis continued by mirroring without repeating the edge pixel.

    Parameters
    ----------
    start, stop : int
        May lie outside ``[0, size)`` by any distance.
    size : int
        Length of the axis.

    Returns
    -------
    intp array of shape (stop - start,)
        As ``numpy.pad(mode="reflect")`` would fill them.
    """
    if size == 1:
        return np.zeros(stop - start, dtype=np.intp)
    period = 2 * (size - 1)
    folded = np.arange(start, stop) % period
    return np.minimum(folded, period - folded).astype(np.intp)


def choose_tile_shape(
    shape: Sequence[int], field: ReceptiveField, max_input_pixels: int
) -> tuple[int, ...]:
    """Choose the largest even division whose input stays within a budget.

    Parameters
    ----------
    shape : sequence of int
        Of the image or region.
    field : ReceptiveField
        Of the network.
    max_input_pixels : int
        Pixels of one tile with its halo; a tile of one alignment is always
        allowed.

    Returns
    -------
    tuple of int
        Multiples of the alignment.
    """
    halo = sum(field.halo)
    counts = [1] * len(shape)
    while True:
        tile = [
            round_up(math.ceil(side / count), field.alignment)
            for side, count in zip(shape, counts, strict=True)
        ]
        pixels = math.prod(field.input_size(side + halo) for side in tile)
        longest = max(range(len(tile)), key=lambda axis: tile[axis])
        if pixels <= max_input_pixels or tile[longest] == field.alignment:
            return tuple(tile)
        counts[longest] += 1


def blending_window(
    kept: Tile, inner: Tile, image_shape: Sequence[int]
) -> NDArray[np.float32]:
    """Weights that fade a tile out over its overlap with its neighbours.

    Parameters
    ----------
    kept : Tile
        The box with its overlap.
    inner : Tile
        The tile itself; the overlap is symmetric about its edges.
    image_shape : sequence of int
        At the edges of the image nothing fades.

    Returns
    -------
    float32 array of the shape of ``kept``
        Positive; the windows of a regular grid add up to 1.
    """
    window = np.ones(kept.shape, dtype=np.float32)
    for axis, size in enumerate(image_shape):
        position = np.arange(kept.start[axis], kept.stop[axis]) + 0.5
        ramp = np.ones(len(position))
        for edge, outer, sign in (
            (inner.start[axis], kept.start[axis], 1),
            (inner.stop[axis], kept.stop[axis], -1),
        ):
            overlap = abs(edge - outer)
            if overlap and 0 < edge < size:
                fade = 0.5 + sign * (position - edge) / (2 * overlap)
                ramp *= np.clip(fade, 0, 1)
        shape = [1] * len(image_shape)
        shape[axis] = -1
        window *= ramp.astype(np.float32).reshape(shape)
    return window
