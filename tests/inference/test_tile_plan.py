"""The plan of the tiles: one shape for what runs the network, and its own results."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.inference.plan import TilePlan
from napari_unet.network.config import UNetConfig


def shapes(plan: TilePlan) -> set:
    """What the network is made ready for."""
    found = set()
    for tile in plan.tiles:
        start, stop, _ = plan.input_box(tile)
        sides = tuple(b - a for a, b in zip(start, stop, strict=True))
        found.add((sides, tuple(plan.output_box(tile))))
    return found


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("shape", [(4096, 4096), (5000, 3001), (8191, 2047), (2048, 9)])
@pytest.mark.parametrize("turned", [False, True])
def test_large_images_need_one_shape(padding, shape, turned):
    plan = TilePlan(
        UNetConfig(padding=padding),
        [slice(0, side) for side in shape],
        shape,
        tile_shape=None,
        max_input_pixels=1600**2,
        is_turned=turned,
    )
    assert len(plan.tiles) > 1 or shape == (2048, 9)
    assert len(shapes(plan)) == 1


@given(
    region=st.tuples(*[st.tuples(st.integers(0, 90), st.integers(1, 300))] * 2),
    tile_shape=st.tuples(*[st.integers(1, 120)] * 2),
    turned=st.booleans(),
)
@settings(deadline=None)
def test_what_is_kept_is_computed_and_read(region, tile_shape, turned):
    wanted = [slice(start, start + side) for start, side in region]
    plan = TilePlan(
        UNetConfig(depth=2),
        wanted,
        (400, 400),
        tile_shape=tile_shape,
        max_input_pixels=1,
        is_turned=turned,
    )
    assert len(shapes(plan)) <= 9  # inner ones, and those at edges and corners
    for tile in plan.tiles:
        start, stop, _ = plan.input_box(tile)
        sides = zip(tile.start, tile.stop, start, stop, strict=True)
        boxes = zip(plan.output_box(tile), plan.kept_box(tile), strict=True)
        for (a, b, low, high), (output, kept) in zip(sides, boxes, strict=True):
            assert 0 <= kept[0] < kept[1] <= output[1] - output[0]
            assert 0 <= output[0] < output[1] <= high - low
            assert low + output[0] + kept[0] == a
            assert kept[1] - kept[0] == b - a
