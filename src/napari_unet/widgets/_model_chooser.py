"""Choose a model of the library, or a checkpoint file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QComboBox, QFileDialog, QHBoxLayout, QToolButton, QWidget

from napari_unet.models.library import list_models, load_model
from napari_unet.steps import Progress
from napari_unet.widgets._dock import narrow, while_alive
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari_unet.models.model import Model
    from napari_unet.widgets._session import Session


class ModelChooser(QWidget):
    """A list of models with a button "Open checkpoint…"; loads in a thread.

    A model that cannot be loaded leaves the one before in place.

    Parameters
    ----------
    session : Session
        Gets the loaded model.
    wanted : str
        Name or path of the model to begin with.
    on_change : callable
        Called when loading begins and ends.
    """

    def __init__(self, session: Session, wanted: str, on_change: Callable[[], None]):
        super().__init__()
        self._session = session
        self._on_change = on_change
        self.loading = ""
        self.loaded = ""  # name or path of the model in the session
        self._list = narrow(QComboBox())
        self._list.setToolTip("The network that finds the objects.")
        browse = QToolButton()
        browse.setText("…")
        browse.setToolTip("Open checkpoint…")
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._list, stretch=1)
        row.addWidget(browse)
        for name, path in list_models().items():
            self._add(name, name, str(path))
        if self._list.findData(wanted) < 0 and Path(wanted).is_file():
            self._add(Path(wanted).stem, wanted, wanted)
        self._list.setCurrentIndex(max(self._list.findData(wanted), 0))
        self._list.activated.connect(lambda _: self._load())
        browse.clicked.connect(self._browse)

    def begin(self) -> None:
        """Load the first model, once the dock that listens is complete."""
        if self._session.model is None:
            self._load()

    @property
    def chosen(self) -> str:
        """Name or path of the chosen model, "" if there is none at all."""
        return str(self._list.currentData() or "")

    def open_checkpoint(self, path: str) -> None:
        """Choose the model of a file, as "Open checkpoint…" does."""
        if self._list.findData(path) < 0:
            self._add(Path(path).stem, path, path)
        self._list.setCurrentIndex(self._list.findData(path))
        self._load()

    def _add(self, text: str, key: str, tooltip: str) -> None:
        self._list.addItem(text, key)
        last = self._list.count() - 1
        self._list.setItemData(last, tooltip, Qt.ItemDataRole.ToolTipRole)

    def _browse(self) -> None:
        path, _ = QFileDialog.getOpenFileName(
            self, "Open checkpoint", "", "Checkpoints (*.safetensors);;All files (*)"
        )
        if path:
            self.open_checkpoint(path)

    def _load(self) -> None:
        # Another choice while one is loading is taken up when that has ended.
        if self.loading or not self.chosen:
            return
        self.loading = self.chosen

        def load_steps(name: str) -> Generator[Progress, None, Model]:
            yield Progress(0, 1, "loading the model")
            return load_model(name)

        start_worker(
            load_steps(self.loading),
            title="Loading the model",
            on_progress=lambda step: None,
            on_result=self._on_loaded,
            on_error=self._on_failed,
            on_finished=self._on_finished,
        )
        self._on_change()

    @while_alive
    def _on_loaded(self, model: Model) -> None:
        self.loaded = self.loading
        self._session.model = model

    @while_alive
    def _on_failed(self, message: str) -> None:
        if self.chosen == self.loading:
            self._list.setCurrentIndex(self._list.findData(self.loaded))

    @while_alive
    def _on_finished(self) -> None:
        self.loading = ""
        if self.chosen and self.chosen != self.loaded:
            self._load()
        self._on_change()
