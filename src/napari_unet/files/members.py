"""Which files an image is made of: one, those of a set, or a folder's."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import tifffile

from napari_unet.files.tiff_log import listening
from napari_unet.files.tiff_metadata import read_ome

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["is_part", "list_members", "state_of"]


def list_members(path: Path) -> list[Path]:
    """List the files that are read for an image.

    Parameters
    ----------
    path : Path
        An image: a file, or the folder of an OME-Zarr.

    Returns
    -------
    list of Path
        The file itself first; with it those that its OME-XML header names. The
        files of an OME-Zarr in the order of their names. Of a file that cannot be
        read only itself: to find out why is the reader's task.
    """
    if path.is_dir():
        return sorted(member for member in path.rglob("*") if member.is_file())
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
        All its files, from `list_members`.

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
            states.append(member.stat())
    times = [state.st_mtime_ns for state in states]
    return sum(state.st_size for state in states), max(times, default=0)


def _ome_xml(path: Path) -> str:
    """Return the OME-XML header of a file, whatever it is named, or ""."""
    with suppress(Exception), listening(path), tifffile.TiffFile(path) as tiff:
        return tiff.ome_metadata or ""
    return ""
