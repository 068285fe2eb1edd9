"""The annotations of a session on disk: in the user's project, or else kept safe."""

from __future__ import annotations

import hashlib
import os
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from threading import Lock
from typing import TYPE_CHECKING, Literal

import numpy as np

from napari_unet.errors import BadInput, BadOutput, UnetError
from napari_unet.models.library import data_dir
from napari_unet.steps import run_to_end
from napari_unet.training.project_file import PROJECT_FILE, is_project
from napari_unet.widgets._slots import hold, take_slot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from filelock import BaseFileLock
    from napari.layers import Image

    from napari_unet.steps import Progress
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.settings import TrainingSettings
    from napari_unet.widgets._slots import Slot


@dataclass(frozen=True)
class Choices:
    """How the user wants to train: see `training.project.Project`."""

    settings: TrainingSettings
    base: str
    ndim: Literal[2, 3]
    name: str


@dataclass(frozen=True, eq=False)
class Contents:
    """What a dock has to save.

    Parameters
    ----------
    images : list of Image
        The layers of the annotations.
    annotations : list of Annotation
        Of the layers' own arrays, which the user may go on changing.
    choices : Choices
    """

    images: list[Image]
    annotations: list[Annotation]
    choices: Choices


@dataclass(frozen=True, eq=False)
class _Unsaved:
    """What is to be saved, where, and how many changes there were before."""

    project: Path | None
    contents: Contents
    changes: int


