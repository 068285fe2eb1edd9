"""The public names, and the main job through them."""

import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

import napari_unet
from napari_unet import errors


@pytest.mark.parametrize("name", napari_unet.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(napari_unet, name)
    assert value.__name__ == name
    assert value.__doc__


def test_names_are_sorted_and_complete():
    assert napari_unet.__all__ == sorted(napari_unet.__all__)
    assert set(napari_unet.__all__) == set(napari_unet._WHERE)


def test_a_star_import_brings_them_all():
    code = (
        "from napari_unet import *\n"
        f"assert not set({napari_unet.__all__!r}) - set(dir())"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Unet'"):
        napari_unet.Unet  # noqa: B018
    assert not hasattr(napari_unet, "utils")


def test_version():
    assert napari_unet.__version__ == version("napari-unet")


def test_errors_are_one_family_with_the_agreed_exit_codes():
    codes = {
        "BadModel": 2,
        "BadInput": 1,
        "BadOutput": 4,
        "OutOfMemory": 5,
        "Cancelled": 130,
        "Partial": 3,
    }
    for name, code in codes.items():
        error = getattr(errors, name)
        assert issubclass(error, errors.UnetError)
        # superqt's workers swallow RuntimeError.
        assert not issubclass(error, RuntimeError)
        assert error.exit_code == code


def test_the_lines_of_the_contract(tmp_path):
    """What people script against: model, predict, segment, save, load."""
    torch.manual_seed(0)
    network = napari_unet.UNet(in_channels=1, num_classes=2, depth=2, base_channels=4)
    model = napari_unet.Model(network)
    assert [info.kind for info in model.passport.classes] == ["background", "objects"]
    stack = np.random.default_rng(0).integers(0, 4000, (3, 50, 61), dtype=np.uint16)
    probabilities = napari_unet.predict(stack, model, axes="ZYX")
    assert probabilities.shape == (2, 3, 50, 61)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-6)
    threshold = float(np.median(probabilities[1]))
    labels = napari_unet.segment(stack, model, axes="ZYX", threshold=threshold)
    assert labels.shape == stack.shape
    np.testing.assert_array_equal(labels > 0, probabilities[1] > threshold)
    path = napari_unet.save_model(model, tmp_path / "mine.safetensors")
    loaded = napari_unet.load_model(path)
    assert loaded.network.config == network.config
    np.testing.assert_array_equal(
        napari_unet.predict(stack, loaded, axes="ZYX"), probabilities
    )
    weights = napari_unet.border_weight_map(labels[0], w0=10, sigma=5)
    assert weights.shape == labels[0].shape
    assert weights.dtype == np.float32
