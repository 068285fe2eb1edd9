"""Which tiles a part of an image is cut into, and what each of them needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from napari_unet.inference.tiling import (
    Tile,
    centred_input_box,
    choose_tile_shape,
    halve_longest,
    input_box,
    round_up,
    tile_grid,
)
from napari_unet.network.program_config import ProgramConfig
from napari_unet.network.receptive_field import receptive_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet.network.config import UNetConfig

    Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    Spans = list[tuple[int, int]]

__all__ = ["MIN_TILE", "TilePlan"]

MIN_TILE = 64  # pixels; smaller tiles are all halo
MIN_GPU_PIXELS = 1 << 16  # a GPU that has no memory for more is left
NEARLY_FULL = 0.75  # of the sides of a tile


class TilePlan:
    """The tiles of a part of an image, on the grid that the network sees.

    Parameters
    ----------
    config : UNetConfig or ProgramConfig
        Of the network.
    region : sequence of slice
        What is wanted: start and stop along each axis of the grid.
    grid_shape : sequence of int
        Sides of the whole grid.
    tile_shape : sequence of int or None
        Sides of a tile; None chooses the largest that ``max_input_pixels`` allows.
    max_input_pixels : int
        Of a tile with its halo.
    longest_side : int or None
        Of a tile, once memory ran out.
    is_turned : bool
        Whether tiles are turned and flipped.
    is_blended : bool
        Whether several tiles are faded into each other.
    """

    def __init__(
        self,
        config: UNetConfig | ProgramConfig,
        region: Sequence[slice],
        grid_shape: Sequence[int],
        *,
        tile_shape: Sequence[int] | None,
        max_input_pixels: int,
        longest_side: int | None = None,
        is_turned: bool = False,
        is_blended: bool = False,
    ):
        self.region = region
        self._field = receptive_field(config)
        self._is_turned = is_turned
        # Takes inputs of one shape only.
        self._fixed: ProgramConfig | None = None
        if isinstance(config, ProgramConfig) and config.fixed_shape:
            self._fixed = config
        shape = [part.stop - part.start for part in region]
        if self._fixed is not None:
            tile_shape = self._fixed.tile_shape(region, grid_shape)
        elif tile_shape is None:
            tile_shape = choose_tile_shape(shape, self._field, max_input_pixels)
        alignment, longest = self._field.alignment, longest_side or max(tile_shape)
        sides = tuple(round_up(min(n, longest), alignment) for n in tile_shape)
        self._sides: tuple[int, ...] | None = sides
        self.tiles = tile_grid(region, sides, alignment)
        self.overlap = (0,) * len(sides)
        if is_blended and len(self.tiles) > 1:
            self.overlap = self._overlap(sides)

    def _overlap(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        halo = round_up(max(self._field.halo), self._field.alignment)
        wanted = self._fixed.overlaps if self._fixed else (halo,) * len(sides)
        return tuple(min(n, side // 2) for n, side in zip(wanted, sides, strict=True))

    @property
    def is_blended(self) -> bool:
        """Whether tiles overlap."""
        return any(self.overlap)

    def with_overlap(self, tile: Tile) -> Tile:
        """Return the box that is kept of a tile's result."""
        return tile.grown(self.overlap, self.region)

    def input_box(self, tile: Tile) -> Box:
        """Return what must be read for a tile; see `tiling.input_box`."""
        full = self._full(tile)
        if self._fixed is not None:
            return centred_input_box(full, self._fixed)
        return input_box(full, self._field, symmetric=self._is_turned)

    def output_box(self, tile: Tile) -> Spans:
        """Return what is computed for a tile, in the network's output."""
        return _spans(self.input_box(tile)[2], self._full(tile).shape)

    def kept_box(self, tile: Tile) -> Spans:
        """Return where what is kept of a tile lies in its `output_box`."""
        full, kept = self._full(tile), self.with_overlap(tile)
        offset = [a - b for a, b in zip(kept.start, full.start, strict=True)]
        return _spans(offset, kept.shape)

    def _full(self, tile: Tile) -> Tile:
        """Return what is computed for a tile: for nearly full ones all of a full one.

        What runs the network is made for each shape, and has memory for each.
        """
        kept = self.with_overlap(tile)
        if self._fixed or self.is_blended or not self._sides or len(self.tiles) == 1:
            return kept
        alignment, start, stop = self._field.alignment, [], []
        for a, b, side in zip(kept.start, kept.stop, self._sides, strict=True):
            first = a // alignment * alignment
            is_nearly_full = b - first > NEARLY_FULL * side
            start.append(first if is_nearly_full else a)
            stop.append(first + side if is_nearly_full else b)
        return Tile(tuple(start), tuple(stop))

    def halve(
        self, tile: Tile, waiting: Sequence[Tile], *, on_gpu: bool
    ) -> tuple[list[Tile], int]:
        """Cut what is as long as a tile for which memory ran out.

        Returns
        -------
        waiting : list of Tile
            The tile and those that wait, halved; empty if it is as small as can be.
        longest_side : int
            Of the tiles to come.
        """
        alignment, longest = self._field.alignment, max(tile.shape)
        can_shrink = self._fixed is None and longest > max(MIN_TILE, alignment)
        if on_gpu:
            can_shrink &= math.prod(tile.shape) > MIN_GPU_PIXELS
        if not can_shrink or not tile.halved(alignment):
            return [], longest
        # Other units are cut in the same way.
        self._sides = None
        self.tiles = halve_longest(self.tiles, longest, alignment)
        rest = halve_longest([tile, *waiting], longest, alignment)
        return rest, round_up(longest // 2, alignment)


def _spans(start: Sequence[int], shape: Sequence[int]) -> Spans:
    return [(a, a + n) for a, n in zip(start, shape, strict=True)]
