"""The command ``napari-unet segment``: its options, its progress, its results."""

from __future__ import annotations

import math
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from napari_unet.cli.jobs import (
    check_plan,
    few,
    one_line,
    plan,
    segment_file_steps,
)
from napari_unet.cli.progress import follow
from napari_unet.errors import BadInput, OutOfMemory, Partial

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from napari_unet.cli.jobs import Job
    from napari_unet.errors import UnetError
    from napari_unet.inference.segment import SegmentOptions
    from napari_unet.steps import Progress


class _Precision(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"


def _pixel_size(text: str) -> dict[str, float]:
    """Read "0.325" or "1,0.325,0.325" as micrometres by axis letter."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 2
    good = all(math.isfinite(number) and number > 0 for number in numbers)
    if len(numbers) not in (2, 3) or not good:
        raise typer.BadParameter(
            f"{text!r} is not a pixel size; give µm like 0.325, or Z,Y,X like "
            "1,0.325,0.325."
        )
    return dict(zip("ZYX"[-len(numbers) :], numbers, strict=True))


_Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="IN",
        help="Images, or folders of images: TIFF, OME-TIFF, OME-Zarr, PNG, JPEG, BMP. "
        "They are never changed.",
    ),
]
_ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Name of a model (see napari-unet models list) or path of its file.",
    ),
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="A .tif file for one image; otherwise a folder, which is made if needed "
        "and in which the results are named like the images.",
    ),
]
_KeepProbabilities = Annotated[
    bool,
    typer.Option(
        "--probabilities",
        help="Also write how sure the model is of each class at each pixel.",
    ),
]
_Axes = Annotated[
    str | None,
    typer.Option(
        metavar="ZYX",
        help="What the axes of the images are, out of T, C, Z, Y, X and S (colours), "
        "if the files say it wrongly or not at all.",
    ),
]
_Channels = Annotated[
    list[int] | None,
    typer.Option(
        "--channel",
        metavar="N",
        min=0,
        help="Channel that the model gets, counted from 0. Once for each channel of "
        "the model.",
    ),
]
_PixelSize = Annotated[
    dict | None,
    typer.Option(
        metavar="µm",
        parser=_pixel_size,
        help="Pixel size of the images, like 0.325 or Z,Y,X like 1,0.325,0.325, if "
        "the files say it wrongly or not at all.",
    ),
]
_Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|mps",
        help="Where to compute; auto takes the graphics card if there is one.",
    ),
]
_Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="0-1",
        min=0,
        max=1,
        help="Probability above which a pixel belongs to an object; lower finds more. "
        "By default what the model recommends.",
    ),
]
_MinimalSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Leave out objects of fewer pixels (voxels for a 3D model). By default "
        "what the model recommends.",
    ),
]
_Split = Annotated[
    bool | None,
    typer.Option(
        "--split-touching/--no-split-touching",
        help="Cut objects apart at their necks. By default what the model recommends.",
    ),
]
_TileSide = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Side of the tiles in pixels. The result is the same; smaller tiles need "
        "less memory. Chosen by default.",
    ),
]
_Augment = Annotated[
    bool,
    typer.Option(
        "--test-time-augmentation",
        help="Average over 8 flips and rotations: a little better, 8 times slower.",
    ),
]
_PrecisionOption = Annotated[
    _Precision,
    typer.Option(
        help="float32: slower on a graphics card, the same numbers as on the CPU."
    ),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace results that exist already.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors.")]


class _Console:
    """Progress and notes on stderr, results on stdout; nothing if quiet."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._told: set[str] = set()

    def note(self, text: str) -> None:
        """Tell the user something, once."""
        if text and not self._quiet and text not in self._told:
            from tqdm import tqdm

            self._told.add(text)
            tqdm.write(f"Note: {one_line(text)}", file=sys.stderr)

    def result(self, text: str) -> None:
        """Tell what was done."""
        if not self._quiet:
            typer.echo(one_line(text))

    def follow(self, steps: Generator[Progress, None, str], title: str) -> str:
        """Run a computation to its end behind a progress bar."""
        return follow(
            steps,
            title,
            unit="tiles",
            quiet=self._quiet,
            on_step=lambda step, bar: self.note(step.note),
        )


def segment(
    inputs: _Inputs,
    model: _ModelName,
    output: _Output,
    probabilities: _KeepProbabilities = False,
    axes: _Axes = None,
    channels: _Channels = None,
    pixel_size: _PixelSize = None,
    device: _Device = "auto",
    threshold: _Threshold = None,
    minimal_size: _MinimalSize = None,
    split_touching: _Split = None,
    tile: _TileSide = None,
    test_time_augmentation: _Augment = False,
    precision: _PrecisionOption = _Precision.AUTO,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
) -> None:
    """Find the objects in images.

    Each image gets a label image of the same size, in which the pixels of an object
    have its number and the background is 0. If an image cannot be used, the others
    are still done, and the exit code is 3.

    Example: napari-unet segment cells/ -m nuclei -o labels/
    """
    jobs = plan(inputs, output, probabilities=probabilities)
    check_plan(jobs, overwrite=overwrite)
    # Only now the slow imports.
    from napari_unet.inference.backends import choose_device
    from napari_unet.models.library import load_model

    loaded = load_model(model)
    chosen = choose_device(device)
    console = _Console(quiet)
    console.note(chosen.note)
    options: SegmentOptions = {
        "channels": channels or None,
        "device": chosen.name,
        "tile_shape": (tile,) * loaded.ndim if tile else None,
        "precision": "float32" if precision is _Precision.FLOAT32 else "auto",
        "test_time_augmentation": test_time_augmentation,
        "threshold": threshold,
        "minimal_size": minimal_size,
        "split_touching": split_touching,
    }
    start = partial(
        segment_file_steps,
        model=loaded,
        options=options,
        axes=axes,
        pixel_size=pixel_size,
        overwrite=overwrite,
    )
    _segment_all(jobs, start, console)


def _segment_all(
    jobs: Sequence[Job],
    start: Callable[[Job], Generator[Progress, None, str]],
    console: _Console,
) -> None:
    """Go from image to image; one that cannot be used does not stop the others."""
    failures: dict[Path, UnetError] = {}
    try:
        for job in jobs:
            try:
                found = console.follow(start(job), job.image.name)
            except (BadInput, OutOfMemory) as error:
                if len(jobs) == 1:
                    raise
                failures[job.image] = error
            else:
                console.result(f"{job.image} -> {job.labels}: {found}")
    finally:
        for image, why in failures.items():
            typer.echo(one_line(f"Failed: {image}: {why}"), err=True)
    if failures:
        rest = " The others are done." if len(failures) < len(jobs) else ""
        raise Partial(
            f"{len(failures)} of {len(jobs)} images could not be segmented: "
            f"{few(list(failures))}.{rest}"
        )
