"""Normalisation: robust, exact in every dtype, finite everywhere."""

import numpy as np
import pytest

from napari_unet.errors import BadModel
from napari_unet.models.normalize import Normalization

METHODS = ["percentile", "mean_std", "fixed"]
INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def gamma_image(seed: int = 0, size: int = 5000) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2, 10, (1, size))


@pytest.mark.parametrize("dtype", [*INTEGERS, "float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("method", METHODS)
def test_every_dtype_equals_float64(dtype, order, method):
    pixels = np.clip(gamma_image(), 0, 120).astype(np.dtype(dtype).newbyteorder(order))
    how = Normalization(method=method, upper=90.0)
    wanted = how.fit(pixels.astype(np.float64)).apply(pixels.astype(np.float64))
    got = how.fit(pixels).apply(pixels)
    assert got.dtype == np.float32
    assert got.dtype.isnative
    np.testing.assert_allclose(got, wanted, atol=2e-5 if dtype != "float16" else 2e-3)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_full_range_of_integers(dtype, method):
    """Percentiles between far values must not wrap around."""
    info = np.iinfo(dtype)
    pixels = np.array([[info.min, info.max, info.max]], dtype=dtype)
    how = Normalization(method=method, lower=10, upper=45)
    wanted = how.fit(pixels.astype(np.float64))
    got = how.fit(pixels)
    spread = float(info.max) - float(info.min)
    assert got.offset[0] == pytest.approx(wanted.offset[0], abs=1e-5 * spread)
    assert got.gain[0] == pytest.approx(wanted.gain[0], rel=1e-5)
    assert got.fill[0] == pytest.approx(wanted.fill[0], abs=1e-5 * spread)


def test_percentiles_become_0_and_1():
    pixels = gamma_image()
    low, high = np.percentile(pixels, [1, 99.8])
    scaled = Normalization().fit(pixels).apply(pixels)
    np.testing.assert_allclose(scaled, (pixels - low) / (high - low), atol=1e-6)


def test_mean_and_deviation():
    pixels = gamma_image()
    scaled = Normalization(method="mean_std").fit(pixels).apply(pixels)
    assert abs(scaled.mean()) < 1e-5
    assert abs(scaled.std() - 1) < 1e-5


def test_fixed_values_do_not_look_at_the_image():
    how = Normalization(method="fixed", lower=10, upper=30)
    np.testing.assert_allclose(
        how.fit(gamma_image()).apply(np.array([[10, 20, 30, 50]], dtype=np.uint8)),
        [[0, 0.5, 1, 2]],
    )


def test_channels_are_scaled_apart_or_together():
    pixels = np.stack([gamma_image(0)[0], 1000 + 50 * gamma_image(1)[0]])
    apart = Normalization().fit(pixels)
    for channel in range(2):
        alone = Normalization().fit(pixels[channel : channel + 1])
        assert apart.offset[channel] == alone.offset[0]
        assert apart.gain[channel] == alone.gain[0]
    together = Normalization(joint_channels=True).fit(pixels)
    assert together.offset[0] == together.offset[1] == np.percentile(pixels, 1)
    assert together.gain[0] == together.gain[1]


@pytest.mark.parametrize("method", ["percentile", "mean_std"])
@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_becomes_0(method, value):
    pixels = np.full((1, 9, 9), value, dtype=np.uint8)
    scaled = Normalization(method=method).fit(pixels).apply(pixels)
    assert not scaled.any()


def test_few_bright_pixels_are_not_lost():
    pixels = np.full((1, 10_000), 5, dtype=np.uint16)
    pixels[0, :3] = 900
    scaled = Normalization().fit(pixels).apply(pixels)
    assert scaled.max() == 1
    assert scaled.min() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_bad_pixels_are_left_out_and_filled(bad, method):
    pixels = gamma_image().astype(np.float32)
    clean = pixels.copy()
    pixels[0, ::7] = bad
    kept = np.isfinite(pixels)
    how = Normalization(method=method)
    scaling = how.fit(pixels)
    reference = how.fit(clean[kept][None])
    assert scaling.offset == reference.offset
    assert scaling.gain == reference.gain
    scaled = scaling.apply(pixels)
    assert np.isfinite(scaled).all()
    np.testing.assert_array_equal(scaled[kept], scaling.apply(clean)[kept])
    median = np.median(clean[kept])
    filled = scaling.apply(np.full((1, 1), median, dtype=np.float32))
    np.testing.assert_allclose(scaled[~kept], filled[0, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_extreme_values_stay_finite(dtype):
    """The largest float is a common mark for "no data"."""
    pixels = (gamma_image() / 200).astype(dtype)
    pixels[0, 0] = np.finfo(dtype).max
    pixels[0, 1] = np.finfo(dtype).min
    scaled = Normalization().fit(pixels).apply(pixels)
    assert np.isfinite(scaled).all()
    assert scaled[0, 0] > 1
    assert scaled[0, 1] < 0


@pytest.mark.parametrize("offset", [10**9, 4 * 10**9])
@pytest.mark.parametrize("dtype", ["uint32", "int64", "uint64", "float64"])
def test_a_wide_offset_does_not_eat_the_image(offset, dtype):
    pixels = np.arange(256)[None]
    how = Normalization()
    wanted = how.fit(pixels).apply(pixels)
    shifted = (pixels + offset).astype(dtype)
    np.testing.assert_allclose(how.fit(shifted).apply(shifted), wanted, atol=1e-6)


def test_fixed_values_of_single_channels():
    how = Normalization(method="fixed", ranges=((0, 10), (100, 300)))
    pixels = np.array([[[0.0, 5, 20]], [[100.0, 200, 0]]], dtype=np.float32)
    scaled = how.fit(pixels).apply(pixels)
    np.testing.assert_allclose(scaled, [[[0, 0.5, 2]], [[0, 0.5, -0.5]]], atol=1e-7)
    with pytest.raises(BadModel, match="2 channels, not of 1"):
        how.fit(pixels[:1])


@pytest.mark.parametrize(
    ("clip", "least", "most"),
    [((0.0, 1.0), 0, 1), ((None, 1.0), -0.5, 1), ((0.0, None), 0, 1.5)],
)
def test_limits_of_normalised_values(clip, least, most):
    pixels = np.array([[-5.0, 0, 10, 15]])
    how = Normalization(method="fixed", lower=0, upper=10, clip=clip)
    scaled = how.fit(pixels).apply(pixels)
    assert (scaled.min(), scaled.max()) == (least, most)


def test_eps_is_added_to_the_spread_but_constant_images_stay_0():
    pixels = np.array([[0.0, 0.1], [3.0, 3.0]])
    scaled = Normalization(lower=0, upper=100, eps=0.1).fit(pixels).apply(pixels)
    np.testing.assert_allclose(scaled, [[0, 0.5], [0, 0]], atol=1e-7)


def test_what_is_not_used_is_not_written():
    """So that the hashes of files that know nothing of it stay the same."""
    assert not {"ranges", "eps", "clip"} & Normalization().model_dump().keys()
    how = Normalization(method="fixed", ranges=((0, 1),), eps=1e-6, clip=(0, None))
    assert Normalization.model_validate_json(how.model_dump_json()) == how
