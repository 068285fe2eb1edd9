"""Fine-tuning: from a model and annotations to a better model."""

from __future__ import annotations

import datetime
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from napari_unet.errors import BadModel
from napari_unet.files.atomic import bad_output
from napari_unet.inference.backends import choose_device
from napari_unet.models.checkpoint import build_unet, model_sha256, save_model
from napari_unet.models.library import SUFFIX, load_model
from napari_unet.models.model import Model, TrainingRecord, check_model
from napari_unet.steps import run_to_end
from napari_unet.training.adapt import untrained_model
from napari_unet.training.annotations import check_annotations
from napari_unet.training.data import prepare_steps
from napari_unet.training.loop import Training, is_better
from napari_unet.training.optimizer import learning_rate
from napari_unet.training.project import base_of, load_project
from napari_unet.training.project_file import SNAPSHOT_FILE
from napari_unet.training.settings import TrainingSettings, TrainingStep, View
from napari_unet.training.snapshot import read_snapshot

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from napari_unet.training.annotations import Annotation
    from napari_unet.training.data import TrainingData
    from napari_unet.training.project import Project

__all__ = [
    "TrainingSettings",
    "TrainingStep",
    "View",
    "fine_tune",
    "fine_tune_project_steps",
    "fine_tune_steps",
]

_UNCHANGED = "The model was not changed."
_LIBRARIES = ("napari-unet", "torch", "numpy", "scipy", "scikit-image")


def fine_tune_steps(
    model: Model,
    annotations: Sequence[Annotation],
    settings: TrainingSettings | None = None,
    *,
    name: str = "",
    snapshot: str | Path | None = None,
    resume: bool = False,
    view: View | None = None,
) -> Generator[TrainingStep, View | None, Model]:
    """Train a copy of a model; see `fine_tune`.

    Not to go on is to pause, to close is to cancel. Sending a `View` asks for
    previews of another part, the first one with the next step.

    Yields
    ------
    TrainingStep
        Once for each step of the optimiser, and heartbeats in between.
    """
    settings = settings or TrainingSettings()
    path = None if snapshot is None else Path(snapshot)
    training = yield from _start_steps(model, annotations, settings, path, resume, view)
    try:
        problem = yield from _learn_steps(training, settings)
        yield from training.tell(message="choosing the threshold", note=problem)
        made = _finish_steps(model, training, annotations, settings, name, problem)
        return (yield from made)
    finally:
        training.close()


def _learn_steps(
    training: Training, settings: TrainingSettings
) -> Generator[TrainingStep, View | None, str]:
    """Do all steps; return why they ended before, in words, if they failed."""
    state, problem = training.state, ""
    while state.step < settings.steps and state.stale < settings.patience:
        step = state.step + 1
        rate = learning_rate(settings, step)
        loss = yield from training.learn_steps(step, rate)
        if not math.isfinite(loss):
            problem = (
                f"The training was stopped at step {step}: its loss is not a finite "
                "number any more. Use a lower learning rate."
            )
            break
        scores, best, preview = None, False, None
        due = step % settings.validate_every == 0 or step == settings.steps
        if due:
            scores = yield from training.look_steps()
            best = training.keep_if_best(step, scores)
        if due or training.view_is_new:
            preview = yield from training.preview_steps()
        state.step = step
        training.save_in_time(has_looked=due)
        yield from training.tell(
            message=f"step {step} of {settings.steps}",
            loss=loss,
            learning_rate=rate,
            scores=scores,
            best=best,
            preview=preview,
        )

    if problem and state.best is None:
        raise BadModel(f"{problem} {_UNCHANGED}")
    return problem


