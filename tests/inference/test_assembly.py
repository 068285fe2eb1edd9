"""Strips make up the plane, in order, however their tiles come."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.inference.assembly import Blend, Strips
from napari_unet.inference.tiling import Tile, tile_grid


@st.composite
def grids(draw):
    """A region, and tiles of it in any order, some of them in two pieces."""
    ndim = draw(st.sampled_from([2, 3]))
    region = []
    for _ in range(ndim):
        start = draw(st.integers(0, 20))
        region.append(slice(start, start + draw(st.integers(1, 30))))
    sides = [draw(st.sampled_from([4, 8, 16])) for _ in range(ndim)]
    tiles = tile_grid(region, sides, 4)
    pieces = []
    for tile in tiles:
        halves = tile.halved(4) if draw(st.booleans()) else None
        pieces += halves or [tile]
    return region, tiles, draw(st.permutations(pieces))


@given(grids())
@settings(deadline=None)
def test_strips_make_up_the_region(grid):
    region, tiles, pieces = grid
    shape = [part.stop - part.start for part in region]
    whole = np.arange(2 * math.prod(shape)).reshape(2, *shape)
    strips, found, rows_so_far = Strips(region, tiles), np.zeros_like(whole), 0
    for tile in pieces:
        box = tuple(
            slice(a - part.start, b - part.start)
            for a, b, part in zip(tile.start, tile.stop, region, strict=True)
        )
        for rows, strip in strips.add(tile, tile, whole[(slice(None), *box)]):
            assert rows.start == rows_so_far
            rows_so_far = rows.stop
            found[:, rows] = strip
    assert rows_so_far == shape[0]
    np.testing.assert_array_equal(found, whole)


def test_tiles_that_were_halved_along_different_axes():
    """As after memory ran out: in one row of tiles, some are halved in Y."""
    region = [slice(0, 16), slice(0, 24)]
    whole = np.arange(16 * 24).reshape(1, 16, 24)
    tiles = [
        *Tile((0, 0), (8, 16)).halved(4),
        Tile((8, 0), (16, 16)),
        Tile((0, 16), (16, 24)),
    ]
    strips, found = Strips(region, tiles), np.zeros_like(whole)
    for tile in tiles:
        box = tuple(map(slice, tile.start, tile.stop))
        for rows, strip in strips.add(tile, tile, whole[(slice(None), *box)]):
            found[:, rows] = strip
    strips.check_complete()
    np.testing.assert_array_equal(found, whole)


def test_what_is_missing_is_noticed():
    region = [slice(0, 8), slice(0, 8)]
    first, *_ = tiles = tile_grid(region, (4, 4), 4)
    strips, blend = Strips(region, tiles), Blend(region, (8, 8), is_blended=False)
    for assembly in strips, blend:
        assert not list(assembly.add(first, first, np.ones((1, 4, 4))))
        with pytest.raises(AssertionError):
            assembly.check_complete()


def test_a_strip_does_not_wait_for_the_next():
    region = [slice(0, 8), slice(0, 8)]
    tiles = tile_grid(region, (4, 4), 4)
    strips = Strips(region, tiles)
    given_ = [len(list(strips.add(t, t, np.ones((1, 4, 4))))) for t in tiles]
    assert given_ == [0, 1, 0, 1]


def test_a_blend_comes_whole():
    region = [slice(0, 8), slice(0, 8)]
    tiles = tile_grid(region, (4, 8), 4)
    blend = Blend(region, (8, 8), is_blended=True)
    parts = []
    for tile in tiles:
        kept = tile.grown((2, 2), region)
        parts += blend.add(tile, kept, np.ones((1, *kept.shape), np.float32))
    ((rows, whole),) = parts
    assert rows == slice(0, 8)
    np.testing.assert_allclose(whole, 1)
