"""Options that commands which segment have in common."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any

import typer


class Precision(StrEnum):
    """How exactly a graphics card computes."""

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


MODEL = typer.Option(
    "--model",
    "-m",
    metavar="MODEL",
    help="Name of a model (see napari-unet models list) or path of its file.",
)
KeepProbabilities = Annotated[
    bool | None,
    typer.Option(
        "--probabilities/--no-probabilities",
        help="Also write how sure the model is of each class at each pixel.",
    ),
]
Axes = Annotated[
    str | None,
    typer.Option(
        metavar="ZYX",
        help="What the axes of the images are, out of T, C, Z, Y, X and S (colours), "
        "if the files say it wrongly or not at all.",
    ),
]
Channels = Annotated[
    list[int] | None,
    typer.Option(
        "--channel",
        metavar="N",
        min=0,
        help="Channel that the model gets, counted from 0. Once for each channel of "
        "the model.",
    ),
]
PixelSize = Annotated[
    dict | None,
    typer.Option(
        metavar="µm",
        parser=_pixel_size,
        help="Pixel size of the images, like 0.325 or Z,Y,X like 1,0.325,0.325, if "
        "the files say it wrongly or not at all.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cpu|cuda|mps",
        help="Where to compute; auto takes the graphics card if there is one.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="0-1",
        min=0,
        max=1,
        help="Probability above which a pixel belongs to an object; lower finds more. "
        "By default what the model recommends.",
    ),
]
MinimalSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Leave out objects of fewer pixels (voxels for a 3D model). By default "
        "what the model recommends.",
    ),
]
Split = Annotated[
    bool | None,
    typer.Option(
        "--split-touching/--no-split-touching",
        help="Cut objects apart at their necks. By default what the model recommends.",
    ),
]
TileSide = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Side of the tiles in pixels. The result is the same; smaller tiles need "
        "less memory. Chosen by default.",
    ),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        metavar="GB",
        min=0.1,
        help="What the network may take of the memory, of the graphics card if it "
        "computes there. The result is the same. By default a part of what is free.",
    ),
]
Augment = Annotated[
    bool | None,
    typer.Option(
        "--test-time-augmentation/--no-test-time-augmentation",
        help="Average over 8 flips and rotations: a little better, 8 times slower.",
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        help="float32: nothing is rounded to 16 bits. Slower, and the same on all "
        "devices to within rounding."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace results that exist already.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors.")]


def given(**options: Any) -> dict[str, Any]:
    """Return the plain values of the options that were given."""
    return {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in options.items()
        if value is not None
    }
