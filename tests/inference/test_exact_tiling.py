"""The promise: the result does not depend on the tiles."""

import math

import numpy as np
import pytest
from exact import predict, segment
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from whole_image import (
    EXAMPLES,
    TOLERANCE,
    exact_options,
    parts,
    random_image,
    reference,
    shapes_and_tiles,
    trained_model,
)

from napari_unet.inference.instances import label_objects
from napari_unet.inference.settings import ObjectSettings


def check(model, image, tile_shape, turns=False, region=None):
    """Compare a tiled prediction with the reference; return both."""
    spatial = "ZYX"[-model.ndim :]
    tiled = predict(
        image,
        model,
        axes="C" + spatial,
        tile_shape=tile_shape,
        test_time_augmentation=turns,
        region=region,
    )
    whole = reference(model, image, turns)
    if region:
        whole = whole[(slice(None), *[region[axis] for axis in spatial])]
    assert tiled.dtype == np.float32
    assert tiled.shape == whole.shape
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=TOLERANCE)
    return tiled, whole


@pytest.mark.parametrize(
    ("ndim", "largest", "turns", "examples"),
    [(2, 150, False, 60), (2, 70, True, 25), (3, 24, False, 25), (3, 10, True, 6)],
)
def test_tiles_agree_with_the_whole_image(ndim, largest, turns, examples):
    @given(data=st.data(), options=exact_options(ndim), seed=st.integers(0, 9))
    @settings(max_examples=examples * EXAMPLES, deadline=None)
    def agree(data, options, seed):
        # A volume, and eight turns of it, cost the more time.
        tiles = 2 if turns and ndim == 3 else 4
        shape, tile = data.draw(shapes_and_tiles(options, largest, tiles))
        image = random_image((options["in_channels"], *shape), seed)
        check(trained_model(**options), image, tile, turns)

    agree()


@given(data=st.data(), ndim=st.sampled_from([2, 2, 3]))
@settings(max_examples=30 * EXAMPLES, deadline=None)
def test_regions(data, ndim):
    options = data.draw(exact_options(ndim))
    shape, tile = data.draw(shapes_and_tiles(options, 100 if ndim == 2 else 20))
    region = {
        axis: data.draw(parts(side))
        for axis, side in zip("ZYX"[-ndim:], shape, strict=True)
    }
    image = random_image((options["in_channels"], *shape))
    check(trained_model(**options), image, tile, region=region)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 4, "upsampling": "transposed"},
        {"depth": 4, "upsampling": "nearest"},
        {"depth": 4, "upsampling": "bilinear"},
        {"depth": 4, "padding": "valid"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_depth_4(options):
    check(trained_model(**options), random_image((1, 131, 97)), (48, 64))


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_images_far_smaller_than_the_halo(side, padding):
    model = trained_model(depth=3, padding=padding)
    for shape in ((side, side), (1, 50), (50, side)):
        check(model, random_image((1, *shape)), (8, 8))


def test_unpooling_where_every_maximum_is_a_tie():
    """An image of one column is constant across, but for rounding."""
    model = trained_model(
        in_channels=2,
        num_classes=1,
        convs_per_level=1,
        upsampling="unpool",
        norm=None,
        skip_connections=False,
    )
    check(model, random_image((2, 5, 1)), (1, 1), turns=True)


def test_tiles_of_one_pixel_are_one_alignment():
    check(trained_model(depth=2), random_image((1, 21, 13)), (1, 1))


def test_the_reference_depends_on_the_image():
    """If it were constant, everything above would be empty."""
    for options in (
        {"padding": "valid"},
        {"norm": None},
        {"upsampling": "unpool", "depth": 3},
        {"num_classes": 1, "skip_connections": False},
        {"ndim": 3, "depth": 1},
    ):
        model = trained_model(**options)
        whole = reference(model, random_image((1, *[24] * model.ndim)))
        assert whole.std(axis=tuple(range(1, whole.ndim))).min() > 0.01, options


def widest_gap(probability: np.ndarray) -> float:
    """A threshold near the median with as few undecided pixels as possible."""
    values = np.sort(probability.ravel().astype(float))
    middle = values[len(values) // 4 : 3 * len(values) // 4 + 2]
    gap = int(np.argmax(np.diff(middle)))
    return float(middle[gap : gap + 2].mean())


@given(
    options=exact_options(2),
    data=st.data(),
    split=st.booleans(),
    minimal_size=st.integers(0, 5),
)
@settings(max_examples=40 * EXAMPLES, deadline=None)
def test_labels(options, data, split, minimal_size):
    options = options | {"num_classes": min(options["num_classes"], 2)}
    shape, tile = data.draw(shapes_and_tiles(options, 40))
    assume(math.prod(shape) > 3)
    model = trained_model(**options)
    image = random_image((options["in_channels"], *shape))
    probability = reference(model, image)[-1]
    threshold = widest_gap(probability)
    given_options = {
        "axes": "CYX",
        "tile_shape": tile,
        "threshold": threshold,
        "split_touching": split,
        "minimal_size": minimal_size,
    }
    labels = segment(image, model, **given_options)
    settings_ = ObjectSettings(threshold, minimal_size, split)
    wanted = label_objects(probability, settings_)
    decided = np.abs(probability - threshold) > TOLERANCE
    if decided.all():
        np.testing.assert_array_equal(labels, wanted)
    # Every pixel that is decided; splitting would fill small holes.
    given_options |= {"minimal_size": 0, "split_touching": False}
    plain = segment(image, model, **given_options)
    np.testing.assert_array_equal(plain[decided] > 0, probability[decided] > threshold)


@pytest.mark.parametrize("ndim", [2, 3])
def test_augmentation_makes_turning_the_image_harmless(ndim):
    model = trained_model(ndim=ndim, depth=1)
    image = random_image((1, *[4, 16, 16][-ndim:]))
    options = {"axes": "C" + "ZYX"[-ndim:], "test_time_augmentation": True}
    straight = predict(image, model, **options)
    for quarters in range(1, 4):
        turned = predict(np.rot90(image, quarters, (-2, -1)), model, **options)
        np.testing.assert_allclose(
            np.rot90(turned, -quarters, (-2, -1)), straight, atol=1e-5
        )
    plain = predict(image, model, axes=options["axes"])
    assert np.abs(plain - straight).max() > 1e-3


@pytest.mark.parametrize("upsampling", ["transposed", "bilinear", "unpool"])
@pytest.mark.parametrize("background", [0, 1234, 65535])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_constant_background(upsampling, background, depth):
    """Equal maxima lie in the same place in every tile."""
    image = np.full((1, 130, 110), background, dtype=np.uint16)
    image[0, 40:70, 50:90] = random_image((30, 40))
    check(trained_model(upsampling=upsampling, depth=depth), image, (48, 40))
