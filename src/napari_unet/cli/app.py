"""The command line: all commands of ``napari-unet``.

What takes long to import is imported where it is used, so that help comes at once.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from napari_unet.batch.plan import PROBABILITIES
from napari_unet.cli.batch import batch
from napari_unet.cli.interrupt import (
    STOPPED,
    end_interrupted,
    end_soon_when_interrupted,
)
from napari_unet.cli.models import models
from napari_unet.cli.pairs import pair_by_name, read_labels
from napari_unet.cli.segment import segment
from napari_unet.cli.train import train
from napari_unet.cli.words import one_line
from napari_unet.errors import (
    Cancelled,
    OutOfMemory,
    UnetError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

USAGE = 1  # exit code; the usual 2 means a bad model here


class _Commands(TyperGroup):
    """All commands; Ctrl-C and lack of memory end any of them in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Cancelled(STOPPED) from None
        except MemoryError as error:
            raise OutOfMemory(
                "Memory ran out. Close other programs, or crop or downsample the image."
            ) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut long options short
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(models, name="models")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file may have a name that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    if arguments is None:  # this process has nothing else to do
        end_soon_when_interrupted()
    try:
        app(arguments, prog_name="napari-unet")
    except UnetError as error:
        if arguments is None and isinstance(error, Cancelled):
            end_interrupted(one_line(error))
        typer.echo(f"Error: {one_line(error)}", err=True)
        return error.exit_code
    except SystemExit as end:
        return USAGE if end.code == 2 else int(end.code or 0)
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        from napari_unet import __version__

        typer.echo(f"napari-unet {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Segment microscopy images with a U-Net.

    Example: napari-unet segment cells.tif -m nuclei -o labels.tif
    """


app.command()(segment)
app.command()(train)
app.command()(batch)


_PredictedFolder = Annotated[
    Path,
    typer.Argument(metavar="PREDICTED_DIR", help="Folder of predicted labels."),
]
_TrueFolder = Annotated[
    Path,
    typer.Argument(
        metavar="TRUE_DIR",
        help="Folder of true labels, named like the predicted ones up to the suffix.",
    ),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")]
_PerImage = Annotated[
    bool,
    typer.Option(
        "--per-image",
        help="Add a row for each image to the table; JSON always has them.",
    ),
]


@app.command()
def evaluate(
    predicted: _PredictedFolder,
    true: _TrueFolder,
    as_json: _AsJson = False,
    per_image: _PerImage = False,
) -> None:
    """Compare predicted with true label images.

    Prints how many objects were found, invented and missed (AP, F1, precision and
    recall, from loose to strict overlap), and how well the pixels agree (IoU, Dice,
    Rand error). Files of probabilities are left out.

    Example: napari-unet evaluate labels/ true_labels/ --per-image
    """
    pairs = pair_by_name(predicted, true, skip=PROBABILITIES)
    from napari_unet.training.scores import score_images

    scores = score_images(_read_pairs(pairs), [name for name, _, _ in pairs])
    if as_json:
        typer.echo(json.dumps(scores.to_dict(), indent=2))
    else:
        typer.echo(scores.to_table(per_image=per_image))


def _read_pairs(
    pairs: Sequence[tuple[str, Path, Path]],
) -> Iterator[tuple[Any, Any]]:
    """Read true and predicted labels, one pair at a time."""
    for _, predicted, true in pairs:
        yield read_labels(true), read_labels(predicted)
