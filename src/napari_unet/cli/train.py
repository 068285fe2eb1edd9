"""The command ``napari-unet train``: its options, its progress, its result."""

from __future__ import annotations

import errno
import os
import sys
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from napari_unet.cli.options import Quiet, given
from napari_unet.cli.pairs import pair_by_name, read_labels
from napari_unet.cli.progress import follow
from napari_unet.cli.words import one_line
from napari_unet.errors import BadInput, BadOutput, Cancelled
from napari_unet.steps import describe_seconds

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from napari_unet.models.model import BorderWeights, Model
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.settings import TrainingSettings, TrainingStep

SUFFIX = ".safetensors"


class _Unpainted(StrEnum):
    BACKGROUND = "background"
    UNKNOWN = "unknown"


class _LabelsAre(StrEnum):
    OBJECTS = "objects"
    CLASSES = "classes"


class _Preset(StrEnum):
    DEFAULT = "default"
    PAPER = "paper"


class _BorderWeights(StrEnum):
    PAPER = "paper"
    FALK = "falk"
    NONE = "none"


class _Ndim(StrEnum):
    PLANES = "2"
    VOLUMES = "3"


_ImageFolder = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES_DIR|PROJECT",
        help="Folder of images, which are never changed, or an annotation project, "
        "which has everything.",
    ),
]
_LabelFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="LABELS_DIR",
        help="Folder of what is painted on the images: label images, named like them "
        "up to the suffix. Not for a project.",
        show_default=False,
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="BASE",
        help="Model to start from: a name (see napari-unet models list) or the path of "
        "its file. It is not changed.",
    ),
]
_New = Annotated[bool, typer.Option("--new", help="Train a new model from scratch.")]
_NdimOption = Annotated[
    _Ndim | None,
    typer.Option(help="What a new model sees: 2 planes (the default), 3 volumes."),
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", help=f"File of the new model, {SUFFIX}."
    ),
]
# None: as the project says, or else the default.
_Steps = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Steps at most; by default 500.")
]
_UnpaintedOption = Annotated[
    _Unpainted | None,
    typer.Option(
        help="What label 0 means; by default background. With unknown, label 1 is "
        "background and 2 and more are objects or classes."
    ),
]
_LabelsAreOption = Annotated[
    _LabelsAre | None,
    typer.Option(help="Whether each label is one object (the default) or one class."),
]
_PresetOption = Annotated[
    _Preset | None,
    typer.Option(help="paper: as in the U-Net paper, one large patch a step."),
]
_BorderWeightsOption = Annotated[
    _BorderWeights | None,
    typer.Option(
        help="Makes gaps between objects count more, as in the U-Net paper (the "
        "default) or in Falk et al. 2019."
    ),
]
_Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cpu|cuda|mps",
        help="Where to compute; auto, the default, takes the graphics card if there "
        "is one.",
    ),
]
_Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, max=2**32 - 1, help="Of all random choices; by default 0."
    ),
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with a training that was stopped, from OUT.snapshot or that of the "
        "project, which is written on the way.",
    ),
]
_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT, or a snapshot, if there is one."),
]


