"""Every real dtype, bad pixels, constant images."""

import numpy as np
import pytest
from exact import predict, predict_steps, segment
from ticks import notes_of
from whole_image import random_image, reference, trained_model

from napari_unet.errors import BadInput
from napari_unet.models.normalize import Normalization

DTYPES = [
    f"{order}{kind}"
    for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")
    for order in "<>"
]


@pytest.fixture(scope="module")
def small_values() -> np.ndarray:
    """An image that every dtype can hold."""
    image = random_image((1, 33, 40))[0].astype(float)
    image -= image.min()
    return (100 * image / image.max()).round()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["percentile", "mean_std"])
def test_every_dtype_gives_the_same(dtype, method, small_values):
    model = trained_model(Normalization(method=method))
    wanted = reference(model, small_values[None])
    image = small_values.astype(dtype)
    result = predict(image, model, tile_shape=(16, 16))
    assert result.dtype == np.float32
    assert result.dtype.isnative
    np.testing.assert_allclose(result, wanted, atol=1e-4)


def test_bool_is_0_and_1(small_values, model):
    image = small_values > 50
    result = predict(image, model)
    np.testing.assert_array_equal(result, predict(image.astype(np.uint8), model))
    assert result.std() > 1e-3


@pytest.mark.parametrize("dtype", ["uint32", "int32", "int64", "uint64", "float64"])
@pytest.mark.parametrize("offset", [10**9, 2 * 10**9])
def test_a_wide_offset_changes_nothing(dtype, offset, small_values, model):
    wanted = reference(model, small_values[None])
    image = (small_values + offset).astype(dtype)
    np.testing.assert_allclose(predict(image, model), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.ones((8, 8), dtype=complex), "complex. Take the magnitude"),
        (np.full((8, 8), "a"), "pixels of type <U1; numbers"),
        (np.full((8, 8), b"a"), "numbers are needed"),
        (np.full((8, 8), 1, dtype=object), "pixels of type object; numbers"),
        (np.zeros((8, 8), dtype="M8[s]"), "numbers are needed"),
        (np.zeros((8, 8), dtype=[("a", "u1")]), "numbers are needed"),
    ],
)
def test_what_are_no_numbers_is_refused(image, message, model):
    with pytest.raises(BadInput, match=message):
        predict(image, model)


BAD = {"nan": [np.nan], "inf": [np.inf, -np.inf], "all": [np.nan, np.inf, -np.inf]}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8"])
@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_bad_pixels_are_background_and_harm_nothing_else(bad, dtype, num_classes):
    model = trained_model(num_classes=num_classes)
    clean = (random_image((1, 60, 50))[0] / 100).astype(dtype)
    rng = np.random.default_rng(0)
    places = rng.random(clean.shape) < 0.01
    places[20:30, 20:30] = True  # a whole tile
    image = clean.copy()
    image[places] = rng.choice(BAD[bad], places.sum())
    filled = clean.copy()
    filled[places] = np.median(clean[~places].astype(float))
    how = model.passport.normalization.fit(clean[~places][None])
    fixed = Normalization(
        method="fixed",
        lower=float(how.offset[0]),
        upper=float(how.offset[0] + 1 / how.gain[0]),
    )
    wanted = reference(trained_model(fixed, num_classes=num_classes), filled[None])
    notes, result = notes_of(predict_steps(image, model, tile_shape=(16, 16)))
    atol = 1e-2 if dtype == "f2" else 1e-4  # half cannot hold the median
    np.testing.assert_allclose(result[:, ~places], wanted[:, ~places], atol=atol)
    if num_classes > 1:
        assert (result[0, places] == 1).all()
        assert not result[1:, places].any()
    else:
        assert not result[:, places].any()
    assert notes == [f"{places.sum()} pixels are NaN or infinite; they are background."]
    assert not segment(image, model, threshold=0.01)[places].any()


def test_bad_pixels_are_counted_over_the_planes_of_a_stack(model):
    image = random_image((1, 3, 20, 20))[0].astype(np.float32)
    image[0, 0, :5] = np.nan
    image[1] = np.nan
    notes, result = notes_of(predict_steps(image, model, axes="ZYX"))
    assert notes == ["405 pixels are NaN or infinite; they are background."]
    assert (result[0, 1] == 1).all()
    assert (result[0, 2] != 1).all()


def test_a_bad_pixel_in_one_channel(model):
    two = trained_model(in_channels=2)
    image = random_image((2, 20, 20)).astype(np.float32)
    image[1, 3, 4] = np.inf
    result = predict(image, two, axes="CYX")
    assert result[0, 3, 4] == 1
    assert (result[0] == 1).sum() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("scope", "axes"), [("image", "YX"), ("image", "ZYX"), ("plane", "YX")]
)
def test_an_image_of_bad_pixels_only_is_refused(scope, bad, axes):
    image = np.full((3, 20, 20)[-len(axes) :], bad, dtype=np.float32)
    with pytest.raises(BadInput, match="no finite pixels"):
        predict(image, trained_model(Normalization(scope=scope)), axes=axes)


def test_a_bad_plane_with_its_own_statistics_is_background():
    image = random_image((1, 3, 20, 20))[0].astype(np.float32)
    image[1] = np.nan
    model = trained_model(Normalization(scope="plane"))
    result = predict(image, model, axes="ZYX")
    assert (result[0, 1] == 1).all()
    for z in (0, 2):
        np.testing.assert_allclose(result[:, z], predict(image[z], model), atol=1e-6)


@pytest.mark.parametrize("value", [0, 1, 255, 65535])
def test_a_constant_image_is_valid_and_said(value, model):
    image = np.full((30, 20), value, dtype=np.uint16)
    notes, result = notes_of(predict_steps(image, model))
    assert notes == ["The image is constant: nothing can be found in it."]
    assert np.isfinite(result).all()
    # The network sees zeros, wherever it looks.
    np.testing.assert_allclose(result, reference(model, image[None] * 0), atol=1e-4)


def test_extreme_floats_are_only_bright_pixels(model):
    image = random_image((1, 60, 50))[0].astype(np.float32) / 1e5
    image[0, 0] = np.finfo(np.float32).max
    image[59, 49] = np.finfo(np.float32).min
    assert np.isfinite(predict(image, model)).all()
