"""Runs of pixels against whole arrays, by bands and chunks on several threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from whole_image import EXAMPLES

from napari_unet.inference import runs as runs_module
from napari_unet.inference import spread
from napari_unet.inference.grow import grow_objects
from napari_unet.inference.objects import first_of_runs
from napari_unet.inference.runs import Runs

SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 30)] * 2), st.tuples(*[st.integers(1, 10)] * 3)
)


@pytest.fixture(autouse=True, scope="module")
def in_small_parts():
    """On three threads, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "count_cores", lambda: 3)
        patch.setattr(runs_module, "BAND", 20)
        patch.setattr(runs_module, "CHUNK", 5)
        yield


def patches(shape, seed: int, count: int = 4) -> np.ndarray:
    """Numbers up to a count, in patches of a few pixels."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 0.7)
    return (np.digitize(smooth, np.linspace(-0.2, 0.4, count))).astype(np.uint16)


@given(shape=SHAPES, seed=st.integers(0, 999))
@settings(max_examples=60 * EXAMPLES, deadline=None)
def test_an_array_comes_back_and_its_values_add_up(shape, seed):
    labels = patches(shape, seed)
    runs = Runs.find(labels)
    assert (runs.sizes > 0).all()
    assert (np.diff(runs.start) > 0).all()
    np.testing.assert_array_equal(runs.array(), labels)
    for values in (
        np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8),
        np.random.default_rng(seed).random(shape, dtype=np.float32),
    ):
        flat = values.reshape(-1).astype(np.float64)
        edges = zip(runs.flat, runs.flat + runs.sizes, strict=True)
        wanted = [flat[start:stop].sum() for start, stop in edges]
        np.testing.assert_allclose(runs.sums(values), wanted, rtol=1e-6)


@given(shape=SHAPES, seed=st.integers(0, 999), corners=st.booleans())
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_joined_is_what_touches_and_has_the_same_value(shape, seed, corners):
    labels = patches(shape, seed)
    runs = Runs.find(labels)
    component, count = runs.join(corners=corners)
    found = runs.valued(component + 1).array()
    wanted, total = np.zeros(shape, dtype=int), 0
    structure = ndimage.generate_binary_structure(len(shape), 1 + corners)
    for value in range(1, int(labels.max()) + 1):
        pieces, number = ndimage.label(labels == value, structure)
        wanted[pieces > 0] = pieces[pieces > 0] + total
        total += number
    assert count == total
    pairs = np.unique([found.ravel(), wanted.ravel()], axis=1).T
    assert len(pairs) == len(np.unique(wanted))
    # Numbered by their first runs.
    numbers, first = np.unique(component, return_index=True)
    np.testing.assert_array_equal(numbers, np.arange(count))
    assert (np.diff(first) > 0).all()


@given(shape=SHAPES, seed=st.integers(0, 999))
@settings(max_examples=60 * EXAMPLES, deadline=None)
def test_the_first_pixel_that_others_have_too(shape, seed):
    labels, mask = patches(shape, seed), patches(shape, seed + 1) > 1
    count = int(labels.max()) + 1
    found = Runs.find(labels).met(Runs.find(mask.astype(np.uint8)))
    both = Runs.find(labels * mask)
    np.testing.assert_array_equal(
        first_of_runs(found, count), first_of_runs(both, count)
    )


@given(shape=SHAPES, seed=st.integers(0, 999), pixels=st.integers(1, 5))
@settings(max_examples=100 * EXAMPLES, deadline=None)
def test_growing_by_bands_is_that_of_a_distance_transform(shape, seed, pixels):
    labels = patches(shape, seed)
    labels *= np.random.default_rng(seed).random(shape) < 0.1
    distance, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    wanted = np.where(distance <= pixels, labels[tuple(nearest)], 0)
    if not labels.any():
        wanted[:] = 0
    grown = grow_objects(labels, pixels)
    assert grown.dtype == labels.dtype
    np.testing.assert_array_equal(grown, wanted)
