"""All models of the library with what they say of themselves, as a family tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from napari_unet.errors import BadModel
from napari_unet.models.checkpoint import read_header
from napari_unet.models.library import find_model, list_models

if TYPE_CHECKING:
    from pathlib import Path

    from napari_unet.models.checkpoint import Header


@dataclass(frozen=True)
class Entry:
    """A file of a model, without its weights.

    Parameters
    ----------
    name : str
    path : Path
    header : Header or None
        None if the file cannot be used.
    problem : str
        Why not.
    """

    name: str
    path: Path
    header: Header | None = None
    problem: str = ""


@dataclass(frozen=True)
class Branch:
    """A model and those that were fine-tuned from it, by name."""

    entry: Entry
    children: tuple[Branch, ...] = ()

    def find(self, name: str) -> Branch | None:
        """Return the branch of a model, None if it does not belong to this one."""
        if self.entry.name == name:
            return self
        found = (child.find(name) for child in self.children)
        return next((branch for branch in found if branch is not None), None)


def read_entry(name: str, path: Path) -> Entry:
    """Read what a file says of its model, or why it cannot be used."""
    try:
        return Entry(name, path, read_header(path))
    except BadModel as error:
        return Entry(name, path, problem=str(error))


def family_trees() -> tuple[Branch, ...]:
    """Return all models of the library, each below the one it was fine-tuned from."""
    entries = [read_entry(name, path) for name, path in list_models().items()]
    by_hash: dict[str, Entry] = {}
    for entry in entries:
        if entry.header is not None:
            former = entry.header.passport.former_sha256
            for sha256 in (entry.header.sha256, *former):
                by_hash.setdefault(sha256, entry)
    children: dict[str, list[Entry]] = {}
    for entry in entries:
        children.setdefault(_parent(entry, by_hash), []).append(entry)

    def branches(parent: str) -> tuple[Branch, ...]:
        below = children.get(parent, [])
        return tuple(Branch(entry, branches(entry.name)) for entry in below)

    return branches("")


def _parent(entry: Entry, by_hash: dict[str, Entry]) -> str:
    """Return the name of the nearest ancestor that is in the library, or ""."""
    if entry.header is None:
        return ""
    history = entry.header.passport.history
    for record in reversed(history):
        parent = by_hash.get(record.parent_sha256 or "")
        # Forged files may claim to be their own ancestors; histories only grow.
        if parent is not None and parent.header is not None:
            if len(parent.header.passport.history) < len(history):
                return parent.name
    return ""


def history(name: str) -> tuple[tuple[str, ...], Branch]:
    """Return what a model was made of, and what was made of it.

    Parameters
    ----------
    name : str
        In the library.

    Returns
    -------
    ancestors : tuple of str
        Models of the library, the oldest first.
    branch : Branch
        The model with those that were fine-tuned from it.

    Raises
    ------
    BadModel
        If there is no such model.
    """
    find_model(name)
    level = family_trees()
    ancestors: list[str] = []
    while True:
        above = next(branch for branch in level if branch.find(name) is not None)
        if above.entry.name == name:
            return tuple(ancestors), above
        ancestors.append(above.entry.name)
        level = above.children
