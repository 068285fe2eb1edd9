"""The command ``napari-unet train``: its options, its progress, its result."""

from __future__ import annotations

import errno
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_unet.cli.jobs import duration, one_line
from napari_unet.cli.pairs import pair_by_name, read_labels
from napari_unet.cli.progress import follow
from napari_unet.errors import BadInput, BadOutput

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from napari_unet.models.model import Model
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.settings import TrainingStep

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


_ImageFolder = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES_DIR", help="Folder of images. They are never changed."
    ),
]
_LabelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="LABELS_DIR",
        help="Folder of what is painted on them: label images, named like the images "
        "up to the suffix.",
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
_Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", help=f"File of the new model, {SUFFIX}."
    ),
]
_Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Steps at most.")]
_UnpaintedOption = Annotated[
    _Unpainted,
    typer.Option(
        help="What label 0 means. With unknown, label 1 is background and 2 and more "
        "are objects or classes."
    ),
]
_LabelsAreOption = Annotated[
    _LabelsAre, typer.Option(help="Whether each label is one object or one class.")
]
_PresetOption = Annotated[
    _Preset, typer.Option(help="paper: as in the U-Net paper, one large patch a step.")
]
_Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|mps",
        help="Where to compute; auto takes the graphics card if there is one.",
    ),
]
_Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of all random choices.")
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with a training that was stopped, from OUT.snapshot, which is "
        "written on the way.",
    ),
]
_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT, or a snapshot, if there is one."),
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors.")]


def train(
    images: _ImageFolder,
    labels: _LabelFolder,
    output: _Output,
    model: _Base = None,
    new: _New = False,
    steps: _Steps = 500,
    unpainted: _UnpaintedOption = _Unpainted.BACKGROUND,
    labels_are: _LabelsAreOption = _LabelsAre.OBJECTS,
    preset: _PresetOption = _Preset.DEFAULT,
    device: _Device = "auto",
    seed: _Seed = 0,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
) -> None:
    """Make a model better with annotated images, or train a new one.

    A part of the annotations is held out to score the model before and after. The
    file that is written has the network that was best there.

    Example: napari-unet train images/ labels/ -m nuclei -o nuclei-mine.safetensors
    """
    if (model is None) != new:
        raise BadInput("Give either a model to start from with -m, or --new.")
    if output.suffix != SUFFIX:
        output = output.with_name(output.name + SUFFIX)
    pairs = pair_by_name(images, labels, kinds=("images", "label images"))
    snapshot = output.with_suffix(".snapshot")
    _check_output(output, snapshot, resume=resume, overwrite=overwrite)
    # Only now the slow imports.
    from napari_unet.models.checkpoint import save_model
    from napari_unet.training.adapt import untrained_model
    from napari_unet.training.fine_tune import fine_tune_steps
    from napari_unet.training.settings import TrainingSettings

    base = None if model is None else _load(model, output)
    annotations = [
        _read(image, label, unpainted, labels_are) for _, image, label in pairs
    ]
    settings = TrainingSettings(
        steps=steps, preset=preset.value, seed=seed, device=device
    )
    started = time.perf_counter()
    training = fine_tune_steps(
        base or untrained_model(annotations, seed=seed),
        annotations,
        settings,
        name=output.stem,
        snapshot=snapshot,
        resume=resume,
    )
    better = _follow(training, output.name, quiet=quiet)
    save_model(better, output)
    snapshot.unlink(missing_ok=True)
    if not quiet:
        seconds = time.perf_counter() - started
        typer.echo(one_line(f"{output}: {_summary(better)}, {duration(seconds)}"))


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


def _load(name: str, output: Path) -> Model:
    """Load the model to start from, which is never overwritten."""
    from napari_unet.models.library import list_models, load_model

    model = load_model(name)
    file = list_models().get(name, Path(name).expanduser())
    if output.exists() and file.samefile(output):
        raise BadOutput(
            f"{output} is the model to start from, which is never overwritten; choose "
            "another output."
        )
    return model


def _read(
    image: Path, labels: Path, unpainted: _Unpainted, labels_are: _LabelsAre
) -> Annotation:
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
        unpainted=unpainted.value,
        labels_are=labels_are.value,
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
