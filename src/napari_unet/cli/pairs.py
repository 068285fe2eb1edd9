"""Images and labels that belong together because they have the same name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from napari_unet.batch.plan import few, name_key, split_name
from napari_unet.cli.words import one_line
from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["pair_by_name", "read_labels"]


def pair_by_name(
    first: Path,
    second: Path,
    *,
    kinds: tuple[str, str] = ("label images", "label images"),
    skip: str | None = None,
) -> list[tuple[str, Path, Path]]:
    """Match two kinds of images by their names without suffix.

    Parameters
    ----------
    first, second : path
        Two folders, or two files, which need not have the same name.
    kinds : tuple of str, optional
        What to call them in messages.
    skip : str, optional
        Leave out images of the first folder whose name ends so.

    Returns
    -------
    list of (name, first, second)

    Raises
    ------
    BadInput
        If one has no counterpart, or a folder has no images.
    """
    if os.path.isfile(first) and os.path.isfile(second):
        return [(split_name(second)[0], first, second)]
    found, wanted = _by_name(first, kinds[0], skip), _by_name(second, kinds[1])
    for have, others, where in ((wanted, found, first), (found, wanted, second)):
        lonely = [path for key, path in have.items() if key not in others]
        if lonely:
            raise BadInput(
                f"{where} has no counterpart of {few(lonely)}; the names must be the "
                "same up to the suffix."
            )
    return [(split_name(path)[0], found[key], path) for key, path in wanted.items()]


def _by_name(folder: Path, kind: str, skip: str | None = None) -> dict[str, Path]:
    from napari_unet.files.images import list_images

    paths: dict[str, Path] = {}
    for path in list_images(folder):
        stem = split_name(path)[0]
        if skip and stem.endswith(skip):
            continue
        other = paths.setdefault(name_key(stem), path)
        if other is not path:
            raise BadInput(
                f"{other.name} and {path.name} in {folder} have the same name up to "
                "the suffix; leave only one of them there."
            )
    if not paths:
        raise BadInput(f"There are no {kind} in {folder}.")
    return paths


def read_labels(path: Path) -> Any:
    """Read a label image; say on stderr what the user should know about it."""
    from napari_unet.files.images import read_image

    image = read_image(path)
    for note in image.notes:
        named = note if path.name in note else f"{path.name}: {note}"
        typer.echo(f"Note: {one_line(named)}", err=True)
    if "S" in image.axes:
        raise BadInput(
            f"{path.name} is a colour image; label images have one whole number for "
            "each pixel."
        )
    return image.data
