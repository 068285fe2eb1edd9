"""The command ``napari-unet batch``: a folder in, a folder out."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_unet.cli.options import (
    MODEL,
    Augment,
    Axes,
    Channels,
    Device,
    KeepProbabilities,
    MemoryLimit,
    MinimalSize,
    Overwrite,
    PixelSize,
    PrecisionOption,
    Quiet,
    Split,
    Threshold,
    TileSide,
    given,
)
from napari_unet.cli.progress import follow
from napari_unet.cli.words import one_line
from napari_unet.errors import Cancelled
from napari_unet.steps import describe_seconds

if TYPE_CHECKING:
    from napari_unet.batch.job import BatchJob
    from napari_unet.batch.run import BatchProgress

__all__ = ["batch"]


class _Format(StrEnum):
    TIF = "tif"
    OME_TIF = "ome.tif"
    OME_ZARR = "ome.zarr"


_Input = Annotated[
    Path | None,
    typer.Argument(
        metavar="IN_DIR",
        help="Folder of images: TIFF, OME-TIFF, OME-Zarr, PNG, JPEG, BMP. They are "
        "never changed.",
        show_default=False,
    ),
]
_Output = Annotated[
    Path | None,
    typer.Argument(
        metavar="OUT_DIR",
        help="Folder of the results, which is made if needed and in which they are "
        "named like the images.",
        show_default=False,
    ),
]
_Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="'*_dapi.tif'", help="Only images with such names, upper case or lower."
    ),
]
_Recursive = Annotated[
    bool | None,
    typer.Option(
        "--recursive/--no-recursive",
        "-r",
        help="Go into subfolders, which the results mirror.",
    ),
]
_FormatOption = Annotated[
    _Format | None,
    typer.Option(
        "--format", help="Of labels and probabilities; tif (ImageJ's) by default."
    ),
]
_Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Measure each object; all measurements go into measurements.csv.",
    ),
]
_JobFile = Annotated[
    Path | None,
    typer.Option(
        "--job",
        metavar="job.yaml",
        help="Repeat a batch: the file lies in its output. What is given besides wins "
        "over what it says.",
    ),
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on after an interruption: leave out what is done with the same model, "
        "settings and versions and has not changed.",
    ),
]


_Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Let the workers of a Dask cluster do the work: tcp://host:8786, or local "
        "for one process for each GPU, or local:4 for 4 processes.",
    ),
]


def batch(
    input_folder: _Input = None,
    output_folder: _Output = None,
    model: Annotated[str | None, MODEL] = None,
    pattern: _Pattern = None,
    recursive: _Recursive = None,
    output_format: _FormatOption = None,
    probabilities: KeepProbabilities = None,
    measure: _Measure = None,
    job: _JobFile = None,
    resume: _Resume = False,
    scheduler: _Scheduler = None,
    overwrite: Overwrite = False,
    axes: Axes = None,
    channels: Channels = None,
    pixel_size: PixelSize = None,
    device: Device = None,
    threshold: Threshold = None,
    minimal_size: MinimalSize = None,
    split_touching: Split = None,
    tile: TileSide = None,
    memory_limit: MemoryLimit = None,
    test_time_augmentation: Augment = None,
    precision: PrecisionOption = None,
    quiet: Quiet = False,
) -> None:
    """Find the objects in a folder of images, unattended.

    Besides a label image for each image, OUT_DIR gets tables, a report that opens in
    a browser, and job.yaml, which repeats the batch. One bad image is recorded, and
    the others go on; the exit code is then 3. Whatever happens, what is finished is
    kept, and --resume does the rest.

    Example: napari-unet batch cells/ results/ -m nuclei --measure
    """
    settings = given(
        channels=channels,
        device=device,
        threshold=threshold,
        minimal_size=minimal_size,
        split_touching=split_touching,
        tile=tile,
        memory_limit=memory_limit,
        test_time_augmentation=test_time_augmentation,
        precision=precision,
    )
    told = given(
        input=input_folder,
        output=output_folder,
        model=model,
        pattern=pattern,
        recursive=recursive,
        format=output_format,
        probabilities=probabilities,
        measure=measure,
        axes=axes,
        pixel_size=pixel_size,
    )
    how = {"resume": resume, "overwrite": overwrite, "scheduler": scheduler}
    _run(_job(job, told, settings), how, quiet=quiet)


def _job(path: Path | None, told: dict[str, Any], settings: dict[str, Any]) -> BatchJob:
    """Make a job of the options, and of a file if there is one."""
    from napari_unet.batch.job import BatchJob

    if path is None:
        needed = {"input": "IN_DIR", "output": "OUT_DIR", "model": "--model"}
        missing = [text for name, text in needed.items() if name not in told]
        if missing:
            raise typer.BadParameter(
                f"{' and '.join(missing)} missing; or give a job with --job."
            )
        return BatchJob.of({**told, "settings": settings})
    loaded = BatchJob.load(path).model_dump()
    if "model" in told:
        told["model_sha256"] = ""
    merged = {**loaded["settings"], **settings}
    return BatchJob.of({**loaded, **told, "settings": merged})


def _run(job: BatchJob, how: dict[str, Any], *, quiet: bool) -> None:
    from napari_unet.batch.folder import batch_steps

    lines = _Lines(quiet)
    try:
        report = follow(
            batch_steps(job, **how),
            "Batch",
            unit="bytes",
            quiet=quiet,
            bar_format="{percentage:3.0f}%|{bar:20}| {remaining} left, {desc}",
            on_step=lines.tell,
        )
    except KeyboardInterrupt:
        raise Cancelled(
            "Stopped by Ctrl-C. What is finished is kept; the same command with "
            "--resume goes on."
        ) from None
    if report.error:
        raise report.error
    if not quiet:
        count = len(report.entries)
        words = f"{count} image{'s' * (count != 1)}"
        if noted := sum(bool(entry.notes) for entry in report.entries):
            words += f", {noted} with notes"
        typer.echo(one_line(f"{words}: {report.report}"))


class _Lines:
    """What is said while a batch runs: a line for each file, notes once."""

    def __init__(self, quiet: bool):
        self._quiet = quiet

    def tell(self, step: BatchProgress, bar: Any) -> None:
        """Describe a step in the bar, and above it what is new."""
        bar.set_description_str(one_line(step.message), refresh=False)
        entry = step.entry
        if step.note:
            self._write(f"Note: {step.named_note}", sys.stderr)
        if entry is None:
            return
        if step.status == "done":
            seconds = describe_seconds(entry.seconds)
            self._write(f"{entry.name}: {entry.found}, {seconds}", sys.stdout)
        elif step.status == "failed":
            self._write(f"Failed: {entry.name}: {entry.reason}", sys.stderr, True)

    def _write(self, text: str, file: Any, always: bool = False) -> None:
        from tqdm import tqdm

        if always or not self._quiet:
            tqdm.write(one_line(text), file=file)
