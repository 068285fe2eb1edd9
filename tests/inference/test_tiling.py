"""The grid of tiles, mirrored indices, the choice of a tile, blending."""

import itertools
import math

import numpy as np
import pytest
from exact import predict, predict_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_image import EXAMPLES, parts, random_image, trained_model

from napari_unet.inference.backends import Backend
from napari_unet.inference.source import read_mirrored
from napari_unet.inference.tiling import (
    Tile,
    blending_window,
    choose_tile_shape,
    input_box,
    mirror_indices,
    round_up,
    tile_grid,
)
from napari_unet.network.config import UNetConfig
from napari_unet.network.receptive_field import receptive_field


@given(data=st.data(), ndim=st.integers(1, 3))
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_tiles_cover_a_region_once_and_start_on_the_grid(data, ndim):
    alignment = data.draw(st.sampled_from([1, 2, 4, 8]))
    shape = data.draw(st.tuples(*[st.integers(1, 30)] * ndim))
    region = [data.draw(parts(side)) for side in shape]
    tile_shape = data.draw(st.tuples(*[st.integers(1, 40)] * ndim))
    covered = np.zeros(shape, dtype=int)
    for tile in tile_grid(region, tile_shape, alignment):
        for start, side, part, wanted in zip(
            tile.start, tile.shape, region, tile_shape, strict=True
        ):
            assert start % alignment == 0 or start == part.start
            assert 0 < side <= round_up(wanted, alignment)
        covered[tuple(map(slice, tile.start, tile.stop))] += 1
    assert covered.sum() == math.prod(part.stop - part.start for part in region)
    assert (covered[tuple(region)] == 1).all()


@given(
    start=st.integers(-200, 200), length=st.integers(1, 300), size=st.integers(1, 50)
)
@settings(max_examples=200 * EXAMPLES, deadline=None)
def test_mirroring_is_numpys(start, length, size):
    stop = start + length
    pads = max(0, -start), max(0, stop - size)
    padded = np.pad(np.arange(size), pads, mode="reflect")
    wanted = padded[start + pads[0] : stop + pads[0]]
    np.testing.assert_array_equal(mirror_indices(start, stop, size), wanted)


@given(data=st.data(), ndim=st.integers(1, 3))
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_a_box_is_read_as_numpy_would_mirror_it(data, ndim):
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * ndim))
    start = data.draw(st.tuples(*[st.integers(-15, 15)] * ndim))
    sides = data.draw(st.tuples(*[st.integers(1, 20)] * ndim))
    stop = [first + side for first, side in zip(start, sides, strict=True)]
    image = np.random.default_rng(0).integers(0, 999, (2, *shape))

    def read(low, high):
        return image[(slice(None), *map(slice, low, high))]

    wanted = np.pad(image, [(0, 0), *[(40, 40)] * ndim], mode="reflect")
    box = [slice(a + 40, b + 40) for a, b in zip(start, stop, strict=True)]
    found = read_mirrored(read, shape, start, stop)
    np.testing.assert_array_equal(found, wanted[(slice(None), *box)])


@given(start=st.integers(0, 50), sides=st.lists(st.integers(1, 80), min_size=1))
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_halves_make_up_the_tile(start, sides):
    alignment = 8
    begin = tuple(start * alignment for _ in sides)
    tile = Tile(begin, tuple(a + n for a, n in zip(begin, sides, strict=True)))
    both = tile.halved(alignment)
    if both is None:
        assert max(sides) <= alignment
        return
    first, second = both
    assert (first.start, second.stop) == (tile.start, tile.stop)
    split = [a != b for a, b in zip(tile.start, second.start, strict=True)]
    assert sum(split) == 1
    axis = split.index(True)
    assert sides[axis] == max(sides)
    assert first.stop[axis] == second.start[axis]
    assert second.start[axis] % alignment == 0
    assert math.prod(first.shape) + math.prod(second.shape) == math.prod(sides)


CONFIGS = [
    UNetConfig(padding=padding, upsampling=upsampling, depth=depth)
    for padding, upsampling, depth in itertools.product(
        ("same", "valid"), ("transposed", "nearest", "bilinear"), (1, 3, 4)
    )
]


@given(
    config=st.sampled_from(CONFIGS),
    start=st.integers(0, 300),
    length=st.integers(1, 300),
    symmetric=st.booleans(),
)
@settings(max_examples=200 * EXAMPLES, deadline=None)
def test_the_input_of_a_tile_is_legal_aligned_and_large_enough(
    config, start, length, symmetric
):
    field = receptive_field(config)
    tile = Tile((start,), (start + length,))
    (first,), (last,), (offset,) = input_box(tile, field, symmetric=symmetric)
    assert (last - first) % field.alignment == field.remainder
    assert (first + field.shrink) % field.alignment == 0
    assert first <= start - start % field.alignment - field.before
    assert last >= round_up(start + length, field.alignment) + field.after
    # Where the tile is in an output that begins `shrink` after the input.
    assert first + field.shrink + offset == start
    assert offset + length <= last - first - 2 * field.shrink