def _start_steps(
    model: Model,
    annotations: Sequence[Annotation],
    settings: TrainingSettings,
    path: Path | None,
    resume: bool,
    view: View | None,
) -> Generator[TrainingStep, View | None, Training]:
    """Prepare everything; score the model, or go on where a snapshot ends."""
    check_model(model)
    check_annotations(annotations)
    if model.untrainable_reason:
        raise BadModel(model.untrainable_reason)
    chosen = choose_device(settings.device)
    device = torch.device(chosen.name)
    saved = read_snapshot(path) if resume and path and path.exists() else None
    planned = settings.model_copy(update=saved.plan if saved else {})
    data = yield from prepare_steps(model, annotations, planned, device)
    identity = _identity(model, data, settings)
    if saved:
        saved.check(identity)
    training = Training(data, annotations, settings, device, view)
    training.saves_to(path, identity)
    for note in [chosen.note, *data.notes]:
        yield from training.tell(note=note)
    if saved:
        training.restore(saved)
        for step, scores in training.state.history:
            yield from training.tell(done=step, scores=scores, message="resuming")
    else:
        scores = yield from training.score_base_steps()
        yield from training.tell(scores=scores, message="before training")
    return training


def fine_tune(
    model: Model,
    annotations: Sequence[Annotation],
    settings: TrainingSettings | None = None,
    *,
    name: str = "",
    snapshot: str | Path | None = None,
    resume: bool = False,
) -> Model:
    """Make a model better with annotated images.

    A part of the annotations is held out. The result is the network that was best on
    it, by F1 of the objects and then by the loss, whether or not it is better than
    the model that it started from: its passport has the scores of both.

    Parameters
    ----------
    model : Model
        To start from; it is not changed. ``Model(UNet(...))`` trains from scratch.
    annotations : sequence of Annotation
        Classes or channels that the model does not have replace its last or first
        layer.
    settings : TrainingSettings, optional
        How to train.
    name : str, optional
        Of the new model.
    snapshot : path, optional
        A file from which the training can be resumed, written every minute and
        whenever the held-out part is scored; on a GPU 10 s apart.
    resume : bool, optional
        Go on from the snapshot if there is one. On a CPU the result is that of a
        training that was never stopped, bit by bit.

    Returns
    -------
    Model
        Its passport names the parent, the data, the settings and the scores, and
        recommends the threshold, growth and smallest object that are best on the
        held-out part.

    Raises
    ------
    BadInput
        If nothing can be learnt from the annotations, or the snapshot belongs to
        another training.
    BadModel
        If the loss stops being finite before the model became better.
    BadOutput
        If the snapshot cannot be written.
    OutOfMemory
        If not even a step with one small patch fits.
    """
    return run_to_end(
        fine_tune_steps(
            model, annotations, settings, name=name, snapshot=snapshot, resume=resume
        )
    )


def fine_tune_project_steps(
    folder: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    view: View | None = None,
) -> Generator[TrainingStep, View | None, Path]:
    """Train as an annotation project says, for a process of its own.

    A training that is stopped, by whatever, leaves a snapshot in the folder.

    Parameters
    ----------
    folder : path
        Of the project.
    output : path
        Of the new model; written at the end, atomically. A file that is there by then
        stays: the new one gets a number.
    resume : bool, optional
        Go on from the snapshot in the folder if there is one.
    view : View, optional
        Of which previews are made.

    Returns
    -------
    Path
        Where the new model is.
    """
    yield TrainingStep(0, 1, "reading the project")
    project = load_project(folder)
    output, snapshot = Path(output), Path(folder) / SNAPSHOT_FILE
    better = yield from fine_tune_steps(
        _load_base(folder, project),
        project.annotations,
        project.settings,
        name=project.name or output.stem,
        snapshot=snapshot,
        resume=resume,
        view=view,
    )
    path = _save_new(better, output)
    snapshot.unlink(missing_ok=True)
    return path


