"""Which files an image is made of: one, those of a set, or a folder's."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import tifffile

from napari_unet.files.tiff_log import listening
from napari_unet.files.tiff_metadata import read_ome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["files_below", "is_part", "list_members", "state_of"]


def list_members(path: Path) -> list[Path]:
    """List the files that are read for an image.

    Parameters
    ----------
    path : Path
        An image: a file, or the folder of an OME-Zarr.

    Returns
    -------
    list of Path
        The image itself first; with it the files that its OME-XML header names. Of
        a file that cannot be read only itself: to find out why is the reader's task.
    """
    if path.is_dir():
        return [path]
    xml = _ome_xml(path)
    own, others = None, set()
    # Where the header is forged, or files are missing, nothing of it is believed.
    with suppress(Exception):
        read_ome(xml, path)
        root = ElementTree.fromstring(xml)
        own = root.attrib.get("UUID")
        others = {
            element.attrib["FileName"]
            for element in root.iter()
            if str(element.tag).rpartition("}")[2] == "UUID" and element.text != own
        }
    return [path, *(path.parent / name for name in sorted(others - {path.name}))]


def is_part(path: Path) -> bool:
    """Tell whether a file only refers to the one that describes its image."""
    with suppress(Exception):
        return bool(read_ome(_ome_xml(path), path).part_of)
    return False


def state_of(members: Iterable[Path]) -> tuple[int, int]:
    """Return what changes when an image does: its bytes, and when it was written.

    Parameters
    ----------
    members : iterable of Path
        From `list_members`; of a folder all its files count.

    Returns
    -------
    size : int
        In bytes; 0 if they are gone.
    mtime_ns : int
        Of the youngest of them.
    """
    states = []
    for member in members:
        with suppress(OSError):
            files = files_below(member) if member.is_dir() else (member,)
            for file in files:
                states.append(file.stat())
    times = [state.st_mtime_ns for state in states]
    return sum(state.st_size for state in states), max(times, default=0)


def files_below(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Yield the files of a folder and its subfolders, without following links.

    Those of an OME-Zarr may be a million, for each of which a path takes its time.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path)
            elif entry.is_file():
                yield entry


def _ome_xml(path: Path) -> str:
    """Return the OME-XML header of a file, whatever it is named, or ""."""
    with suppress(Exception), listening(path), tifffile.TiffFile(path) as tiff:
        return tiff.ome_metadata or ""
    return ""
