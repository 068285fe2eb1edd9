"""The benchmark of objects: both ways make the same, of whatever it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from napari_unet.inference import runs, split
from napari_unet.inference.settings import ObjectSettings


@pytest.fixture(scope="module")
def benchmark(load):
    return load("objects")


def smooth_noise(rng, shape, sigma):
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return (noise - noise.min()) / max(np.ptp(noise), 1e-9)


def test_it_draws_about_as_many_objects_as_it_is_told(benchmark):
    probability = benchmark.draw_probabilities(600, 100)
    labels = benchmark.plain_labels(probability, ObjectSettings(0.5, 20))
    assert 85 <= labels.max() <= 100
    assert 0.2 < (labels > 0).mean() < 0.6


def test_both_ways_give_the_same_in_processes_of_their_own(benchmark):
    wanted = [ObjectSettings(0.5, 20, True, 1)]
    ((_, ours, peer),) = benchmark.compare(300, 25, wanted)
    assert ours["digest"] == peer["digest"]
    assert ours["objects"] == peer["objects"] > 15
    assert min(ours["labels"], ours["table"], peer["labels"], peer["table"]) > 0


def test_stages_make_the_same_on_one_core_and_on_all(benchmark):
    wanted = [ObjectSettings(0.5, 20), ObjectSettings(0.5, 20, True, 1)]
    found = benchmark.compare_cores(300, 25, wanted)
    probability = benchmark.draw_probabilities(300, 25)
    digests = [benchmark.digest(benchmark.find(probability, one)[0]) for one in wanted]
    for one in found.values():
        assert list(one["digests"].values()) == digests
        assert list(one["stages"]) == [
            "above the threshold",
            "connect, number",
            "paint",
            "table",
            "connect, number, split, grow by 1",
        ]


SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 60)] * 2), st.tuples(*[st.integers(1, 16)] * 3)
)


@given(
    shape=SHAPES,
    seed=st.integers(0, 999),
    sigma=st.sampled_from([0.5, 1, 2]),
    certain=st.booleans(),
    whole=st.booleans(),
    band=st.sampled_from([7, 100, 1 << 20]),
    cell=st.sampled_from([4, 9, 512]),
    wanted=st.builds(
        ObjectSettings,
        st.sampled_from([0.3, 0.5, 0.62]),
        st.integers(0, 8),
        st.booleans(),
        st.integers(0, 6),
    ),
)
@settings(max_examples=150, deadline=None)
def test_runs_and_whole_arrays_make_the_same(
    benchmark, shape, seed, sigma, certain, whole, band, cell, wanted
):
    rng = np.random.default_rng(seed)
    probability = smooth_noise(rng, shape, sigma).astype(np.float32)
    if certain:
        probability[rng.random(shape) < 0.05] = 0
    if whole:
        probability = np.rint(probability * 255).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "BAND", band)
        patch.setattr(split, "CELL", {2: cell, 3: cell})
        labels, table, _, _ = benchmark.find(probability, wanted)
    same, plain, _, _ = benchmark.find_plainly(probability, wanted)
    np.testing.assert_array_equal(labels, same)
    assert len(table["size"]) == labels.max()
    for name in plain if labels.any() else ():
        np.testing.assert_allclose(table[name], plain[name], rtol=1e-5, atol=1e-6)
