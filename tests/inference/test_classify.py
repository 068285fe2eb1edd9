"""What is kept of the probabilities: pixel by pixel, by the rules in words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_unet.inference.classify import code_type, encode, quantise, to_codes

KINDS = [
    ("objects",),
    ("region",),
    ("objects", "objects"),
    ("region", "objects"),
    ("objects", "background", "region"),
]


def code_of(pixel, kinds, threshold: float) -> int:
    """The rule for one pixel, whose probabilities add up to 1 with the background's."""
    one = 255 if pixel.dtype == np.uint8 else 1
    values = [float(value) for value in pixel]
    best = values.index(max(values))
    rest = np.float32(one) - np.float32(sum(np.float32(v) for v in pixel))
    if kinds[best] == "objects" and values[best] > 0:
        return 2 * (best + 1) + (pixel[best] > np.float32(threshold) * one)
    if kinds[best] == "region" and values[best] > rest:
        return 2 * (best + 1)
    return 0


@st.composite
def predictions(draw):
    kinds = draw(st.sampled_from(KINDS))
    shape = len(kinds), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    levels = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255)))
    levels //= len(kinds)  # together at most 1
    if draw(st.booleans()):
        return kinds, levels
    return kinds, (levels / 256).astype(np.float32)  # exact, as are the sums


@given(predictions(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
@settings(deadline=None)
def test_codes_follow_the_rule(prediction, threshold):
    kinds, probabilities = prediction
    codes = encode(probabilities, kinds, threshold)
    assert codes.dtype == code_type(kinds)
    for place in np.ndindex(codes.shape):
        pixel = probabilities[(slice(None), *place)]
        assert codes[place] == code_of(pixel, kinds, threshold)


@given(predictions(), st.sampled_from([0.2, 0.5]))
@settings(deadline=None)
def test_codes_of_all_classes_are_those_of_the_foreground(prediction, threshold):
    kinds, values = prediction
    values = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    everything = np.concatenate([1 - values.sum(axis=0, keepdims=True), values])
    found = to_codes(kinds, threshold)(torch.from_numpy(everything))
    np.testing.assert_array_equal(found[0], encode(values, kinds, threshold))


def test_many_classes_have_wider_codes():
    kinds = ["objects"] * 200
    probabilities = np.zeros((200, 1, 2), np.float32)
    probabilities[199, 0, 1] = 0.9
    assert encode(probabilities, kinds, 0.5).tolist() == [[0, 401]]


def test_arrays_of_any_order_that_cannot_be_written():
    probabilities = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    wanted = encode(probabilities, ["objects"], 0.5)
    probabilities.setflags(write=False)
    turned = probabilities[:, ::-1, ::-1]
    np.testing.assert_array_equal(encode(turned, ["objects"], 0.5), wanted[::-1, ::-1])


@given(hnp.arrays(np.float32, (1, 30), elements=st.floats(0, 1, width=32)))
def test_quantised_zero_is_background_for_certain(values):
    found = quantise(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(found == 0, values == 0)
    wanted = np.maximum(np.rint(values * np.float32(255)), (values > 0).astype("f4"))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_quantised_objects_are_those_above_the_threshold(threshold):
    """But for what is as near to the threshold as half a step."""
    values = np.random.default_rng(0).random((1, 100, 100), dtype=np.float32)
    quantised = quantise(torch.from_numpy(values)).numpy()
    exact = encode(values, ["objects"], threshold)
    differ = exact != encode(quantised, ["objects"], threshold)
    assert np.abs(values[0][differ] - threshold).max(initial=0) <= 0.5 / 255 + 1e-6
