"""Fixtures that every folder of tests may use."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several test processes would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images, beside the checkout or where NAPARI_UNET_DATA says."""
    beside = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("NAPARI_UNET_DATA", beside)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set NAPARI_UNET_DATA")
    return folder