class Autosave:
    """Knows what is on disk and what is not; saves from any thread.

    Everything goes to the user's project as long as all its images are there, and
    else to a folder of this session, which is offered later if it is not saved.

    Parameters
    ----------
    read : callable
        Returns what there is to save now, None if nothing is annotated. Called on
        the main thread, also after Qt has deleted the dock.
    """

    def __init__(self, read: Callable[[], Contents | None]):
        self.home = data_dir() / "autosave"
        self.project: Path | None = None  # of the user
        self.saved: datetime | None = None
        self._members: list[weakref.ref[Image]] = []  # of the project
        self._project_lock: BaseFileLock | None = None
        self._read = read
        self._changes = self._on_disk = 0
        self._kept: list[_Unsaved] = []  # before layers were removed, oldest first
        self.left_out = ""  # why the last save was not of everything
        self.left: Slot | None = None  # of another session, offered to the user
        self._slot: Slot | None = None
        self._restored: list[tuple[Slot, int]] = []  # and the change it was
        self._writing = Lock()
        self._keeping = Lock()  # while `_kept` is replaced, by whichever thread
        self._finished = False

    @property
    def is_needed(self) -> bool:
        """Whether something is not on disk."""
        return bool(self._kept) or self._on_disk < self._changes

    def note_change(self) -> None:
        """Something was painted, drawn or chosen."""
        self._changes += 1

    def note_removal(self) -> None:
        """An annotated layer is about to be removed: keep it until it is saved."""
        # Without a change since, as when all are removed, it is kept already.
        with self._keeping:
            self._kept = self._unsaved()

    def count_missing(self, images: list[Image]) -> int:
        """Return how many images of the project are not there any more.

        When none is there, the project is closed.
        """
        missing = sum(member() not in images for member in self._members)
        if missing == len(self._members):
            self.close_project()
            return 0
        return missing

    def opened(self, folder: Path, images: list[Image]) -> bool:
        """All annotations come from a project of the user: save there from now on.

        Parameters
        ----------
        folder : Path
            The project.
        images : list of Image
            Its layers.

        Returns
        -------
        bool
            False if the project is open in another window, which saves there.
        """
        if not self._join(folder, images):
            return False
        self._on_disk = self._changes
        return True

    def close_project(self) -> None:
        """Save in the folder of this session from now on."""
        self.project, self._members = None, []
        if self._project_lock is not None:
            self._project_lock.release()
            self._project_lock = None

    def _join(self, folder: Path, images: list[Image]) -> bool:
        if folder != self.project:
            lock = self._hold_project(folder)
            if lock is None:
                return False
            self.close_project()
            self.project, self._project_lock = folder, lock
        self._members = [weakref.ref(image) for image in images]
        return True

    def _hold_project(self, folder: Path) -> BaseFileLock | None:
        key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        return hold(self.home.with_name("open") / key)

    def restored(self) -> None:
        """What another session left is in the viewer, and not yet saved."""
        self._changes += 1
        if self.left is not None:
            self._restored.append((self.left, self._changes))
            self.left = None

    def discard(self) -> None:
        """Delete what another session left."""
        if self.left is not None:
            self.left.empty()
            self.left.lock.release()
            self.left = None

    def save_steps(self) -> Generator[Progress, None, Path] | None:
        """Return the steps that save what is not on disk, None if all is."""
        unsaved = self._unsaved()
        return self._autosave_steps(unsaved[0]) if unsaved else None

    def save_as_steps(self, folder: Path) -> Generator[Progress, None, Path]:
        """Return the steps that save everything in a project of the user."""
        contents = self._read()
        if contents is None:
            raise BadOutput("Nothing is annotated, so there is nothing to save.")
        if folder != self.project and is_project(folder):
            raise BadOutput(
                f"There is another project in {folder}. Open it, or choose another "
                "name."
            )
        return self._save_as_steps(_Unsaved(folder, contents, self._changes))

    def finish(self) -> None:
        """Save at the end what is not saved, and give this session's folder back."""
        with self._writing:
            if self._finished:
                return
            self._finished = True
        for unsaved in self._unsaved():
            with suppress(UnetError):  # nobody is there to be told
                run_to_end(self._autosave_steps(unsaved))
        restored = [slot for slot, _ in self._restored]
        for slot in restored:
            if not is_project(slot.folder):
                slot.empty()
        self.close_project()
        for held in (*restored, self.left, self._slot):
            if held is not None:
                held.lock.release()

    def _target(self, contents: Contents) -> Path | None:
        """Never leave an image out of the user's project without being told to."""
        there = all(member() in contents.images for member in self._members)
        return self.project if there else None

    def _unsaved(self) -> list[_Unsaved]:
        """Return what was kept, and what there is now if it has changed since."""
        unsaved, changes = list(self._kept), self._changes
        known = max([self._on_disk, *(one.changes for one in unsaved)])
        if known < changes and (contents := self._read()):
            unsaved.append(_Unsaved(self._target(contents), contents, changes))
        return unsaved

    def _save_as_steps(self, unsaved: _Unsaved) -> Generator[Progress, None, Path]:
        """Save all or nothing, and there from now on."""
        project, contents = unsaved.project, unsaved.contents
        assert project is not None
        with self._writing:
            yield from _write_steps(project, _frozen(contents))
            self._note_saved(unsaved, "")
            self._join(project, contents.images)
            self._leave_slot()
        return project

    def _autosave_steps(self, unsaved: _Unsaved) -> Generator[Progress, None, Path]:
        """Save what can be saved, and never less than there was in a project."""
        with self._writing, ExitStack() as locks:
            project, contents = unsaved.project, _frozen(unsaved.contents)
            if project is not None and project != self.project:  # closed meanwhile
                if (lock := self._hold_project(project)) is None:
                    project = None
                else:
                    locks.callback(lock.release)
            folder, left_out = project or self._own_folder(), ""
            try:
                yield from _write_steps(folder, contents)
            except BadInput as error:
                left_out = str(error)
                project, folder = None, self._own_folder()
                fitting = [
                    one for one in contents.annotations if _fits(folder, one, contents)
                ]
                if not fitting or len(fitting) == len(contents.annotations):
                    self._forget(unsaved)  # it must not be in the way of others
                    raise
                yield from _write_steps(folder, replace(contents, annotations=fitting))
            self._note_saved(unsaved, left_out)
            if project is not None and project == self.project:
                self._join(project, unsaved.contents.images)
                self._leave_slot()
        return folder

    def _note_saved(self, unsaved: _Unsaved, left_out: str) -> None:
        self.saved, self.left_out = datetime.now(), left_out
        self._forget(unsaved)
        if left_out:
            return  # tried again, as what does not fit may be mended
        self._on_disk = max(self._on_disk, unsaved.changes)
        # Lazy images may still be read from there until the session ends.
        for slot, change in self._restored:
            if change <= unsaved.changes:
                (slot.folder / PROJECT_FILE).unlink(missing_ok=True)

    def _forget(self, unsaved: _Unsaved) -> None:
        """Keep only what is newer, or of another project."""
        changes, project = unsaved.changes, unsaved.project
        with self._keeping:
            self._kept = [
                one
                for one in self._kept
                if one is not unsaved
                and (one.changes > changes or one.project not in (None, project))
            ]

    def _own_folder(self) -> Path:
        if self._slot is None:
            self._slot = take_slot(self.home)
        return self._slot.folder

    def _leave_slot(self) -> None:
        if self._slot is not None:
            self._slot.empty()
            self._slot.lock.release()
            self._slot = None


def _frozen(contents: Contents) -> Contents:
    """Copy what is painted: what is painted meanwhile is another change."""
    annotations = [
        replace(one, labels=np.array(one.labels)) for one in contents.annotations
    ]
    return replace(contents, annotations=annotations)


def _write_steps(folder: Path, contents: Contents) -> Generator[Progress, None, Path]:
    from napari_unet.training.project import save_project_steps

    choices = contents.choices
    return (
        yield from save_project_steps(
            folder,
            contents.annotations,
            choices.settings,
            base=choices.base,
            ndim=choices.ndim,
            name=choices.name,
        )
    )


def _fits(folder: Path, annotation: Annotation, contents: Contents) -> bool:
    """Tell whether an annotation could be saved alone; the first step checks it."""
    steps = _write_steps(folder, replace(contents, annotations=[annotation]))
    try:
        next(steps)
    except BadInput:
        return False
    finally:
        steps.close()
    return True