def train(
    images: _ImageFolder,
    output: _Output,
    labels: _LabelFolder = None,
    model: _Base = None,
    new: _New = False,
    ndim: _NdimOption = None,
    steps: _Steps = None,
    unpainted: _UnpaintedOption = None,
    labels_are: _LabelsAreOption = None,
    preset: _PresetOption = None,
    border_weights: _BorderWeightsOption = None,
    device: _Device = None,
    seed: _Seed = None,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a model better with annotated images, or train a new one.

    A part of the annotations is held out to score the model before and after. The
    file that is written has the network that was best there. What an annotation
    project says can be overridden by options.

    Example: napari-unet train images/ labels/ -m nuclei -o mine.safetensors
    """
    if (model and new) or not (model or new or labels is None):
        raise BadInput("Give either a model to start from with -m, or --new.")
    if ndim is not None and not new:
        raise BadInput("--ndim is for a new model: give --new, too.")
    if output.suffix != SUFFIX:
        output = output.with_name(output.name + SUFFIX)
    if labels is None:
        pairs, snapshot = [], _project_snapshot(images)
    else:
        pairs = pair_by_name(images, labels, kinds=("images", "label images"))
        snapshot = output.with_suffix(".snapshot")
    _check_output(output, snapshot, resume=resume, overwrite=overwrite)
    # Only now the slow imports.
    from napari_unet.models.checkpoint import save_model
    from napari_unet.training.fine_tune import fine_tune_steps

    task = _read_project(images) if labels is None else _read_pairs(pairs)
    meaning = given(unpainted=unpainted, labels_are=labels_are)
    annotations = [replace(one, **meaning) for one in task.annotations]
    changes = given(steps=steps, preset=preset, seed=seed, device=device)
    if border_weights is not None:
        changes["border_weights"] = _border_weights(border_weights)
    settings = task.settings.model_copy(update=changes)
    base = "" if new else model or task.base
    start = (
        _load(base, output)
        if base
        else _untrained(annotations, ndim or task.ndim, settings)
    )
    started = time.perf_counter()
    # Of another training, which this one does not go on with.
    stale = None if resume else _last_change(snapshot)
    training = fine_tune_steps(
        start,
        annotations,
        settings,
        name=output.stem,
        snapshot=snapshot,
        resume=resume,
    )
    try:
        better = _follow(training, output.name, quiet=quiet)
    except KeyboardInterrupt:
        if _last_change(snapshot) in (None, stale):
            raise
        raise Cancelled(
            "Stopped by Ctrl-C. The same command with --resume goes on."
        ) from None
    save_model(better, output)
    snapshot.unlink(missing_ok=True)
    if not quiet:
        took = describe_seconds(time.perf_counter() - started)
        typer.echo(one_line(f"{output}: {_summary(better)}, {took}"))


def _last_change(path: Path) -> int | None:
    """Return when a file was written last, None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


@dataclass(frozen=True, eq=False)
class _Task:
    """What is trained on, and what holds unless options say otherwise."""

    annotations: Sequence[Annotation]
    settings: TrainingSettings
    base: str | Path = ""
    ndim: int = 2


def _read_project(folder: Path) -> _Task:
    from napari_unet.training.project import base_of, load_project

    project = load_project(folder)
    base = base_of(folder, project)
    return _Task(project.annotations, project.settings, base, project.ndim)


def _read_pairs(pairs: Sequence[tuple[str, Path, Path]]) -> _Task:
    from napari_unet.training.settings import TrainingSettings

    annotations = [_read(image, labels) for _, image, labels in pairs]
    return _Task(annotations, TrainingSettings())


def _border_weights(preset: _BorderWeights) -> BorderWeights | None:
    from napari_unet.models.model import BorderWeights
    from napari_unet.training.settings import W0_SIGMA

    if preset is _BorderWeights.NONE:
        return None
    w0, sigma = W0_SIGMA[preset.value]
    return BorderWeights(preset=preset.value, w0=w0, sigma=sigma)


def _untrained(
    annotations: Sequence[Annotation], ndim: int | str, settings: TrainingSettings
) -> Model:
    from napari_unet.training.adapt import untrained_model

    sides: Literal[2, 3] = 2 if int(ndim) == 2 else 3
    return untrained_model(annotations, ndim=sides, seed=settings.seed)


def _project_snapshot(folder: Path) -> Path:
    from napari_unet.training.project_file import SNAPSHOT_FILE, is_project

    if not is_project(folder):
        raise BadInput(
            f"{folder} is no annotation project. Give the folder of the images and "
            "that of their labels, or a project that the Fine-tune dock has saved."
        )
    return folder / SNAPSHOT_FILE


def _check_output(
    output: Path, snapshot: Path, *, resume: bool, overwrite: bool
) -> None:
    """Refuse before any work what could not be written, or would destroy a file."""
    from napari_unet.files.atomic import bad_output, check_writable, sweep

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
    except OSError as error:
        raise bad_output(output, error) from error
    check_writable(output.parent)
    sweep(output.parent)
    if os.path.lexists(output) and not overwrite:
        raise BadOutput(
            f"{output} exists already; use --overwrite to replace it, or choose "
            "another output."
        )
    if os.path.lexists(snapshot) and not (resume or overwrite):
        raise BadOutput(
            f"{snapshot} holds a training that was stopped; go on with --resume, or "
            "start anew with --overwrite."
        )


def _load(name: str | Path, output: Path) -> Model:
    """Load the model to start from, which is never overwritten."""
    from napari_unet.models.library import list_models, load_model

    model = load_model(name)
    file = list_models().get(str(name), Path(name).expanduser())
    if output.exists() and file.samefile(output):
        raise BadOutput(
            f"{output} is the model to start from, which is never overwritten; choose "
            "another output."
        )
    return model


def _read(image: Path, labels: Path) -> Annotation:
    from napari_unet.files.images import read_image
    from napari_unet.training.annotations import Annotation

    found = read_image(image)
    for note in found.notes:
        typer.echo(f"Note: {one_line(note)}", err=True)
    return Annotation(
        found.data,
        read_labels(labels),
        axes=found.axes,
        pixel_size=found.pixel_size,
        name=image.name,
    )


def _follow(
    steps: Generator[TrainingStep, Any, Model], title: str, *, quiet: bool
) -> Model:
    """Run the training to its end behind a progress bar; tell its scores."""
    from tqdm import tqdm

    def tell(step: TrainingStep, bar: Any) -> None:
        for line in _lines(step):
            if not quiet:
                tqdm.write(one_line(line), file=sys.stderr)
        what = step.message if step.loss is None else f"loss {step.loss:.3f}"
        bar.set_postfix_str(what, refresh=False)

    return follow(steps, title, unit="steps", quiet=quiet, on_step=tell)


def _lines(step: TrainingStep) -> Iterator[str]:
    if step.note:
        yield f"Note: {step.note}"
    if step.scores:
        when = f"step {step.done}" if step.done else "before"
        scores = ", ".join(f"{key} {value:.3f}" for key, value in step.scores.items())
        yield f"{when}: {scores}{' (best so far)' if step.best else ''}"


def _summary(model: Model) -> str:
    record = model.passport.history[-1]
    names = [key for key in record.scores if f"old {key}" in record.scores]
    scores = ", ".join(
        f"{key} {record.scores[f'old {key}']:.3f} -> {record.scores[key]:.3f}"
        for key in names
    )
    return f"on the held-out part {scores}, best at step {record.steps}"
