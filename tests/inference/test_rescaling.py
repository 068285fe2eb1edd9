"""Rescaling to the model's pixel size: on one global grid, whatever the tiles."""

import numpy as np
import pytest
from exact import predict, segment
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_image import (
    EXAMPLES,
    exact_options,
    mirrored_prediction,
    parts,
    random_image,
    shapes_and_tiles,
    trained_model,
)

from napari_unet.inference.resample import Resampling, resample
from napari_unet.models.model import Model


def with_pixel_size(model: Model, *pixel_size: float) -> Model:
    passport = model.passport.model_copy(update={"pixel_size": pixel_size})
    return Model(model.network, passport)


def resample_whole(block: np.ndarray, shape) -> np.ndarray:
    axes = [Resampling(n, m) for n, m in zip(block.shape[1:], shape, strict=True)]
    return resample(block, axes, [0] * len(shape), shape)


def rescaled_reference(model: Model, image: np.ndarray, factors) -> np.ndarray:
    """Resample the whole, run once, resample the whole back."""
    normalised = model.passport.normalization.fit(image).apply(image)
    sides = image.shape[1:]
    grid = [max(1, round(n * f)) for n, f in zip(sides, factors, strict=True)]
    result = mirrored_prediction(model.network, resample_whole(normalised, grid))
    return resample_whole(result, sides)


@given(data=st.data(), ndim=st.sampled_from([2, 2, 3]), crop=st.booleans())
@settings(max_examples=30 * EXAMPLES, deadline=None)
def test_the_result_does_not_depend_on_the_tiles(data, ndim, crop):
    options = data.draw(exact_options(ndim))
    shape, tile = data.draw(shapes_and_tiles(options, 90 if ndim == 2 else 14))
    image = random_image((options["in_channels"], *shape))
    spatial = "ZYX"[-ndim:]
    factors = data.draw(st.tuples(*[st.floats(0.3, 2.5)] * ndim), "factors")
    model = with_pixel_size(trained_model(**options), *[0.5] * ndim)
    region = None
    if crop:
        region = {a: data.draw(parts(n)) for a, n in zip(spatial, shape, strict=True)}
    result = predict(
        image,
        model,
        axes="C" + spatial,
        tile_shape=tile,
        region=region,
        pixel_size={a: 0.5 * f for a, f in zip(spatial, factors, strict=True)},
    )
    if np.allclose(factors, 1, atol=0.05):
        return
    wanted = rescaled_reference(model, image, factors)
    if region:
        wanted = wanted[(slice(None), *[region[a] for a in spatial])]
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [0.5, 0.49, 0.52])
def test_about_the_same_pixel_size_changes_nothing(size, model, image):
    same = with_pixel_size(model, 0.5, 0.5)
    np.testing.assert_array_equal(
        predict(image, same, pixel_size={"Y": size, "X": 0.5}), predict(image, model)
    )


@pytest.mark.parametrize("known", [{}, {"Y": 0.1}, {"Z": 0.1, "X": 0.1}])
def test_an_unknown_pixel_size_changes_nothing(known, model, image):
    sized = with_pixel_size(model, 0.5, 0.5)
    wanted = predict(image, model)
    np.testing.assert_array_equal(predict(image, sized, pixel_size=known), wanted)
    np.testing.assert_array_equal(
        predict(image, model, pixel_size={"Y": 0.1, "X": 0.1}), wanted
    )


def test_one_axis_may_be_coarser():
    """A volume with thick planes for a model of cubes."""
    model = with_pixel_size(trained_model(ndim=3, depth=1), 0.5, 0.5, 0.5)
    image = random_image((1, 6, 30, 20))
    sizes = {"Z": 1.5, "Y": 0.5, "X": 0.25}
    result = predict(image[0], model, axes="ZYX", pixel_size=sizes)
    wanted = rescaled_reference(model, image, (3, 1, 0.5))
    np.testing.assert_allclose(result, wanted, atol=1e-4)
    labels = segment(image[0], model, axes="ZYX", pixel_size=sizes)
    assert labels.shape == (6, 30, 20)


