"""Pixels on their way to a device and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_unet.inference import transfers
from napari_unet.inference.transfers import count_by_sorting, make_transfers
from napari_unet.models.normalize import Normalization, count_values

SMALL = ["uint8", "int8", "uint16", "int16"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
    ),
]


@given(
    pixels=st.sampled_from(SMALL).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=3, max_dims=4))
    ),
    method=st.sampled_from(["percentile", "mean_std"]),
    clip=st.sampled_from([None, (0.0, None), (-1.0, 1.0)]),
)
@settings(deadline=None)
def test_devices_normalise_integers_as_the_processor_does(pixels, method, clip):
    scaling = Normalization(method=method, clip=clip).fit(pixels)
    found = scaling.apply_to_tensor(torch.from_numpy(pixels))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), scaling.apply(pixels))


@given(
    st.sampled_from([*SMALL, "bool"]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=20))
    ),
    st.booleans(),
)
def test_values_are_counted(values, across):
    values = values.T if across else values
    counts = count_values(values)
    found, times = np.unique(values, return_counts=True)
    least = np.iinfo(values.dtype).min if values.dtype.kind == "i" else 0
    assert counts.sum() == values.size
    np.testing.assert_array_equal(counts[found.astype(int) - least], times)


def test_large_arrays_are_counted_in_blocks():
    values = np.random.default_rng(0).integers(0, 999, (3000, 900), np.uint16)
    np.testing.assert_array_equal(
        count_values(values)[:999], np.bincount(values.ravel())
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*SMALL, "uint32", "float32", "float64"])
def test_uploads_are_normalised_and_come_back(device, dtype):
    pixels = np.random.default_rng(0).integers(0, 100, (2, 50, 70)).astype(dtype)
    scaling = Normalization().fit(pixels)
    mover = make_transfers(torch.device(device))
    image = mover.upload(pixels, scaling)
    pending = mover.compute(image, lambda: 2 * image[0])
    np.testing.assert_allclose(pending(), 2 * scaling.apply(pixels), rtol=1e-6)


@given(
    st.sampled_from([*SMALL, "bool"]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=20))
    ),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_sorting_counts_alike(values, across):
    values = values.T if across else values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers, "_BLOCK", 100)
        patch.setattr(transfers, "_COPIED", 9)
        counts = count_by_sorting(values, torch.device("cpu"))
    np.testing.assert_array_equal(counts, count_values(values))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", SMALL)
def test_devices_count(device, dtype):
    info = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max, (99, 77), dtype)
    counts = make_transfers(torch.device(device)).count(values)
    np.testing.assert_array_equal(counts, count_values(values))
