"""Choose a model of the library, or a checkpoint file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QMenu,
    QToolButton,
    QWidget,
)

from napari_unet.models.family import read_entry
from napari_unet.models.library import list_models, load_model
from napari_unet.network.config import UNetConfig
from napari_unet.steps import Progress
from napari_unet.widgets._dock import narrow, while_alive
from napari_unet.widgets._engine import import_torch, when_drawn
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari_unet.models.model import Model, Passport
    from napari_unet.widgets._session import Session


CHECKPOINTS = (
    "Models (*.safetensors *.pt *.pth *.ckpt *.onnx *.zip *.yaml);;All files (*)"
)
NEW_NETWORKS = {"new network, 2D": 2, "new network, 3D": 3}


class _List(QComboBox):
    """Says when it is opened."""

    def __init__(self, before_popup: Callable[[], None]):
        super().__init__()
        self._before_popup = before_popup

    def showPopup(self) -> None:
        """Open the list, which may have grown meanwhile."""
        self._before_popup()
        super().showPopup()


class ModelChooser(QWidget):
    """A list of models with a button "Open checkpoint…"; loads in a thread.

    A model that cannot be loaded leaves the one before in place. The list follows
    the session, whichever dock changes that.

    Parameters
    ----------
    session : Session
        Gets the loaded model.
    wanted : str
        Name or path of the model to begin with.
    on_change : callable
        Called when loading begins and ends.
    offer_new : bool
        Whether an untrained network can be chosen, too. It is not loaded.
    """

    def __init__(
        self,
        session: Session,
        wanted: str,
        on_change: Callable[[], None],
        *,
        offer_new: bool = False,
    ):
        super().__init__()
        self._session = session
        self._on_change = on_change
        self.loading = ""
        self.loaded = ""  # name or path of the model in the session
        self._list = narrow(_List(self._refill))
        self._list.setToolTip("The network that finds the objects.")
        self._list.setPlaceholderText("choose a model")
        browse = QToolButton()
        browse.setText("…")
        browse.setToolTip(
            "Open checkpoint…\nThe arrow: a folder of bioimage.io or smp."
        )
        browse.setPopupMode(QToolButton.ToolButtonPopupMode.MenuButtonPopup)
        browse.setMinimumWidth(browse.fontMetrics().horizontalAdvance("…") + 32)
        menu = QMenu(browse)
        for text, act in (
            ("Checkpoint…", self._browse),
            ("Folder…", self._browse_folder),
        ):
            action = menu.addAction(text)
            assert action is not None
            action.triggered.connect(act)
        browse.setMenu(menu)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._list, stretch=1)
        row.addWidget(browse)
        self._files: list[str] = []  # outside of the library
        self._offer_new = offer_new
        self._fill(session.source or wanted)
        if self._list.currentIndex() < 0:
            self._list.setCurrentIndex(0)
        self.loaded = session.source
        session.events.model.connect(self._on_session)
        session.library_changed.connect(self._on_library)
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

    @property
    def passport(self) -> Passport | None:
        """What the library says of the chosen model, which need not be loaded."""
        path = list_models().get(self.chosen)
        header = None if path is None else read_entry(self.chosen, path).header
        return None if header is None else header.passport

    @property
    def new_ndim(self) -> int:
        """2 or 3 if a new network is chosen, else 0."""
        return 0 if self.chosen else NEW_NETWORKS.get(self._list.currentText(), 0)

    def open_checkpoint(self, path: str) -> None:
        """Choose the model of a file, as "Open checkpoint…" does."""
        if self._list.findData(path) < 0:
            self._files.append(path)
        self._fill(path)
        self._load()

    def choose(self, name: str, ndim: int) -> None:
        """Choose as the user does.

        Parameters
        ----------
        name : str
            In the library, or the path of a checkpoint; "" for a new network.
        ndim : int
            Of a new network.
        """
        if name and name == self.loaded:
            self._fill(name)
            self._on_change()
        elif name:
            self.open_checkpoint(name)
        else:
            new = next(text for text, number in NEW_NETWORKS.items() if number == ndim)
            self._list.setCurrentText(new)
            self._load()

    def _fill(self, wanted: str) -> None:
        """List the library, the files that were opened, and what is wanted."""
        models = list_models()
        path = Path(wanted)
        if wanted not in [*models, *self._files] and (
            path.is_file() or (path.is_absolute() and path.is_dir())
        ):
            self._files.append(wanted)
        self._list.clear()
        for name, path in models.items():
            self._add(name, name, str(path))
        for file in self._files:
            self._add(Path(file).stem, file, file)
        for text in NEW_NETWORKS if self._offer_new else ():
            self._add(
                text, "", "Learns from nothing but your annotations; takes longer."
            )
        # The data of a new network is "", too.
        self._list.setCurrentIndex(self._list.findData(wanted) if wanted else -1)

    def _refill(self) -> None:
        """List the library as it is now; what is chosen stays."""
        self._follow("", "")

    @while_alive
    def _on_session(self, model: Model) -> None:
        if self._session.source:
            self.loaded = self._session.source
            # What was chosen while this one was loading is loaded next.
            if not self.loading or self.chosen == self.loading:
                self._fill(self.loaded)

    @while_alive
    def _on_library(self, old: str, new: str) -> None:
        """List the library anew after a model was added, renamed or removed."""
        if old and self.loaded == old:
            self.loaded = new
        if old and new and self.loading == old:
            self.loading = new
        self.loaded = self.loaded or self._session.source  # brought back
        self._follow(old, new)
        self._on_change()

    def _follow(self, old: str, new: str) -> None:
        """Choose again what is chosen, by its new name if it was renamed."""
        chosen, text = self.chosen, self._list.currentText()
        if text in NEW_NETWORKS and not chosen:
            self._fill("")
            self._list.setCurrentText(text)
        else:
            self._fill(new if old and chosen == old else chosen or self.loaded)

    def _add(self, text: str, key: str, tooltip: str) -> None:
        self._list.addItem(text, key)
        last = self._list.count() - 1
        self._list.setItemData(last, tooltip, Qt.ItemDataRole.ToolTipRole)

    def _browse(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Open checkpoint", "", CHECKPOINTS)
        if path:
            self.open_checkpoint(path)

    def _browse_folder(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Open a model's folder")
        if path:
            self.open_checkpoint(path)

    def _load(self) -> None:
        # Another choice while one is loading is taken up when that has ended.
        if self.loading:
            return
        if not self.chosen:
            self._on_change()
            return
        self.loading = self.chosen
        self._on_change()
        when_drawn(self, self._start_loading)

    @while_alive
    def _start_loading(self) -> None:
        start_worker(
            _load_steps(self.loading),
            title="Loading the model",
            on_progress=lambda step: None,
            on_result=self._on_loaded,
            on_error=self._on_failed,
            on_finished=self._on_finished,
        )

    @while_alive
    def _on_loaded(self, model: Model) -> None:
        self._session.source = self.loaded = self.loading
        self._session.model = model

    @while_alive
    def _on_failed(self, message: str) -> None:
        if self.loading in self._files:
            self._files.remove(self.loading)
        wanted = self.loaded if self.chosen == self.loading else self.chosen
        self._fill(wanted)

    @while_alive
    def _on_finished(self) -> None:
        self.loading = ""
        if self.chosen and self.chosen != self.loaded:
            self._load()
        self._on_change()


def _load_steps(name: str) -> Generator[Progress, None, Model]:
    yield Progress(0, 1, "loading the model")
    import_torch()
    model = load_model(name)
    _make_ready(model)
    return model


def _make_ready(model: Model) -> None:
    """Make now what runs a network on the CPU, rather than at the first click.

    That takes as long as a small image. On a GPU it is left to the click: it would
    take memory there from whoever only looks at the dock.
    """
    import torch

    from napari_unet.inference.backends import Backend

    is_unet = isinstance(model.network.config, UNetConfig)
    if is_unet and not torch.accelerator.is_available():
        Backend(model.network, "cpu").close()
