"""The commands of ``napari-unet models``."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from napari_unet.cli.words import one_line
from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from napari_unet.models.family import Branch

models = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class _Formats(StrEnum):
    """In what a model is passed on."""

    SAFETENSORS = "safetensors"
    BIOIMAGEIO = "bioimageio"


_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")]
_NameOrFile = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of a model, or the path of its file."),
]
_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint, or a bioimage.io package: a .zip archive, a folder, or its "
        "address on the web. It is not changed.",
    ),
]
_ImportedName = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="In the library; that of the file by default."
    ),
]
_Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Take the weights also out of a program (TorchScript, a pickled network), "
        "which could do anything you can do: only if you trust whoever made it.",
    ),
]
_Target = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="Gets the suffix .safetensors; or an existing folder. One that ends in "
        ".zip becomes a bioimage.io package.",
    ),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file that is there.")
]
_Format = Annotated[
    _Formats | None,
    typer.Option("--format", help="By default as the name of FILE ends."),
]
_Author = Annotated[
    list[str] | None,
    typer.Option(
        "--author", metavar="NAME", help="Of a bioimage.io package; may be repeated."
    ),
]
_License = Annotated[
    str,
    typer.Option(
        "--license",
        metavar="ID",
        help="Of a bioimage.io package, as SPDX names it, e.g. CC-BY-4.0.",
    ),
]
_Image = Annotated[
    Path | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Image for the test and the cover of a bioimage.io package.",
    ),
]
_NewName = Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")]


@models.callback()
def _models() -> None:
    """See, bring in, pass on, rename and remove models.

    Example: napari-unet models list
    """


@models.command("list")
def list_all() -> None:
    """List all models, also removed ones.

    A model that was fine-tuned from another one stands below it.

    Example: napari-unet models list
    """
    from napari_unet.models.description import summary
    from napari_unet.models.family import family_trees
    from napari_unet.models.library import is_bundled, library_dir
    from napari_unet.models.trash import list_removed

    rows = []
    for depth, branch in _walk(family_trees()):
        entry = branch.entry
        about = f"cannot be used: {entry.problem}"
        if entry.header is not None:
            about = summary(entry.header)
        whose = "bundled" if is_bundled(entry.name) else "yours"
        rows.append(("  " * depth + entry.name, whose, about))
    for removed in list_removed().values():
        rows.append((removed.name, "removed", f"kept until {removed.kept_until}"))
    if not rows:
        typer.echo(f"There are no models; your own would be in {library_dir()}.")
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, whose, about in rows:
        typer.echo(one_line(f"{name:{width}}  {whose:7}  {about}"))


def _walk(branches: tuple[Branch, ...], depth: int = 0) -> Iterator[tuple[int, Branch]]:
    for branch in branches:
        yield depth, branch
        yield from _walk(branch.children, depth + 1)


@models.command("info")
def describe(name: _NameOrFile) -> None:
    """Say what a model finds, what it was trained on and how it is used.

    Example: napari-unet models info nuclei
    """
    from napari_unet.models.checkpoint import Header, model_sha256
    from napari_unet.models.description import facts
    from napari_unet.models.family import history
    from napari_unet.models.library import list_models, load_model

    model = load_model(name)
    header = Header(model.network.config, model.passport, model_sha256(model))
    lines = list(facts(header))
    if name in list_models():
        ancestors, branch = history(name)
        children = [child.entry.name for child in branch.children]
        lines.append(("Fine-tuned from", " → ".join(ancestors)))
        lines.append(("Fine-tuned to", ", ".join(children)))
    for title, text in lines:
        if text:
            typer.echo(one_line(f"{title:15} {text}"))


@models.command("import")
def import_(source: _Source, name: _ImportedName = None, trust: _Trust = False) -> None:
    """Copy a checkpoint or a bioimage.io package into the library.

    Example: napari-unet models import downloads/cells.pth --name cells
    """
    from napari_unet.cli.progress import Console
    from napari_unet.models.description import summary
    from napari_unet.models.family import read_entry
    from napari_unet.models.library import find_model, import_steps

    steps = import_steps(source, name, trust=trust)
    got = Console(quiet=False).follow(steps, "Import", unit="files")
    entry = read_entry(got, find_model(got))
    about = "" if entry.header is None else f": {summary(entry.header)}"
    typer.echo(one_line(f"Imported as {got}{about}"))


@models.command("export")
def export(
    name: _Name,
    file: _Target,
    overwrite: _Overwrite = False,
    form: _Format = None,
    author: _Author = None,
    license: _License = "",
    image: _Image = None,
) -> None:
    """Copy a model out of the library, to pass it on.

    Example: napari-unet models export cells cells.zip --author "Ada Lovelace"
    """
    from napari_unet.models.library import PACKAGE_SUFFIX, export_model

    is_package = file.suffix == PACKAGE_SUFFIX
    if form is not None and is_package != (form == _Formats.BIOIMAGEIO):
        is_package = form == _Formats.BIOIMAGEIO
        suffix = PACKAGE_SUFFIX if is_package else ".safetensors"
        file = file / f"{name}{suffix}" if file.is_dir() else Path(f"{file}{suffix}")
    if not is_package and (author or license or image):
        raise BadInput(
            "Authors, a license and an image are for bioimage.io packages: add "
            "--format bioimageio, or leave them out."
        )
    written = export_model(
        name,
        file,
        overwrite=overwrite,
        authors=author or (),
        license=license,
        image=None if image is None else _read_test_image(image, name),
    )
    typer.echo(one_line(f"Exported to {written}"))


def _read_test_image(path: Path, name: str) -> NDArray:
    """Read one plane or volume of an image, with the channels of a model."""
    from napari_unet.files.images import read_image
    from napari_unet.inference.source import open_source
    from napari_unet.models.library import load_model

    image = read_image(path)
    source, _ = open_source(image.data, load_model(name), image.axes)
    units = list(source.units(source.full_region(None)))
    start = [0] * len(source.spatial)
    pixels: NDArray = source.read(units[len(units) // 2], start, source.spatial_shape)
    return pixels


@models.command("rename")
def rename(name: _Name, new: _NewName) -> None:
    """Give one of your models another name.

    Example: napari-unet models rename nuclei-mine neurons
    """
    from napari_unet.models.library import rename_model

    rename_model(name, new)
    typer.echo(one_line(f"{name} is called {new} now"))


@models.command("remove")
def remove(name: _Name) -> None:
    """Put one of your models into the trash.

    It is kept there for 30 days.

    Example: napari-unet models remove cells
    """
    from napari_unet.models.trash import remove_model

    removed = remove_model(name)
    typer.echo(
        one_line(
            f"Removed {name}. Until {removed.kept_until} it comes back with: "
            f"napari-unet models restore {shlex.quote(name)}"
        )
    )


@models.command("restore")
def restore(name: _Name) -> None:
    """Bring back one of your models that was removed.

    Example: napari-unet models restore cells
    """
    from napari_unet.models.trash import restore_model

    restore_model(name)
    typer.echo(one_line(f"{name} is back in the library"))
