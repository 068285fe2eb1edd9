"""Save and open annotation projects; keep what nobody has saved."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import (
    QApplication,
    QFileDialog,
    QHBoxLayout,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_unet.errors import UnetError
from napari_unet.steps import Progress
from napari_unet.widgets import _session
from napari_unet.widgets._autosave import Autosave
from napari_unet.widgets._dock import TextLabel, while_alive
from napari_unet.widgets._offer import Offer
from napari_unet.widgets._slots import find_left
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import napari.viewer
    from napari.layers import Image
    from napari.qt.threading import GeneratorWorker

    from napari_unet.training.project import Project
    from napari_unet.widgets._autosave import Contents
    from napari_unet.widgets._pairs import Pairs
    from napari_unet.widgets._slots import Slot

DELAY = 20_000  # ms from the first change to the autosave
_SHARE = 0.1  # of the time may be spent with saving
_MEMORY = "Project"


class ProjectPanel(QWidget):
    """Two buttons, a line that says what is saved, and an offer to restore.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Before layers are removed from it, what they hold is kept.
    pairs : Pairs
        What is annotated.
    read : callable
        Returns what there is to save, None if nothing is annotated. Also called
        when Qt has deleted the dock.
    on_open : callable
        Puts a project into the viewer and returns its image layers.
    on_words : callable
        Gets a sentence about what was done.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        pairs: Pairs,
        read: Callable[[], Contents | None],
        on_open: Callable[[Project], list[Image]],
        on_words: Callable[[str], None],
    ):
        super().__init__()
        self._pairs = pairs
        self._read = read
        self._on_open = on_open
        self._on_words = on_words
        self._autosave = Autosave(read)
        self._worker: GeneratorWorker | None = None
        self._problem = ""
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(DELAY)
        self._timer.timeout.connect(self._save_unsaved)
        self._build()
        viewer.layers.events.removing.connect(self._on_removing)
        # Whichever comes first: the end of the program, or that of the dock.
        app = QApplication.instance()
        if app is not None:
            app.aboutToQuit.connect(self._on_quit)
        self.destroyed.connect(partial(_finish, self._autosave))
        self._look_for_leftovers()
        self.refresh()

    def _build(self) -> None:
        self.save = QPushButton("Save project…")
        self.save.clicked.connect(lambda: self._save())
        self.open = QPushButton("Open project…")
        self.open.clicked.connect(lambda: self._open())
        self.line = TextLabel()
        self.offer = Offer(
            "Restore",
            "Put the images and their annotations into the viewer, beside what is "
            "there.",
            self._restore,
            self._discard,
        )
        row = QHBoxLayout()
        row.addWidget(self.save, stretch=1)
        row.addWidget(self.open, stretch=1)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(4)
        column.addLayout(row)
        column.addWidget(self.line)
        column.addWidget(self.offer)

    # --- what is there ------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether something is being saved or opened, or soon will be."""
        return self._worker is not None or self._timer.isActive()

    @while_alive
    def changed(self) -> None:
        """Something was painted, drawn or chosen: save it within `DELAY`."""
        self._autosave.note_change()
        if not self._timer.isActive():
            self._timer.start()

    def refresh(self) -> None:
        """Show what can be done and what is saved."""
        images = [pair.image for pair in self._pairs.all()]
        missing = self._autosave.count_missing(images)
        folder, idle = self._autosave.project, self._worker is None
        annotated = bool(images)
        self.save.setText("Save project" if folder else "Save project…")
        self.save.setEnabled(idle and annotated)
        self.open.setEnabled(idle)
        busy = "Something is being saved or opened."
        if idle and not annotated:
            self.save.setToolTip("Nothing is annotated, so there is nothing to save.")
        elif idle:
            self.save.setToolTip(
                "Images, annotations, regions and settings, as plain files in "
                + (f"{folder}." if folder else "a new folder.")
            )
        else:
            self.save.setToolTip(busy)
        self.open.setToolTip(
            "Put the images of a project and their annotations into the viewer, beside "
            "what is there."
            if idle
            else busy
        )
        self.line.setText(self._describe(annotated, missing))

    def _describe(self, annotated: bool, missing: int) -> str:
        autosave = self._autosave
        if self._problem:
            return f"⚠ {self._problem}"
        if autosave.left_out and autosave.is_needed:
            return f"⚠ Not saved: {autosave.left_out} All else is kept safe."
        if not annotated or (autosave.saved is None and autosave.project is None):
            return ""
        at = f" at {autosave.saved:%H:%M}" if autosave.saved else ""
        if autosave.project is None:
            return f"Kept safe{at}, but in no project."
        name = autosave.project.name
        short = name if len(name) < 25 else f"{name[:23]}…"
        if missing:
            what = "1 image" if missing == 1 else f"{missing} images"
            return f"{what} of {short} removed: Save project to agree."
        if autosave.is_needed:
            return f"Changed since {short} was saved{at}."
        return f"{short} is saved{at}."

    # --- saving -------------------------------------------------------------------

    def _save(self) -> None:
        folder = self._autosave.project or self._ask_where()
        if folder is None:
            return
        try:
            steps = self._autosave.save_as_steps(folder)
        except UnetError as error:
            show_error(str(error))
            return
        self._run(steps, "Saving the project", self._on_saved)

    def _ask_where(self) -> Path | None:
        contents = self._read()
        if contents is None:
            return None
        name = contents.annotations[0].name.replace("/", "-").strip(" .")
        start = self._last_folder() / f"{name or 'annotations'}.project"
        path, _ = QFileDialog.getSaveFileName(
            self, "Save the annotations in a new folder", str(start)
        )
        if not path:
            return None
        _session.remember(_MEMORY, {"folder": str(Path(path).parent)})
        return Path(path)

    def _save_unsaved(self) -> None:
        if self._worker is not None:
            return  # at its end it is looked at again
        steps = self._autosave.save_steps()
        if steps is not None:
            self._run(steps, "", partial(self._pace, time.monotonic()))

    @while_alive
    def _pace(self, started: float, folder: Path) -> None:
        """Save what takes long less often, to leave the computer to the user."""
        took = 1000 * (time.monotonic() - started)
        self._timer.setInterval(max(DELAY, int(took / _SHARE)))

    @while_alive
    def _on_saved(self, folder: Path) -> None:
        self._on_words("The project is saved. Changes will be saved there, too.")

    @while_alive
    def _on_removing(self, event: Any) -> None:
        self._autosave.note_removal()

    def _on_quit(self) -> None:
        self._autosave.finish()

    # --- opening ------------------------------------------------------------------

    def _open(self) -> None:
        path = QFileDialog.getExistingDirectory(
            self, "Open an annotation project", str(self._last_folder())
        )
        if not path:
            return
        folder = Path(path)
        if folder == self._autosave.project:
            self._on_words(f"{folder.name} is open already.")
            return
        _session.remember(_MEMORY, {"folder": str(folder.parent)})
        self._run(
            _load_steps(folder), "Opening the project", partial(self._opened, folder)
        )

    @while_alive
    def _opened(self, folder: Path, project: Project) -> None:
        alone = not self._pairs.all()
        images = self._on_open(project)
        words = f"{folder.name} is open."
        if not alone:
            self._autosave.close_project()
            words += " There are other annotations, too: save all as a new project."
        elif not self._autosave.opened(folder, images):
            words += " Another window saves there: save this as a new project."
        self._on_words(words)

    def _last_folder(self) -> Path:
        return Path(str(_session.recall(_MEMORY).get("folder", Path.home())))

    # --- what was left ------------------------------------------------------------

    def _look_for_leftovers(self) -> None:
        home = self._autosave.home

        def find_steps() -> Generator[Progress, None, Slot | None]:
            yield Progress(0, 1, "looking for unsaved annotations")
            return find_left(home)

        start_worker(
            find_steps(),
            title="",
            on_progress=lambda step: None,
            on_result=self._offer,
            on_error=lambda message: None,
            on_finished=lambda: None,
        )

    @while_alive
    def _offer(self, slot: Slot | None) -> None:
        self._autosave.left = slot
        self.offer.show_text(
            ""
            if slot is None
            else f"Annotations of {slot.saved:%d %B, %H:%M} were not saved."
        )

    def _restore(self) -> None:
        left = self._autosave.left
        if left is not None and self._worker is None:
            steps = _load_steps(left.folder)
            self._run(steps, "Restoring the annotations", self._restored)

    @while_alive
    def _restored(self, project: Project) -> None:
        self._on_open(project)
        self._autosave.restored()
        self._on_words("The annotations are restored. Save them as a project.")
        self.changed()
        self._offer(None)
        self._look_for_leftovers()

    def _discard(self) -> None:
        if self._worker is None:
            self._autosave.discard()
            self._offer(None)
            self._look_for_leftovers()

    # --- work in a thread ---------------------------------------------------------

    def _run(
        self,
        steps: Generator[Progress, None, Any],
        title: str,
        on_result: Callable[[Any], None],
    ) -> None:
        self._problem = ""
        self._worker = start_worker(
            steps,
            title=title,
            on_progress=lambda step: None,
            on_result=on_result,
            on_error=self._on_error,
            on_finished=self._on_finished,
        )
        self.refresh()

    @while_alive
    def _on_error(self, message: str) -> None:
        self._problem = message

    @while_alive
    def _on_finished(self) -> None:
        self._worker = None
        if self._autosave.is_needed and not self._timer.isActive():
            self._timer.start()
        self.refresh()


def _finish(autosave: Autosave) -> None:
    autosave.finish()


def _load_steps(folder: Path) -> Generator[Progress, None, Project]:
    yield Progress(0, 1, "opening the project")
    from napari_unet.training.project import load_project

    return load_project(folder)
