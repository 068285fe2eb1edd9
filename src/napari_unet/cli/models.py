"""The commands of ``napari-unet models``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from napari_unet.cli.words import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from napari_unet.models.family import Branch

models = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")]
_NameOrFile = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of a model, or the path of its file."),
]
_File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A checkpoint; it is not changed.")
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
        metavar="FILE", help="Gets the suffix .safetensors; or an existing folder."
    ),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file that is there.")
]
_NewName = Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")]


@models.callback()
def _models() -> None:
    """See which models there are, bring in others, rename and remove them.

    Example: napari-unet models list
    """


@models.command("list")
def list_all() -> None:
    """List the models that come with napari-unet, your own, and removed ones.

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
def import_(file: _File, name: _ImportedName = None, trust: _Trust = False) -> None:
    """Copy a checkpoint into the library.

    Example: napari-unet models import downloads/cells.safetensors --name cells
    """
    from napari_unet.cli.progress import Console
    from napari_unet.models.description import summary
    from napari_unet.models.family import read_entry
    from napari_unet.models.library import find_model, import_steps

    steps = import_steps(file, name, trust=trust)
    got = Console(quiet=False).follow(steps, "Import", unit="files")
    entry = read_entry(got, find_model(got))
    about = "" if entry.header is None else f": {summary(entry.header)}"
    typer.echo(one_line(f"Imported as {got}{about}"))


@models.command("export")
def export(name: _Name, file: _Target, overwrite: _Overwrite = False) -> None:
    """Copy a model out of the library, to pass it on.

    Example: napari-unet models export cells cells-2026.safetensors
    """
    from napari_unet.models.library import export_model

    written = export_model(name, file, overwrite=overwrite)
    typer.echo(one_line(f"Exported to {written}"))


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
    """Put one of your models into the trash, where it is kept for 30 days.

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
