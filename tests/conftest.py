"""Fixtures that every folder of tests may use."""

import gc
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several test processes would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Spare the collector all that the test modules have imported: torch, napari."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images, beside the checkout or where NAPARI_UNET_DATA says."""
    beside = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("NAPARI_UNET_DATA", beside)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set NAPARI_UNET_DATA")
    return folder


@pytest.fixture
def small_new_models(monkeypatch):
    """Let the models that are trained from scratch be tiny."""
    from napari_unet.network.unet import UNet

    class Small(UNet):
        def __init__(self, *sizes, **options):
            super().__init__(*sizes, **{**options, "base_channels": 2, "depth": 1})

    monkeypatch.setattr("napari_unet.training.adapt.UNet", Small)


@pytest.fixture
def own_library(tmp_path, monkeypatch) -> Path:
    """Folder of the user's own models, which is this test's; it is not there yet."""
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"
