"""The command ``napari-unet segment``: its options, its progress, its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from napari_unet.batch.checks import check_memory, check_plan
from napari_unet.batch.plan import few, plan_files
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
from napari_unet.cli.progress import Console
from napari_unet.cli.words import one_line
from napari_unet.errors import BadInput, OutOfMemory, Partial
from napari_unet.steps import describe_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from napari_unet.batch.journal import Entry
    from napari_unet.batch.plan import Item
    from napari_unet.errors import UnetError
    from napari_unet.steps import Progress

_Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="IN",
        help="Images, or folders of images: TIFF, OME-TIFF, OME-Zarr, PNG, JPEG, BMP. "
        "They are never changed.",
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


def segment(
    inputs: _Inputs,
    model: Annotated[str, MODEL],
    output: _Output,
    probabilities: KeepProbabilities = None,
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
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find the objects in images.

    Each image gets a label image of the same size, in which the pixels of an object
    have its number and the background is 0. If an image cannot be used, the others
    are still done, and the exit code is 3.

    Example: napari-unet segment cells/ -m nuclei -o labels/
    """
    items = plan_files(inputs, output, probabilities=bool(probabilities))
    folder = items[0].labels.parent
    check_plan(items, folder, overwrite=overwrite)
    # Only now the slow imports.
    from napari_unet.batch.file import Task, segment_file_steps
    from napari_unet.batch.job import SegmentSettings
    from napari_unet.inference.backends import choose_device
    from napari_unet.models.library import load_model

    loaded = load_model(model)
    chosen = choose_device(device or "auto")
    console = Console(quiet)
    console.note(chosen.note)
    settings = SegmentSettings(
        **given(
            channels=channels,
            device=chosen.name,
            threshold=threshold,
            minimal_size=minimal_size,
            split_touching=split_touching,
            tile=tile,
            memory_limit=memory_limit,
            test_time_augmentation=test_time_augmentation,
            precision=precision,
        )
    )
    check_memory(loaded, chosen, settings.precision, settings.memory_limit)
    task = Task(
        output=folder,
        internal=folder,
        options=settings.options(loaded.ndim),
        axes=axes,
        pixel_size=pixel_size,
        overwrite=overwrite,
    )
    _segment_all(items, lambda item: segment_file_steps(item, loaded, task), console)


def _segment_all(
    items: Sequence[Item],
    start: Callable[[Item], Generator[Progress, None, Entry]],
    console: Console,
) -> None:
    """Go from image to image; one that cannot be used does not stop the others."""
    failures: dict[Path, UnetError] = {}
    try:
        for item in items:
            try:
                entry = console.follow(start(item), item.image.name)
            except (BadInput, OutOfMemory) as error:
                if len(items) == 1:
                    raise
                failures[item.image] = error
            else:
                found = f"{entry.found}, {describe_seconds(entry.seconds)}"
                console.result(f"{item.image} -> {item.labels}: {found}")
    finally:
        for image, why in failures.items():
            typer.echo(one_line(f"Failed: {image}: {why}"), err=True)
    if failures:
        rest = " The others are done." if len(failures) < len(items) else ""
        raise Partial(
            f"{len(failures)} of {len(items)} images could not be segmented: "
            f"{few(list(failures))}.{rest}"
        )
