from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
from desk import Desk, intensity_model
from models_desk import ModelsDesk, fine_tune
from tune_desk import TuneDesk, weak_model

from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import library_dir, load_model
from napari_unet.widgets._session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qtpy.QtWidgets import QApplication

    from napari_unet.models.model import Model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings and models of a test are its own."""
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def no_widgets_left(qapp: QApplication) -> Iterator[None]:
    """Every test closes the windows that it opened."""
    before = set(qapp.topLevelWidgets())
    yield
    qapp.processEvents()
    left = [w for w in set(qapp.topLevelWidgets()) - before if w.isVisible()]
    assert not left


@pytest.fixture
def desk(make_napari_viewer, qtbot) -> Callable[..., Desk]:
    """Open a viewer with the dock; by default with the model of bright pixels."""

    def open_desk(model: Model | None = None, *, show: bool = False) -> Desk:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of napari's own start
            viewer = make_napari_viewer(show=show)
        return Desk(viewer, qtbot, Session(model or intensity_model()))

    return open_desk


@pytest.fixture
def tune_desk(make_napari_viewer, qtbot) -> Callable[..., TuneDesk]:
    """Open a viewer with both docks and a model that knows nothing yet."""

    def open_desk() -> TuneDesk:
        if not library_dir().exists():
            library_dir().mkdir(parents=True)
            save_model(weak_model(), library_dir() / "weak")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of napari's own start
            viewer = make_napari_viewer()
        return TuneDesk(viewer, qtbot, Session(load_model("weak"), "weak"))

    return open_desk


@pytest.fixture
def models_desk(make_napari_viewer, qtbot) -> Callable[..., ModelsDesk]:
    """Open a viewer; the library has "bright" (in use) and "mine", made of it."""

    def open_desk(**options) -> ModelsDesk:
        library_dir().mkdir(parents=True)
        save_model(intensity_model(), library_dir() / "bright")
        fine_tune("bright", "mine")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of napari's own start
            viewer = make_napari_viewer(**options)
        desk = ModelsDesk(viewer, qtbot, Session(load_model("bright"), "bright"))
        qtbot.wait(50)  # until it is shown
        return desk

    return open_desk
