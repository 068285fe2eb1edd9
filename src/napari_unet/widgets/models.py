"""The Models dock: the library, what its models are, and what can be done to them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QPushButton, QSizePolicy

from napari_unet.errors import BadModel, UnetError
from napari_unet.models.family import family_trees, read_entry
from napari_unet.models.library import (
    correct_model,
    export_model,
    find_model,
    is_bundled,
    load_model,
    rename_model,
)
from napari_unet.models.trash import list_removed, remove_model, restore_model
from napari_unet.network.program_config import ProgramConfig
from napari_unet.steps import Progress
from napari_unet.widgets import _session
from napari_unet.widgets._dock import Dock, Fold, while_alive
from napari_unet.widgets._engine import load_engine
from napari_unet.widgets._models_facts import FactsForm
from napari_unet.widgets._models_import import (
    AddressRow,
    ImportButton,
    Importer,
    dropped,
    short,
)
from napari_unet.widgets._models_passport import PassportView
from napari_unet.widgets._models_preview import FactsPreview
from napari_unet.widgets._models_tree import ModelTree
from napari_unet.widgets._models_work import WorkRow

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import napari.viewer
    from qtpy.QtGui import QDragEnterEvent, QDropEvent, QHideEvent, QShowEvent

    from napari_unet.models.family import Entry
    from napari_unet.models.model import Model

NAME = "Models"
_OURS = "napari-unet model (*.safetensors)"
_PACKAGE = "bioimage.io package (*.zip)"


class ModelsWidget(Dock):
    """Look at models, choose one, bring others in, name and remove them.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Its image is previewed while facts are told.
    session : Session, optional
        The model shared with the other docks.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        session: _session.Session = _session.session,
    ):
        super().__init__()
        self._session = session
        self._entry: Entry | None = None  # that is shown
        self._build(viewer)
        self.setAcceptDrops(True)
        session.events.model.connect(self._on_session)
        session.library_changed.connect(self._on_session)
        self.refresh(session.source)
        load_engine(self, "models.safety", "inference.predict")

    # --- building -------------------------------------------------------------

    def _build(self, viewer: napari.viewer.Viewer) -> None:
        self._tree = ModelTree(self._on_choice, self._rename)
        self.column.addWidget(self._tree)
        self.column.addLayout(self._buttons())
        self._address = AddressRow(self.import_file)
        self.column.addWidget(self._address)
        self._use = QPushButton("Use")
        self._use.setMinimumHeight(36)
        font = self._use.font()
        font.setBold(True)
        self._use.setFont(font)
        self._use.clicked.connect(lambda: self._load(self._tree.chosen))
        self.column.addWidget(self._use)
        self._work = WorkRow(
            self._refresh_buttons, lambda: self._session.library_changed.emit("", "")
        )
        self._importer = Importer(self._work, self._show_imported)
        self._work.say("Choose a model: Use hands it to the other docks.")
        self.column.addWidget(self._work)
        self._passport = PassportView()
        self.column.addWidget(self._passport)
        self._preview = FactsPreview(viewer, lambda: self._form.facts())
        self._form = FactsForm(self._correct, self._preview.request)
        self._fold = Fold("Facts")
        self._fold.setToolTip("Tell what the file of an imported model does not say.")
        self._fold.addWidget(self._preview)
        self._fold.addWidget(self._form)
        self._fold.toggled.connect(self._preview.open)
        self.column.addWidget(self._fold)
        self.column.addStretch(1)

    def _buttons(self) -> QHBoxLayout:
        self._import = ImportButton(self.import_file, lambda: self._address.ask())
        self._export = QPushButton("Export…")
        self._name = QPushButton("Rename")
        self._remove = QPushButton("Remove")
        self._export.clicked.connect(lambda: self._browse_export())
        self._name.clicked.connect(lambda: self._tree.edit_name())
        self._remove.clicked.connect(lambda: self._remove_or_restore())
        row = QHBoxLayout()
        for button in (self._import, self._export, self._name, self._remove):
            button.setMinimumWidth(0)
            button.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
            row.addWidget(button)
        return row

    # --- showing --------------------------------------------------------------

    def showEvent(self, event: QShowEvent | None) -> None:
        """Other programs may have changed the library meanwhile."""
        super().showEvent(event)
        self.refresh()
        self._preview.open(self._fold.isExpanded())

    def hideEvent(self, event: QHideEvent | None) -> None:
        """Leave nothing of the preview in the viewer."""
        super().hideEvent(event)
        self._preview.open(False)

    def refresh(self, wanted: str = "") -> None:
        """Show the library as it is now.

        Parameters
        ----------
        wanted : str
            The model to choose; by default the one that is chosen.
        """
        self._tree.fill(family_trees(), list_removed(), self._session.source, wanted)
        self._on_choice()

    @while_alive
    def _on_session(self, *_: object) -> None:
        self.refresh()

    def _on_choice(self) -> None:
        """Show what is known of the chosen model."""
        name, removed = self._tree.chosen, self._tree.chosen_removed
        entry = None
        try:
            if removed:
                entry = read_entry(removed, list_removed()[removed].path)
            elif name:
                entry = read_entry(name, find_model(name))
        except (BadModel, KeyError):  # it has gone meanwhile
            entry = None
        if entry != self._entry:  # what was typed into the form stays
            self._entry = entry
            self._show(entry)
        self._refresh_buttons()

    def _show(self, entry: Entry | None) -> None:
        header = None if entry is None else entry.header
        self._passport.show_entry(entry)
        self._preview.show_entry(entry)
        self._form.show_facts(header, self._why_not_changed())
        QTimer.singleShot(0, self._fit_fold)

    @while_alive
    def _show_form(self) -> None:
        """Scroll to the form that is to be filled in."""
        self.ensureWidgetVisible(self._form.save)
        self.ensureWidgetVisible(self._fold)

    @while_alive
    def _fit_fold(self) -> None:
        """Give the form the height that it needs, once Qt knows it."""
        if self._fold.isExpanded():
            self._fold.expand(animate=False)

    def _why_not_changed(self) -> str:
        """Say why the chosen model cannot be renamed, removed or corrected."""
        if self._work.busy:
            return self._work.busy
        if self._tree.chosen_removed:
            return "It was removed: restore it first."
        name = self._tree.chosen
        if not name:
            return "No model is chosen."
        return "It came with napari-unet and stays as it is." * is_bundled(name)

    def _refresh_buttons(self) -> None:
        name, entry = self._tree.chosen, self._entry
        missing = self._work.busy or ("" if name else "Choose a model of the library.")
        broken = "" if entry is None else entry.problem
        in_use = name and name == self._session.source
        _enable(
            self._use,
            missing or broken or ("It is in use." if in_use else ""),
            "Segment, Fine-tune and Batch go on with it.",
        )
        _enable(
            self._import,
            self._work.busy,
            "Copy a model of others into the library. Or drop it here.",
        )
        tip = "Save it as a file or as a bioimage.io package, to pass it on or keep."
        if not self._can_be_package:
            tip = (
                "Save it as a file, to pass it on or keep. A bioimage.io package "
                "cannot be made of a network that runs as it is."
            )
        _enable(self._export, missing or broken, tip)
        why_not = self._why_not_changed()
        _enable(self._name, why_not, "Type another name for it in the list (F2).")
        if self._tree.chosen_removed:
            self._remove.setText("Restore")
            _enable(self._remove, self._work.busy, "Bring it back into the library.")
        else:
            self._remove.setText("Remove")
            tip = "Put it into the trash of the library, which keeps it for 30 days."
            _enable(self._remove, why_not, tip)
        self._form.set_why_not(why_not or broken)
        self._address.set_why_not(self._work.busy)
        self._importer.go_on()

    # --- what takes time ------------------------------------------------------

    def _load(self, name: str) -> None:
        def show(model: Model) -> None:
            self._session.source = name
            self._session.model = model
            self._work.say(f"{name!r} is used now, also in the other docks.")
            self.refresh(name)

        self._do(f"Loading {name!r}", lambda: load_model(name), show)

    def import_file(self, source: str) -> None:
        """Copy a model into the library, as soon as nothing else is being done.

        Parameters
        ----------
        source : str
            Path of a file or folder, or a web address.
        """
        self._importer.add([source])

    def _show_imported(self, source: str, name: str) -> None:
        self._session.library_changed.emit("", name)
        self.refresh(name)
        self._work.say(f"{short(source)} is in the library as {name!r}.")
        entry = self._entry
        if entry is not None and entry.header is not None:
            if not entry.header.passport.history:  # nobody has told of it
                self._fold.expand(animate=False)
                QTimer.singleShot(0, self._show_form)
                self._work.say(f"{name!r} is in the library. Check its facts below.")

    def export_file(self, name: str, path: str, *, overwrite: bool = True) -> None:
        """Copy a model out of the library.

        Parameters
        ----------
        name : str
            In the library.
        path : str
            Of the file; a bioimage.io package if it ends in ``.zip``.
        overwrite : bool
            Whether a file that is there is replaced.
        """
        self._do(
            f"Exporting {name!r}",
            lambda: export_model(name, path, overwrite=overwrite),
            lambda written: self._work.say(f"{name!r} was saved as {written}."),
        )

    def _correct(self, changes: dict[str, Any]) -> None:
        name = self._tree.chosen

        def show(_: None) -> None:
            self._work.say(f"The facts of {name!r} are saved.")
            if self._session.source == name:
                self._load(name)
            else:
                self._session.library_changed.emit(name, name)

        self._do(f"Saving {name!r}", lambda: correct_model(name, changes), show)

    def _do(
        self, title: str, work: Callable[[], Any], on_result: Callable[[Any], None]
    ) -> None:
        """Do something short in a thread; the buttons wait until it has ended."""

        def work_steps() -> Generator[Progress, None, Any]:
            yield Progress(0, 1)
            return work()

        self._work.run(title, work_steps(), on_result)

    def dragEnterEvent(self, event: QDragEnterEvent | None) -> None:
        """Take files, folders and addresses, unless something is being done."""
        if event is not None and dropped(event.mimeData()) and not self._work.busy:
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent | None) -> None:
        """Import what was dropped, one after the other."""
        if event is not None and (sources := dropped(event.mimeData())):
            event.acceptProposedAction()
            # The program that it was dragged from waits for this to return.
            QTimer.singleShot(0, partial(self._importer.add, sources))

    # --- what is done at once -------------------------------------------------

    @property
    def _can_be_package(self) -> bool:
        """Whether others could rebuild the chosen model's network."""
        header = None if self._entry is None else self._entry.header
        return header is not None and not isinstance(header.config, ProgramConfig)

    def _browse_export(self) -> None:
        name = self._tree.chosen
        kinds = [_OURS, *([_PACKAGE] if self._can_be_package else [])]
        path, kind = QFileDialog.getSaveFileName(
            self, "Export", f"{name}.safetensors", ";;".join(kinds)
        )
        if not path:
            return
        wanted = Path(path)
        if kind == _PACKAGE and wanted.suffix != ".zip":
            wanted = Path(path.removesuffix(".safetensors") + ".zip")
        # Only what the dialog has asked about is replaced.
        self.export_file(name, str(wanted), overwrite=wanted == Path(path))

    def _rename(self, old: str, new: str) -> None:
        idle = not self._work.busy  # else its file may be being written
        if idle and new != old and self._try(lambda: rename_model(old, new)):
            _session.follow_rename(self._session, old, new)
            self._work.say(
                f"{old!r} is called {new!r} now.", lambda: self._rename(new, old)
            )
            self.refresh(new)
        else:
            self.refresh(old)

    def _remove_or_restore(self) -> None:
        if removed := self._tree.chosen_removed:
            self._restore(removed)
            return
        name = self._tree.chosen
        was_used = name == self._session.source
        if self._try(lambda: remove_model(name)):
            if was_used:
                self._session.source = ""
            self._session.library_changed.emit(name, "")
            still = "; the docks still have it" * was_used
            self._work.say(
                f"{name!r} is in the trash{still}.",
                lambda: self._restore(name, use=was_used),
            )
        self.refresh()

    def _restore(self, name: str, *, use: bool = False) -> None:
        if self._try(lambda: restore_model(name)):
            if use and not self._session.source:
                self._session.source = name
            self._session.library_changed.emit("", name)
            self._work.say(f"{name!r} is back in the library.")
        self.refresh(name)

    def _try(self, change: Callable[[], object]) -> bool:
        """Change the library, or say why it cannot be changed."""
        try:
            change()
        except UnetError as error:
            show_error(str(error))
            self._work.say(str(error))
            return False
        return True


def _enable(button: QPushButton, why_not: str, tip: str) -> None:
    button.setEnabled(not why_not)
    button.setToolTip(why_not or tip)
