"""The fine-tuning of one click: base model out, child process, new model in."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.files.atomic import check_writable
from napari_unet.models.checkpoint import save_model
from napari_unet.models.library import SUFFIX, library_dir, list_models, load_model
from napari_unet.models.model import Model, default_passport
from napari_unet.network.unet import UNet
from napari_unet.steps import ChildSteps, in_child
from napari_unet.training.fine_tune import fine_tune_file_steps
from napari_unet.training.settings import TrainingSettings, TrainingStep, View

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from napari_unet.training.annotations import Annotation

    Child = ChildSteps[TrainingStep, View | None, Path]

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


@dataclass(frozen=True)
class LiveStep(TrainingStep):
    """A step, and of what its preview is."""

    view: View | None = None


class LiveTraining(Generator[LiveStep, View | None, Model]):
    """Fine-tunes in a child process; the new model lands in the library.

    Parameters
    ----------
    make_base : callable
        Returns the model to start from.
    annotations : sequence of Annotation
        Copies, except for the pixels of the images.
    settings : TrainingSettings
    name : str
        Of the new model, free in the library.
    view : View or None
        What is previewed first; send others.
    """

    def __init__(
        self,
        make_base: Callable[[], Model],
        annotations: Sequence[Annotation],
        settings: TrainingSettings,
        name: str,
        view: View | None,
    ):
        self._child: Child | None = None
        self._cancelled = False
        self._steps = self._run(make_base, annotations, settings, name, view)

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
        self,
        make_base: Callable[[], Model],
        annotations: Sequence[Annotation],
        settings: TrainingSettings,
        name: str,
        view: View | None,
    ) -> Generator[LiveStep, View | None, Model]:
        total = settings.steps
        yield LiveStep(0, total, "preparing")
        # Lazy pixels are read here, not in the child, which may lack their source.
        given = [replace(one, image=np.asarray(one.image)) for one in annotations]
        folder = library_dir()
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        with TemporaryDirectory(prefix="napari-unet-") as temporary:
            base = save_model(make_base(), Path(temporary) / f"base{SUFFIX}")
            self._child = in_child(
                fine_tune_file_steps,
                base,
                given,
                folder / f"{name}{SUFFIX}",
                settings,
                name=name,
                view=view,
            )
            del given
            if self._cancelled:
                self._child.cancel()
            with closing(self._child):
                path = yield from self._follow(self._child, total, view)
        yield LiveStep(total, total, "reading the new model")
        return load_model(path)

    def _follow(
        self, child: Child, total: int, view: View | None
    ) -> Generator[LiveStep, View | None, Path]:
        """Pass on views between steps only, so that each preview has one view."""
        waiting: View | None = None
        forward: View | None = None
        yield LiveStep(0, total, "starting")
        while True:
            try:
                step = child.send(forward)
            except StopIteration as stop:
                path: Path = stop.value
                return path
            waiting = (yield LiveStep(**vars(step), view=view)) or waiting
            forward = None
            if step.loss is not None and waiting is not None:
                view = forward = waiting
                waiting = None


def new_network(ndim: int) -> Model:
    """Return an untrained network; it gets the images' channels in the training."""
    network = UNet(
        1,
        2,
        base_channels=32 if ndim == 2 else 16,
        depth=4 if ndim == 2 else 3,
        ndim=ndim,
    )
    passport = default_passport(network).model_copy(update={"name": "new"})
    return Model(network.eval(), passport)


def free_name(base: str) -> str:
    """Propose a name for the model that is made of another one."""
    taken = {name.casefold() for name in list_models()}
    stem = re.sub(r"-mine(-\d+)?$", "", _FORBIDDEN.sub("-", base)).strip(" .") or "new"
    name, number = f"{stem}-mine", 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-mine-{number}"
    return name


def name_problem(name: str) -> str:
    """Say why a model cannot be called so, "" if it can."""
    if not name:
        return "Give the new model a name."
    if _FORBIDDEN.search(name) or name.startswith(".") or len(name.encode()) > 100:
        return "The name is also a file's: use up to 100 letters, digits, '-' and '_'."
    if name.casefold() in {known.casefold() for known in list_models()}:
        return f"There is a model {name!r} in the library: choose another name."
    return ""
