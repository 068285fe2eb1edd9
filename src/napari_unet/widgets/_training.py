"""The fine-tuning of one click: base model out, child process, new model in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from napari_unet.errors import BadInput, BadModel, BadOutput
from napari_unet.files.atomic import check_writable, sweep
from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import (
    SUFFIX,
    data_dir,
    library_dir,
    list_models,
    load_model,
    plain_name,
)
from napari_unet.steps import ChildSteps, Progress, in_child
from napari_unet.training.project_file import BASE_FILE, SNAPSHOT_FILE, read_document
from napari_unet.training.settings import TrainingStep, View
from napari_unet.widgets._slots import hold

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unet.models.model import Model
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.settings import TrainingSettings

    Child = ChildSteps[TrainingStep, View | None, Path]


def trainings_dir() -> Path:
    """Return the folder of what trainings work on (it may not exist yet)."""
    return data_dir() / "trainings"


@dataclass(frozen=True)
class LiveStep(TrainingStep):
    """A step with the outlines of what is previewed, and of what that is."""

    view: View | None = None


@dataclass(frozen=True, eq=False)
class NewModel:
    """What a training has made.

    Parameters
    ----------
    name : str
        In the library: another than was wanted if that was taken meanwhile.
    model : Model
        Better than what it started from, or as good.
    """

    name: str
    model: Model


@dataclass(frozen=True, eq=False)
class Begin:
    """What a new training needs.

    Parameters
    ----------
    base : Model or None
        To start from; None for an untrained network.
    ndim : int
        Of an untrained network.
    annotations : list of Annotation
        Their arrays are copied or read in the worker.
    settings : TrainingSettings
    """

    base: Model | None
    ndim: Literal[2, 3]
    annotations: list[Annotation]
    settings: TrainingSettings


class LiveTraining(Generator[LiveStep, View | None, NewModel]):
    """Fine-tunes in a child process; the new model lands in the library.

    Annotations, base model and snapshots lie in a folder of their own until the
    model is there, so that a training that was stopped can be resumed.

    Parameters
    ----------
    name : str
        Of the new model, free in the library.
    begin : Begin or None
        None resumes the training of that name.
    view : View or None
        What is previewed first; send others.
    """

    def __init__(self, name: str, begin: Begin | None, view: View | None):
        self._child: Child | None = None
        self._cancelled = False
        self._learns = False
        self._steps = self._run(name, begin, view)

    def send(self, value: View | None) -> LiveStep:
        """Do one step."""
        return self._steps.send(value)

    def throw(self, kind: Any, value: Any = None, traceback: Any = None, /) -> LiveStep:
        """Raise where it stands, which ends the child."""
        return self._steps.throw(kind if value is None else value)

    def cancel(self) -> None:
        """Ask for the end from another thread, without waiting for it."""
        self._cancelled = True
        if self._child is not None:
            self._child.cancel()

    def _run(
        self, name: str, begin: Begin | None, view: View | None
    ) -> Generator[LiveStep, View | None, NewModel]:
        yield LiveStep(0, 1, "preparing")
        folder = trainings_dir() / name
        lock = hold(folder)
        if lock is None:
            raise BadOutput(
                f"{name!r} is being trained in another window. Choose another name."
            )
        try:
            if begin is not None:
                yield from _save_steps(folder, name, begin)
            path = yield from self._train(folder, name, begin is None, view)
            yield LiveStep(1, 1, "reading the new model")
            model = load_model(path)
            shutil.rmtree(folder, ignore_errors=True)
            return NewModel(path.name.removesuffix(SUFFIX), model)
        except (BadInput, BadModel):
            # It would not even begin again; what it has learnt is kept.
            if not self._learns:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            sweep(library_dir())  # of a child that was killed while it wrote
            if not (folder / SNAPSHOT_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()

    def _train(
        self, folder: Path, name: str, resume: bool, view: View | None
    ) -> Generator[LiveStep, View | None, Path]:
        from napari_unet.training.fine_tune import fine_tune_project_steps

        library = library_dir()
        library.mkdir(parents=True, exist_ok=True)
        check_writable(library)
        self._child = in_child(
            fine_tune_project_steps,
            folder,
            library / f"{name}{SUFFIX}",
            resume=resume,
            view=view,
        )
        if self._cancelled:
            self._child.cancel()
        with closing(self._child):
            return (yield from self._follow(self._child, view))

    def _follow(
        self, child: Child, view: View | None
    ) -> Generator[LiveStep, View | None, Path]:
        """Pass on views between steps only, so that each preview has one view."""
        waiting: View | None = None
        forward: View | None = None
        yield LiveStep(0, 1, "starting")
        while True:
            try:
                step = child.send(forward)
            except StopIteration as stop:
                path: Path = stop.value
                return path
            self._learns = self._learns or step.loss is not None
            shown = None if step.preview is None else outlines(step.preview)
            seen = LiveStep(**vars(step) | {"preview": shown}, view=view)
            waiting = (yield seen) or waiting
            forward = None
            if step.loss is not None and waiting is not None:
                view = forward = waiting
                waiting = None


def _save_steps(
    folder: Path, name: str, begin: Begin
) -> Generator[LiveStep, View | None, None]:
    """Write down all that the training needs; nothing it uses changes any more."""
    from napari_unet.training.project import save_project_steps

    shutil.rmtree(folder, ignore_errors=True)  # of one that was stopped
    given = [replace(one, labels=np.array(one.labels)) for one in begin.annotations]
    for step in save_project_steps(
        folder, given, begin.settings, ndim=begin.ndim, name=name
    ):
        yield LiveStep(step.done, step.total, "copying the annotations")
    if begin.base is not None:
        save_model(begin.base, folder / BASE_FILE)


def outlines(objects: NDArray) -> NDArray[np.uint8]:
    """Return the edge pixels of objects in each plane.

    napari would find them itself, but while the user waits, and slowly.
    """
    edge = np.zeros(objects.shape, bool)
    for axis in (-2, -1):
        there, here = np.moveaxis(objects, axis, 0), np.moveaxis(edge, axis, 0)
        differ = there[1:] != there[:-1]
        here[1:] |= differ
        here[:-1] |= differ
    colours = objects % np.iinfo(np.uint8).max + 1
    return np.where(edge & (objects > 0), colours, 0).astype(np.uint8)


@dataclass(frozen=True)
class Stopped:
    """A training that can be resumed."""

    name: str
    step: int
    steps: int


def find_stopped_steps() -> Generator[Progress, None, Stopped | None]:
    """Look for a training that was stopped, the last one first; tidy up the others.

    Yields
    ------
    Progress
        Reading a snapshot takes a moment.
    """
    yield Progress(0, 1, "looking for trainings that were stopped")
    folders = list(trainings_dir().glob("*/"))
    for folder in sorted(folders, key=_last_change, reverse=True):
        lock = hold(folder)
        if lock is None:
            continue  # under way
        try:
            steps = read_document(folder).settings.steps
            from napari_unet.training.snapshot import read_snapshot  # and torch

            step = read_snapshot(folder / SNAPSHOT_FILE).snapshot.step
            return Stopped(folder.name, step, steps)
        except BadInput:  # nothing to go on from
            discard_training(folder.name)
        finally:
            lock.release()
    return None


def _last_change(folder: Path) -> float:
    return folder.stat().st_mtime


def discard_training(name: str) -> None:
    """Delete what a training that was stopped has left."""
    shutil.rmtree(trainings_dir() / name, ignore_errors=True)


def taken_names() -> set[str]:
    """Return what models and stopped trainings are called, in small letters."""
    stopped = (folder.name for folder in trainings_dir().glob("*/"))
    return {name.casefold() for name in [*list_models(), *stopped]}


def free_name(base: str) -> str:
    """Propose a name for the model that is made of another one."""
    taken = taken_names()
    stem = re.sub(r"-mine(-\d+)?$", "", plain_name(base)) or "new"
    name, number = f"{stem}-mine", 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-mine-{number}"
    return name