def _save_new(model: Model, output: Path) -> Path:
    """Write a model beside what has got its name during the training."""
    number, path = 1, output.with_name(f"{output.name.removesuffix(SUFFIX)}{SUFFIX}")
    while not _reserve(path):
        number += 1
        path = path.with_name(f"{output.name.removesuffix(SUFFIX)}-{number}{SUFFIX}")
    if number > 1:
        update = {"name": path.name.removesuffix(SUFFIX)}
        model = Model(model.network, model.passport.model_copy(update=update))
    try:
        return save_model(model, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _reserve(path: Path) -> bool:
    """Make an empty file, and tell whether none was there."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    except OSError as error:
        raise bad_output(path, error) from error
    return True


def _load_base(folder: str | Path, project: Project) -> Model:
    """Load the model that a project starts from, or make a new one."""
    if base := base_of(folder, project):
        return load_model(base)
    seed = project.settings.seed
    return untrained_model(project.annotations, ndim=project.ndim, seed=seed)


def _identity(
    model: Model, data: TrainingData, settings: TrainingSettings
) -> dict[str, Any]:
    """Say what a training must have in common with another to go on from it."""
    where = {"device", "precision"}
    return {
        "base": model_sha256(model),
        "data": data.sha256,
        "settings": settings.model_dump(mode="json", exclude=where),
    }


def _verdict(
    training: Training, settings: TrainingSettings, scores: dict[str, float]
) -> str:
    """Say what the user should know at the end."""
    state, best = training.state, training.state.best
    assert best is not None
    if not is_better(scores, state.base_scores):
        old, new = state.base_scores["F1@0.5"], scores["F1@0.5"]
        return (
            "On the held-out part the new model is not better than the old one (F1 "
            f"{new:.2f}, before {old:.2f}). Keep the old one, or annotate more."
        )
    if state.step < settings.steps and state.stale >= settings.patience:
        return (
            f"The training ended early: the scores were best at step {best.step}, and "
            f"no better {state.stale} times since."
        )
    return ""


def _finish_steps(
    model: Model,
    training: Training,
    annotations: Sequence[Annotation],
    settings: TrainingSettings,
    name: str,
    problem: str,
) -> Generator[TrainingStep, View | None, Model]:
    """Make a model of the best network, with its passport.

    Where the training ended by a problem, only if it is better than the old one.
    """
    data, plan, best = training.data, training.plan, training.state.best
    assert best is not None
    training.network.load_state_dict(best.weights)
    passport = data.model.passport
    predicted = yield from training.predict_steps()
    scores, objects = yield from training.tune_steps(predicted, thoroughly=True)
    if problem and not is_better(scores, training.state.base_scores):
        raise BadModel(f"{problem} {_UNCHANGED}")
    if verdict := _verdict(training, settings, scores):
        yield from training.tell(message="choosing the threshold", note=verdict)
    record = TrainingRecord(
        date=datetime.date.today().isoformat(),
        data=_describe(annotations),
        data_sha256=data.sha256,
        images=len(annotations),
        steps=best.step,
        settings=settings.model_dump(mode="json")
        | {"patch_shape": list(plan.shape), "batch_size": plan.batch_size},
        scores=scores
        | {f"old {key}": value for key, value in training.state.base_scores.items()},
        parent_sha256=model_sha256(model),
    )
    low, high = data.intensity_range
    if passport.intensity_range is not None:
        low = min(low, passport.intensity_range[0])
        high = max(high, passport.intensity_range[1])
    diameter = passport.object_diameter
    if data.diameters:  # whatever the base's objects were
        diameter = round(float(np.median(data.diameters)), 1)
    network = build_unet(data.model.unet.config, best.weights, "the training")
    changes = {
        "name": name or f"{passport.name} (fine-tuned)",
        "threshold": objects.threshold,
        "split_touching": objects.split_touching,
        "grow": objects.grow,
        "minimal_size": objects.minimal_size,
        "border_weights": settings.border_weights,
        "object_diameter": diameter,
        "intensity_range": (low, high),
        "history": (*passport.history, record),
        "former_sha256": (),  # those of the parent
        "library_versions": {library: version(library) for library in _LIBRARIES},
    }
    return Model(network, passport.model_copy(update=changes))


def _describe(annotations: Sequence[Annotation]) -> str:
    count = len(annotations)
    names = [annotation.name for annotation in annotations if annotation.name]
    listed = f": {', '.join(names[:5])}" if names else ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{count} annotated image{'s' * (count != 1)}{listed}{more}"
