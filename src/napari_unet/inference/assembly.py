"""Tiles put together to a plane or volume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np

from napari_unet.inference.tiling import blending_window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from napari_unet.inference.tiling import Tile

    Part = tuple[slice, NDArray]

__all__ = ["Assembly", "Blend", "Strips"]


class Assembly(Protocol):
    """Takes tiles, and gives the parts of a region that are complete."""

    def add(self, tile: Tile, kept: Tile, values: NDArray) -> Iterator[Part]:
        """Add a tile.

        Parameters
        ----------
        tile : Tile
            Of the grid of tiles.
        kept : Tile
            The tile with its overlap.
        values : array of shape (kept, *spatial)
            Of ``kept``.

        Yields
        ------
        rows : slice
            Along the first axis, counted from the start of the region. The parts
            follow each other.
        part : array of shape (kept, *spatial)
            Not used here any more.
        """

    def check_complete(self) -> None:
        """Fail if anything was not given: never hand on what was not computed."""


class Strips:
    """Gives a strip as soon as its tiles are there: a row of tiles, or a slab.

    Parameters
    ----------
    region : sequence of slice
        What all tiles cover.
    tiles : sequence of Tile
        Without overlap. Any of them may come in pieces.
    """

    def __init__(self, region: Sequence[slice], tiles: Sequence[Tile]):
        self._origin = [part.start for part in region]
        self._sides = [part.stop - part.start for part in region[1:]]
        spans: list[tuple[int, int]] = []
        for start, stop in sorted({(tile.start[0], tile.stop[0]) for tile in tiles}):
            if spans and start < spans[-1][1]:  # some were halved along other axes
                before = spans.pop()
                spans.append((before[0], max(stop, before[1])))
            else:
                spans.append((start, stop))
        self._spans = spans[::-1]  # the next is the last
        self._strips: dict[int, NDArray] = {}
        self._pixels: dict[int, int] = {}

    def add(self, tile: Tile, kept: Tile, values: NDArray) -> Iterator[Part]:
        """See `Assembly.add`."""
        del kept
        start, stop = next(s for s in self._spans if s[0] <= tile.start[0] < s[1])
        if start not in self._strips:
            shape = len(values), stop - start, *self._sides
            self._strips[start] = np.empty(shape, dtype=values.dtype)
        origin = [start, *self._origin[1:]]
        strip = self._strips[start]
        strip[(slice(None), *_box(tile, origin))] = values
        self._pixels[start] = self._pixels.get(start, 0) + math.prod(tile.shape)
        while self._spans:
            start, stop = self._spans[-1]
            if self._pixels.get(start) != (stop - start) * math.prod(self._sides):
                return
            self._spans.pop()
            first = start - self._origin[0]
            yield slice(first, first + stop - start), self._strips.pop(start)

    def check_complete(self) -> None:
        """See `Assembly.check_complete`."""
        assert not self._spans, f"The strips {self._spans} are not complete."


class Blend:
    """Gives the whole region at the end, of tiles that fade into each other.

    Parameters
    ----------
    region : sequence of slice
        What all tiles cover.
    image_shape : sequence of int
        At its edges nothing fades.
    is_blended : bool
        Whether the tiles overlap.
    """

    def __init__(
        self, region: Sequence[slice], image_shape: Sequence[int], is_blended: bool
    ):
        self._origin = [part.start for part in region]
        self._shape = [part.stop - part.start for part in region]
        self._image_shape = image_shape
        self._sum: NDArray[np.float32] | None = None
        self._weight: NDArray[np.float32] | None = None
        if is_blended:
            self._weight = np.zeros(self._shape, dtype=np.float32)
        self._pixels = 0

    def add(self, tile: Tile, kept: Tile, values: NDArray) -> Iterator[Part]:
        """See `Assembly.add`."""
        if self._sum is None:
            self._sum = np.zeros((len(values), *self._shape), dtype=np.float32)
        box = _box(kept, self._origin)
        if self._weight is None:
            self._sum[(slice(None), *box)] = values
        else:
            window = blending_window(kept, tile, self._image_shape)
            self._sum[(slice(None), *box)] += window * values
            self._weight[box] += window
        self._pixels += math.prod(tile.shape)
        if self._pixels == math.prod(self._shape):
            if self._weight is not None:
                self._sum /= self._weight
            yield slice(0, self._shape[0]), self._sum

    def check_complete(self) -> None:
        """See `Assembly.check_complete`."""
        assert self._pixels == math.prod(self._shape), "Tiles are missing."


def _box(tile: Tile, origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(a - o, b - o)
        for a, b, o in zip(tile.start, tile.stop, origin, strict=True)
    )
