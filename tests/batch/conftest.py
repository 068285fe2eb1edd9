"""A folder with a model and images."""

import pytest
from batch_cases import make_images
from cli_cases import threshold_model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with ``m.safetensors`` and ``in/``."""
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path / "home"))
    threshold_model(tmp_path / "m.safetensors")
    make_images(tmp_path / "in")
    return tmp_path
