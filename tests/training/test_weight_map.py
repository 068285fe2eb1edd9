from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import distance_transform_edt

from napari_unet.errors import BadInput
from napari_unet.training import two_nearest as module
from napari_unet.training.two_nearest import two_nearest
from napari_unet.training.weight_map import border_weight_map, cut_gaps

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
# Beyond this distance no object matters with the default w0 and sigma.
REACH = 27


def discs(shape, count, seed, radius=(2, 6)):
    """Draw discs or balls that may overlap, the later ones on top."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    grid = np.indices(shape)
    for value in range(1, count + 1):
        centre = rng.uniform(0, shape).reshape(-1, *[1] * len(shape))
        labels[((grid - centre) ** 2).sum(0) < rng.uniform(*radius) ** 2] = value
    return labels


def brute_force(labels, w0, sigma, preset="paper", known=None):
    """The formulas, with one distance transform of the whole image an object."""
    known = np.ones(labels.shape, bool) if known is None else known
    distances = [np.full(labels.shape, np.inf)] * 2
    distances += [distance_transform_edt(labels != v) for v in np.unique(labels) if v]
    d1, d2 = np.sort(distances, axis=0)[:2]
    background = labels == 0
    weights = np.where(background, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)), 0)
    if preset == "falk":
        near = 0.1 + 0.9 * np.exp(-(d1**2) / (2 * 10**2))
        weights += np.where(background, near, 1)
    else:
        present = [c for c in (background, ~background) if (c & known).any()]
        for pixels in present:
            weights[pixels] += known.sum() / (len(present) * (pixels & known).sum())
    return np.where(known, weights, 0)


small_labels = arrays(
    st.sampled_from([np.uint8, np.int32, np.uint64]),
    array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=8),
    elements=st.integers(0, 4),
    fill=st.just(0),
)


@pytest.mark.parametrize("preset", ["paper", "falk"])
@pytest.mark.parametrize(
    ("shape", "count"),
    [((90, 120), 25), ((150, 70), 3), ((24, 40, 33), 15), ((64, 64), 200)],
)
def test_equals_brute_force(shape, count, preset):
    labels = cut_gaps(discs(shape, count, seed=count))
    w0, sigma = {"paper": (10, 5), "falk": (50, 6)}[preset]
    weights = border_weight_map(labels, preset=preset)
    assert weights.dtype == np.float32
    assert_allclose(weights, brute_force(labels, w0, sigma, preset), atol=1e-4, rtol=0)


@given(
    small_labels,
    st.sampled_from([0, 1e-6, 3, 200]),
    st.sampled_from([0.2, 5, 40]),
    st.sampled_from([None, "cpu"]),
)
def test_equals_brute_force_whatever_the_labels(labels, w0, sigma, device):
    weights = border_weight_map(labels, w0, sigma, device=device)
    assert_allclose(weights, brute_force(labels, w0, sigma), atol=1e-4, rtol=0)


@given(
    objects=arrays(
        np.int32,
        array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=12),
        elements=st.sampled_from([0, 0, 0, 1, 2, 3, 70_000, 2**31 - 1]),
    ),
    reach=st.integers(1, 14),
    block=st.sampled_from([1, 30, 10**6]),
)
@settings(deadline=None)
def test_by_torch_distances_are_exact_as_far_as_is_looked(objects, reach, block):
    """Also where a block ends, and for numbers that need 64 bits."""
    exact = [np.full(objects.shape, np.inf)] * 2
    exact += [distance_transform_edt(objects != v) for v in np.unique(objects) if v]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = two_nearest(objects, reach, "cpu")
    for distance, expected in zip(found, np.sort(exact, axis=0), strict=False):
        near = expected <= reach
        assert_array_equal(distance[near], expected[near].astype(np.float32))
        assert (distance[~near] >= expected[~near].astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(150, 130), (20, 60, 50)])
@pytest.mark.parametrize("preset", ["paper", "falk"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_by_torch_the_weights_are_the_same(shape, preset, device):
    labels = cut_gaps(discs(shape, 40, seed=0))
    weights = border_weight_map(labels, preset=preset, device=device)
    assert_allclose(weights, border_weight_map(labels, preset=preset), atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((70, 90), (4, 4)),
        ((11, 40, 30), (1, 4, 4)),
        ((25, 33, 26), (4, 4, 4)),
        ((40, 40), (1, 1)),
        ((0, 9), (0, 1)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_by_torch_blocks_do_not_show(shape, parts, device, monkeypatch):
    objects, reach = discs(shape, 30, seed=1), 6
    whole = two_nearest(objects, reach, "cpu")
    monkeypatch.setattr(module, "_BLOCK", 40 * 40)
    cores = list(module._cores(shape, reach))
    starts = [{core[axis].start for core in cores} for axis in range(len(shape))]
    assert len(cores) == np.prod(parts)
    assert not cores or tuple(map(len, starts)) == parts
    for one, other in zip(whole, two_nearest(objects, reach, device), strict=True):
        assert_array_equal(one, other)


@pytest.mark.parametrize(
    "shape", [(64, 1024, 1024), (64, 2048, 2048), (512, 512, 512), (4096, 4096)]
)
@pytest.mark.parametrize("reach", [27, 34])
def test_by_torch_large_images_are_cut_without_much_work_done_twice(shape, reach):
    """With the reach of both presets."""
    work, covered = 0, 0
    for core in module._cores(shape, reach):
        sides = [
            min(side.stop + reach, end) - max(side.start - reach, 0)
            for side, end in zip(core, shape, strict=True)
        ]
        assert np.prod(sides) <= module._BLOCK
        for axis, side in enumerate(core):  # what is around is let go of one by one
            sides[axis] = side.stop - side.start
            work += np.prod(sides) / len(shape)
        covered += np.prod(sides)
    assert covered == np.prod(shape)
    assert work < 2 * covered


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory."),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_full_gpu_leaves_the_weights_to_the_processor(monkeypatch, error, words):
    def full(*_):
        raise error(words)

    labels = cut_gaps(discs((60, 50), 10, seed=0))
    monkeypatch.setattr(module, "_nearest_in", full)
    weights = border_weight_map(labels, device="cpu")
    assert_array_equal(weights, border_weight_map(labels))


def test_other_errors_of_a_gpu_are_not_taken_for_a_full_one(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module, "_nearest_in", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        border_weight_map(discs((9, 9), 2, seed=0), device="cpu")


def test_unknown_pixels_weigh_nothing_and_do_not_count():
    labels = cut_gaps(discs((60, 60), 20, seed=0))
    known = np.zeros(labels.shape, bool)
    known[10:40, 5:50] = True
    weights = border_weight_map(labels, known=known)
    assert not weights[~known].any()
    expected = brute_force(labels, 10, 5, known=known)
    assert_allclose(weights, expected, atol=1e-4, rtol=0)
    assert not border_weight_map(labels, known=np.zeros_like(known)).any()
    falk = border_weight_map(labels, known=known, preset="falk")
    assert_array_equal(falk, border_weight_map(labels, preset="falk") * known)


def test_classes_have_equal_sums_and_mean_one():
    labels = discs((50, 50), 6, seed=1)
    weights = border_weight_map(labels, w0=0)
    assert weights.mean() == pytest.approx(1)
    assert weights[labels > 0].sum() == pytest.approx(weights[labels == 0].sum())


@pytest.mark.parametrize("value", [0, 7])
def test_one_class_alone_weighs_one(value):
    assert (border_weight_map(np.full((5, 6), value)) == 1).all()


def test_fewer_than_two_objects_make_no_border():
    labels = np.zeros((40, 40), np.uint16)
    labels[10, 10] = labels[20:30, 20:30] = 3  # one object in two pieces
    assert len(np.unique(border_weight_map(labels))) == 2
    empty = border_weight_map(np.zeros((4, 4), int), preset="falk")
    assert_allclose(empty, 0.1)
    assert (border_weight_map(np.ones((4, 4), int), preset="falk") == 1).all()


@given(st.integers(0, 10), st.integers(0, 10))
def test_shifting_the_image_shifts_the_weights(down, right):
    labels = np.zeros((80, 80), np.int32)
    labels[30:50, 30:50] = cut_gaps(discs((20, 20), 5, seed=2))
    weights = border_weight_map(labels)
    shifted = border_weight_map(np.roll(labels, (down, right), (0, 1)))
    assert_allclose(shifted, np.roll(weights, (down, right), (0, 1)), atol=1e-5)


@given(st.permutations(range(1, 9)))
def test_relabelling_changes_nothing(order):
    labels = discs((40, 40), 8, seed=3)
    renamed = np.array([0, *order], np.int64)[labels] * (2**32 // 9)
    for function in (border_weight_map, lambda x: cut_gaps(x) > 0):
        assert_array_equal(function(renamed), function(labels))


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", "uint32", "int64", "uint64", ">u2"]
)
def test_any_integer_type(dtype):
    labels = discs((40, 40), 8, seed=4)
    renamed = labels.astype(dtype)
    renamed[labels == 8] = np.iinfo(dtype).max
    before = renamed.copy()
    assert_array_equal(border_weight_map(renamed), border_weight_map(labels))
    cut = cut_gaps(renamed)
    assert cut.dtype == renamed.dtype
    assert_array_equal(cut > 0, cut_gaps(labels) > 0)
    assert_array_equal(renamed, before)


def test_flips_and_rotations_move_the_weights():
    labels = discs((30, 50), 10, seed=5)
    weights = border_weight_map(labels)
    assert_allclose(border_weight_map(labels[:, ::-1]), weights[:, ::-1], atol=1e-5)
    assert_allclose(border_weight_map(np.rot90(labels)), np.rot90(weights), atol=1e-5)


def test_volume_constant_along_an_axis_weighs_as_its_planes():
    labels = discs((40, 40), 8, seed=6)
    volume = np.repeat(labels[None], 3, axis=0)
    weights = border_weight_map(volume)
    assert_allclose(weights, np.broadcast_to(border_weight_map(labels), volume.shape))


def test_distant_objects_do_not_see_each_other():
    labels = np.zeros((20, 100), np.uint8)
    labels[:, :10], labels[:, 10 + REACH :] = 1, 2
    assert not np.ptp(border_weight_map(labels)[:, 10 : 10 + REACH])
    labels[:, 9 + REACH] = 2
    assert border_weight_map(labels, w0=1e4, balance_classes=False).max() > 1.001


def test_cost_does_not_grow_with_the_empty_image(monkeypatch):
    seen = []

    def counting(array):
        seen.append(array.size)
        return distance_transform_edt(array)

    module = "napari_unet.training.weight_map.distance_transform_edt"
    monkeypatch.setattr(module, counting)
    labels = np.zeros((1000, 1000), np.int32)
    labels[::100, ::100] = np.arange(1, 101).reshape(10, 10)
    border_weight_map(labels)
    assert len(seen) == 100
    assert max(seen) <= (2 * REACH + 1) ** 2


def test_touching_objects_are_parted():
    labels = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 2, 2], [3, 0, 0, 2]])
    # Below the first row both sides have the other among their earlier neighbours.
    expected = [[1, 1, 0, 2], [1, 0, 0, 2], [0, 0, 0, 2], [3, 0, 0, 2]]
    assert_array_equal(cut_gaps(labels), expected)
    stacked = np.repeat([[1], [2]], 3, axis=0) * np.ones(5, int)
    assert_array_equal(cut_gaps(stacked)[:, 0], [1, 1, 1, 0, 2, 2])
    assert_array_equal(cut_gaps(stacked.T)[0], [1, 1, 1, 0, 2, 2])


@given(small_labels)
def test_cut_gaps_equals_a_scan_pixel_by_pixel(labels):
    expected = labels.copy()
    steps = list(product((-1, 0, 1), repeat=labels.ndim))
    back = steps[: len(steps) // 2]
    assert len(back) == (4 if labels.ndim == 2 else 13)
    for place in np.ndindex(labels.shape):
        for step in back:
            other = tuple(np.add(place, step))
            inside = all(0 <= i < n for i, n in zip(other, labels.shape, strict=True))
            if inside and labels[other] not in (0, labels[place]):
                expected[place] = 0
    assert_array_equal(cut_gaps(labels), expected)


@given(small_labels)
def test_nothing_touches_after_cutting(labels):
    cut = cut_gaps(labels)
    assert_array_equal(cut_gaps(cut), cut)
    lost = (cut != labels).nonzero()
    assert not cut[lost].any()
    # What was lost lay at the border to another object.
    values = np.pad(labels, 1)
    around = [
        np.roll(values, step, range(labels.ndim))[(slice(1, -1),) * labels.ndim][lost]
        for step in product((-1, 0, 1), repeat=labels.ndim)
    ]
    assert all(len(set(place) - {0}) > 1 for place in zip(*around, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": np.zeros((3, 3))}, "whole numbers"),
        ({"labels": np.zeros(3, int)}, "2D or 3D"),
        ({"w0": -1}, "w0 is -1"),
        ({"sigma": 0}, "sigma is 0"),
        ({"sigma": np.nan}, "sigma is nan"),
        ({"w0": np.inf}, "w0 is inf"),
        ({"v": 2, "preset": "falk"}, "v is 2"),
        ({"sigma_balance": -1, "preset": "falk"}, "sigma_balance is -1"),
        ({"preset": "other"}, "no preset 'other'"),
        ({"known": np.ones((2, 2), bool)}, "mask of known pixels"),
        ({"known": np.ones((3, 3))}, "mask of known pixels"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(BadInput, match=message):
        border_weight_map(**{"labels": np.zeros((3, 3), int), **arguments})