@given(
    shape=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    config=st.sampled_from(CONFIGS),
    budget=st.integers(1, 4_000_000),
)
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_the_chosen_tile_fits_the_budget(shape, config, budget):
    field = receptive_field(config)
    tile = choose_tile_shape(shape, field, budget)
    assert all(side % field.alignment == 0 for side in tile)
    halo = sum(field.halo)
    pixels = math.prod(field.input_size(side + halo) for side in tile)
    assert pixels <= budget or max(tile) == field.alignment


def test_a_small_image_is_one_tile():
    field = receptive_field(UNetConfig())
    assert choose_tile_shape((500, 300), field, 10**6) == (512, 304)


# --- networks that cannot be exact ------------------------------------------------


@given(
    counts=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    side=st.sampled_from([8, 16]),
    overlap=st.integers(0, 4),
)
@settings(max_examples=60 * EXAMPLES, deadline=None)
def test_windows_of_a_regular_grid_add_up_to_1(counts, side, overlap):
    shape = tuple(n * side for n in counts)
    total = np.zeros(shape)
    for tile in tile_grid([slice(0, n) for n in shape], (side, side), 8):
        kept = Tile(
            tuple(max(a - overlap, 0) for a in tile.start),
            tuple(min(b + overlap, n) for b, n in zip(tile.stop, shape, strict=True)),
        )
        window = blending_window(kept, tile, shape)
        assert window.min() > 0
        total[tuple(map(slice, kept.start, kept.stop))] += window
    np.testing.assert_allclose(total, 1, atol=1e-6)


INEXACT = {
    "instance": ({"norm": "instance"}, "instance normalisation"),
    "group": ({"norm": "group", "base_channels": 4}, "group normalisation"),
    "aligned": (
        {"upsampling": "bilinear", "align_corners": True, "depth": 3},
        "aligned corners",
    ),
}


@pytest.fixture(params=INEXACT)
def inexact(request):
    options, word = INEXACT[request.param]
    return trained_model(**options), word


@pytest.fixture(scope="module")
def uneven() -> np.ndarray:
    """Contrast and brightness grow from left to right: tiles differ a lot."""
    image = random_image((1, 160, 256))[0].astype(np.float32)
    return image * np.linspace(0.2, 3, 256, dtype=np.float32)


def test_it_is_said_once_that_tiles_are_blended(inexact, uneven):
    model, word = inexact
    assert word in model.inexact_reason
    stack = np.stack([uneven, uneven])
    steps = predict_steps(stack, model, axes="ZYX", tile_shape=(64, 64))
    notes = [tick.note for tick in steps if tick.note]
    assert len(notes) == 1
    assert "The tiles are blended" in notes[0]
    assert word in notes[0]


def test_a_single_tile_needs_no_blending(inexact, uneven):
    model, _ = inexact
    assert not any(tick.note for tick in predict_steps(uneven, model))


def test_an_exact_model_blends_nothing(model, uneven):
    assert model.inexact_reason is None
    steps = predict_steps(uneven, model, tile_shape=(64, 64))
    assert not any(tick.note for tick in steps)


@pytest.mark.parametrize(
    ("shape", "region", "steepest"),
    [
        ((192, 256), None, 1.05),
        ((190, 250), None, 2),
        ((192, 256), {"Y": slice(20, 131), "X": slice(70, 250)}, 2),
    ],
)
def test_tiles_of_different_brightness_fade_into_each_other(
    shape, region, steepest, monkeypatch
):
    """Let every tile be all 0 or all 1: the worst that statistics can do."""
    calls = itertools.count()

    def run(self, image, keep, **options):
        sides = [stop - start for start, stop in keep]
        return np.full((2, *sides), next(calls) % 2, dtype=np.float32)

    monkeypatch.setattr(Backend, "run", run)
    model = trained_model(norm="instance")
    overlap = round_up(max(receptive_field(model.network.config).halo), 4)
    result = predict(np.ones(shape), model, tile_shape=(64, 64), region=region)
    assert result.min() < 0.01
    assert result.max() > 0.99
    assert np.abs(np.diff(result, axis=-1)).max() < steepest / (2 * overlap)


def test_blending_is_nearer_to_the_whole_than_plain_tiles(inexact, uneven):
    model, _ = inexact
    whole = predict(uneven, model, tile_shape=(256, 256))
    blended = predict(uneven, model, tile_shape=(256, 64))
    plain = np.concatenate(
        [
            predict(uneven, model, region={"X": slice(left, left + 64)})
            for left in range(0, 256, 64)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(blended.sum(axis=0), 1, atol=1e-5)
    assert blended.shape == whole.shape
    assert np.abs(blended - whole).mean() < np.abs(plain - whole).mean() < 0.2


def test_blending_keeps_a_constant(uneven):
    model = trained_model(norm="instance", num_classes=1)
    bias = float(model.network.head.bias.detach())
    weight = model.network.head.weight.detach().clone()
    try:
        model.network.head.weight.data.zero_()
        result = predict(uneven, model, tile_shape=(48, 56))
    finally:
        model.network.head.weight.data.copy_(weight)
    np.testing.assert_allclose(result, 1 / (1 + math.exp(-bias)), rtol=1e-5)
