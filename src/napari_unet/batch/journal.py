"""What is done: one line for each file, so that a stopped batch can go on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from napari_unet.errors import BadInput
from napari_unet.files.atomic import bad_output

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

__all__ = ["Entry", "Journal", "Status"]

VERSION = 1

Status = Literal["waiting", "running", "done", "skipped", "failed"]


@dataclass(frozen=True)
class Entry:
    """What became of one file; plain data.

    Parameters
    ----------
    name : str
        The image, as `Item` calls it.
    status : "done" or "failed"
    size, mtime_ns : int
        Of the image when it was read.
    outputs : dict of str to int
        Paths below the output folder, and their sizes in bytes.
    seconds : float
    objects : int or None
        None for a model that finds no objects but regions.
    covered : float
        Part of the pixels that belongs to objects or regions.
    pixels, object_pixels : int
        Of the image, without channels, and of the objects.
    pixel_size : dict
        Axis letter to micrometres, as used.
    found : str
        What was found, in words.
    reason : str
        Why it failed.
    details : str
        For a report of a bug.
    """

    name: str
    status: Literal["done", "failed"]
    size: int = 0
    mtime_ns: int = 0
    outputs: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    objects: int | None = None
    covered: float = 0.0
    pixels: int = 0
    object_pixels: int = 0
    pixel_size: Mapping[str, float] = field(default_factory=dict)
    found: str = ""
    reason: str = ""
    details: str = ""


class Journal:
    """The journal of an output folder: read once, then only added to.

    Parameters
    ----------
    path : Path
        It need not exist. A line that a killed run has left unfinished is ignored.
    fingerprint : str
        Of the job; see `BatchJob.fingerprint`. What was done under another one is
        not done.

    Raises
    ------
    BadInput
        If there is a file that is no journal, or one of a newer version.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path = path
        self._fingerprint = fingerprint
        self.entries: dict[str, Entry] = {}
        self.others = 0
        self._file: Any = None
        self.exists = path.is_file()
        if self.exists:
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise BadInput(
                f"Cannot read {self.path}: {error.strerror or error}."
            ) from error
        others = set()
        for line in lines[:-1]:  # the last ends without a line break, or is empty
            try:
                told = json.loads(line)
                version, fingerprint = told.pop("journal"), told.pop("batch")
            except (ValueError, AttributeError, KeyError):
                continue  # torn by a kill, and continued by a later run
            if version != VERSION:
                raise BadInput(
                    f"{self.path} was written by a newer napari-unet; update it, or "
                    "choose another output folder."
                )
            if not (entry := _entry(told)):
                continue
            if fingerprint == self._fingerprint:
                self.entries[entry.name] = entry
                others.discard(entry.name)
            else:
                self.entries.pop(entry.name, None)
                others.add(entry.name)
        self.others = len(others)

    def is_done(self, name: str, state: tuple[int, int], folder: Path) -> bool:
        """Tell whether nothing is left to do for an image.

        Parameters
        ----------
        name : str
            The image, as `Item` calls it.
        state : (int, int)
            Its size and time of change now.
        folder : Path
            The results must still be there, with the size that they had.
        """
        entry = self.entries.get(name)
        return (
            entry is not None
            and entry.status == "done"
            and (entry.size, entry.mtime_ns) == state
            and all(size_of(folder / p) == n for p, n in entry.outputs.items())
        )

    def __enter__(self) -> Journal:
        """Open the file for adding, which makes it if needed."""
        try:
            self._file = open(self.path, "ab", buffering=0)
            if self._file.tell() and not self._ends_in_line_break():
                self._write(b"\n")
        except OSError as error:
            raise bad_output(self.path, error) from error
        return self

    def _ends_in_line_break(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def add(self, entry: Entry) -> None:
        """Add a line and wait until it is on the disk.

        Raises
        ------
        BadOutput
            If that fails; the file is then not done.
        """
        told = {"journal": VERSION, "batch": self._fingerprint, **asdict(entry)}
        try:
            self._write(json.dumps(told).encode() + b"\n")
        except OSError as error:
            raise bad_output(self.path, error) from error
        self.entries[entry.name] = entry

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _entry(told: dict[str, Any]) -> Entry | None:
    known = {item.name for item in fields(Entry)}
    if not known >= told.keys() or not isinstance(told.get("name"), str):
        return None
    if not isinstance(told.get("outputs"), dict):
        return None
    return Entry(**told)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder; -1 if it is gone."""
    try:
        if path.is_dir():
            sizes = (p.stat().st_size for p in path.rglob("*") if p.is_file())
            return sum(sizes)
        return path.stat().st_size
    except OSError:
        return -1
