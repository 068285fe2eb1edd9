"""The benchmark of the weight map compares what it says, in small."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark(load):
    return load("weight_map")


@pytest.mark.parametrize("shape", [(96, 96), (16, 40, 40)])
def test_its_objects_touch_but_for_the_gap(benchmark, shape):
    labels = benchmark.tessellation(shape, 12)
    assert len(np.unique(labels)) == 13
    assert 0.1 < np.mean(labels == 0) < 0.6
    first, second = benchmark.two_smallest(labels, np.arange(1, 13))
    gap = (labels == 0) & (first + second <= 2 * np.sqrt(len(shape)))
    assert gap.sum() > np.mean(labels == 0) * labels.size / 10


@pytest.mark.parametrize(
    ("full", "device"), [(False, None), (True, None), (True, "cpu")]
)
@pytest.mark.parametrize("shape", [(300, 280), (20, 40, 40)])
def test_both_give_the_same_weights(benchmark, shape, full, device):
    count = 50 if shape[0] > 100 else 12
    rows = benchmark.compare(shape, count, full=full, device=device)
    assert [row[0] for row in rows] == ["paper", "falk"]
    for _, ours, peer, difference in rows:
        assert min(ours, peer) > 0
        assert difference < 1e-4
