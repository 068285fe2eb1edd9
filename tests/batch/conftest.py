"""A folder with a model and images."""

import pytest
from batch_cases import make_images
from cli_cases import threshold_model


@pytest.fixture
def place(own_library, tmp_path):
    """A folder with ``m.safetensors`` and ``in/``."""
    threshold_model(tmp_path / "m.safetensors")
    make_images(tmp_path / "in")
    return tmp_path
