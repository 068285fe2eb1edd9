"""What is done: one line for each file, so that a stopped batch can go on."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from napari_unet.errors import BadInput
from napari_unet.files.atomic import bad_output
from napari_unet.files.members import files_below

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
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
    status : "done", "failed" or, of what is about to be done, "waiting"
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
    notes : tuple of str
        What the user should know of the file, in sentences.
    """

    name: str
    status: Literal["done", "failed", "waiting"]
    size: int = 0
    mtime_ns: int = 0
    outputs: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    objects: int | None = None
    covered: float = 0.0
    pixels: int = 0
    object_pixels: int = 0
    pixel_size: dict[str, float] = field(default_factory=dict)
    found: str = ""
    reason: str = ""
    details: str = ""
    notes: tuple[str, ...] = ()


_ENTRY = TypeAdapter(Entry)


class Journal:
    """The journal of an output folder: read once, then only added to.

    Parameters
    ----------
    path : Path
        It need not exist. A line that a killed run has left unfinished is ignored.
    fingerprint : str
        Of the job, see `BatchJob.fingerprint`. What was done under another one is
        not done.

    Raises
    ------
    BadInput
        If there is a file that is no journal, or one of a newer version.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path = path
        self._fingerprint = fingerprint
        self._last: dict[str, tuple[str, Entry]] = {}
        self._file: Any = None
        if path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise BadInput(
                f"Cannot read {self.path}: {error.strerror or error}."
            ) from error
        for line in lines[:-1]:  # the last ends without a line break, or is empty
            try:
                told = json.loads(line)
                version, fingerprint = told.pop("journal"), told.pop("batch")
                if version != VERSION:
                    raise BadInput(
                        f"{self.path} was written by another version of napari-unet; "
                        "choose another output folder."
                    )
                entry = _ENTRY.validate_python(told)
            except (ValueError, AttributeError, KeyError, TypeError):
                continue  # torn by a kill
            self._last[entry.name] = fingerprint, entry

    @property
    def entries(self) -> dict[str, Entry]:
        """What became of each image under this fingerprint."""
        return {
            name: entry
            for name, (fingerprint, entry) in self._last.items()
            if fingerprint == self._fingerprint
        }

    def is_outdated(self, name: str) -> bool:
        """Tell whether an image was done under another fingerprint."""
        fingerprint, entry = self._last.get(name, (self._fingerprint, None))
        is_done = entry is not None and entry.status == "done"
        return is_done and fingerprint != self._fingerprint

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
        fingerprint, entry = self._last.get(name, ("", None))
        return (
            entry is not None
            and fingerprint == self._fingerprint
            and entry.status == "done"
            and (entry.size, entry.mtime_ns) == state
            and all(size_of(folder / p) == n for p, n in entry.outputs.items())
        )

    def foreign(self, name: str, outputs: Iterable[Path], folder: Path) -> list[Path]:
        """Return the results of an image that are not known to be of this batch.

        Parameters
        ----------
        name : str
            The image, as `Item` calls it.
        outputs : iterable of Path
            What would be written; what is not there is not returned.
        folder : Path
            The output folder.
        """
        _, entry = self._last.get(name, ("", None))
        if entry is not None and entry.status != "done":
            return []  # begun, and not finished
        sizes = entry.outputs if entry is not None else {}
        return [
            path
            for path in outputs
            if os.path.lexists(path)
            and sizes.get(path.relative_to(folder).as_posix()) != size_of(path)
        ]

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
        self._add([entry])

    def forget(self, names: Iterable[str]) -> None:
        """Say that results are about to be made: what is there is not done any more.

        Whatever a kill leaves of them is then known to be of this batch.

        Raises
        ------
        BadOutput
            As `add`.
        """
        self._add([Entry(name, "waiting") for name in names])

    def _add(self, entries: Sequence[Entry]) -> None:
        same = {"journal": VERSION, "batch": self._fingerprint}
        lines = [json.dumps({**same, **asdict(entry)}) + "\n" for entry in entries]
        try:
            self._write("".join(lines).encode())
        except OSError as error:
            raise bad_output(self.path, error) from error
        for entry in entries:
            self._last[entry.name] = self._fingerprint, entry

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


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder; -1 if it is gone.

    A folder that another process has replaced meanwhile is looked at again.
    """
    while True:
        size = -1
        try:
            before = path.stat()
            if not path.is_dir():
                return before.st_size
            with suppress(OSError):
                size = sum(file.stat().st_size for file in files_below(path))
            if os.path.samestat(before, path.stat()):
                return size
        except OSError:
            return -1