def test_bad_pixels_stay_background_where_they_are(model):
    image = random_image((1, 60, 50))[0].astype(np.float32)
    image[10:13, 20] = np.nan
    sized = with_pixel_size(model, 1.0, 1.0)
    result = predict(image, sized, pixel_size={"Y": 0.4, "X": 0.4})
    assert (result[0, 10:13, 20] == 1).all()
    assert (result[0] == 1).sum() == 3


# --- the interpolation itself ---------------------------------------------------

LENGTHS = st.integers(1, 60)


@given(source=LENGTHS, target=LENGTHS, data=st.data())
@settings(max_examples=200 * EXAMPLES, deadline=None)
def test_a_part_equals_the_part_of_the_whole(source, target, data):
    axis = Resampling(source, target)
    part = data.draw(parts(target))
    values = np.random.default_rng(0).normal(size=(2, source)).astype(np.float32)
    whole = resample(values, [axis], [0], [target])
    low, high = axis.reach(part.start, part.stop)
    assert 0 <= low < high <= source
    cut = resample(values[:, low:high], [axis], [part.start], [part.stop])
    np.testing.assert_allclose(cut, whole[:, part], atol=1e-6)


@given(source=LENGTHS, target=LENGTHS)
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_constants_stay_and_weights_are_a_mean(source, target):
    axis = Resampling(source, target)
    constant = np.full((1, source), 7.25, dtype=np.float32)
    result = resample(constant, [axis], [0], [target])
    np.testing.assert_allclose(result, 7.25, rtol=1e-6)
    assert axis.weights(0, target).min() >= 0


@given(source=LENGTHS, target=LENGTHS)
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_it_is_linear(source, target):
    axis = Resampling(source, target)
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 1, source)).astype(np.float32)

    def stretched(values: np.ndarray) -> np.ndarray:
        return resample(values, [axis], [0], [target])

    np.testing.assert_allclose(
        stretched(3 * one - 2 * two),
        3 * stretched(one) - 2 * stretched(two),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("source", "target", "pixels"),
    [(40, 100, 1e-5), (30, 31, 1e-5), (100, 50, 1e-5), (100, 40, 0.1), (100, 90, 0.1)],
)
def test_positions_agree(source, target, pixels):
    """A ramp stays the same ramp: both grids span the same distance."""
    ramp = (np.arange(source) + 0.5).astype(np.float32)[None]
    result = resample(ramp, [Resampling(source, target)], [0], [target])[0]
    wanted = (np.arange(target) + 0.5) * source / target
    edge = 1 + int(np.ceil(max(1, target / source)))
    inner = slice(edge, -edge)
    np.testing.assert_allclose(result[inner], wanted[inner], rtol=1e-6, atol=pixels)
    assert abs(np.mean(result - wanted)) < 0.02  # no shift of the whole


def test_the_same_length_changes_nothing():
    values = random_image((2, 9, 7)).astype(np.float32)
    np.testing.assert_array_equal(resample_whole(values, (9, 7)), values)


def test_shrinking_averages_instead_of_skipping():
    stripes = (np.arange(100) % 2).astype(np.float32)[None]
    result = resample(stripes, [Resampling(100, 25)], [0], [25])
    np.testing.assert_allclose(result, 0.5, atol=0.05)


def test_the_order_of_axes_is_kept():
    values = random_image((2, 8, 12, 6)).astype(np.float32)
    result = resample_whole(values, (4, 12, 9))
    assert result.shape == (2, 4, 12, 9)
    for z, axis in ((0, 1), (2, 3)):
        shape = list(values.shape[1:])
        shape[z] = result.shape[axis]
        single = resample_whole(values, shape)
        assert single.shape[axis] == result.shape[axis]
    flipped = resample_whole(values[:, ::-1, :, ::-1].copy(), (4, 12, 9))
    np.testing.assert_allclose(flipped[:, ::-1, :, ::-1], result, rtol=1e-5)
