"""``project.json``: which files of a folder belong together, and what they mean."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from napari_unet.errors import BadInput
from napari_unet.files.atomic import atomic_path
from napari_unet.training.settings import TrainingSettings

__all__ = [
    "BASE_FILE",
    "FOLDERS",
    "FORMAT",
    "PROJECT_FILE",
    "SNAPSHOT_FILE",
    "Document",
    "Entry",
    "Kind",
    "Stored",
    "file_path",
    "file_stem",
    "is_project",
    "read_document",
    "write_document",
]

PROJECT_FILE = "project.json"
# Beside that a folder may hold a stopped training and its model.
SNAPSHOT_FILE = "training.snapshot"
BASE_FILE = "base.safetensors"
FORMAT: Final = "napari-unet project 1"
Kind = Literal["image", "labels"]
FOLDERS: dict[Kind, str] = {"image": "images", "labels": "labels"}

_MAX_BYTES = 1 << 28  # of project.json
_STEM_LENGTH = 40
_FileName = Annotated[
    str, StringConstraints(pattern=r"\A(images|labels)/[a-z0-9-]{1,80}\.tif\z")
]
_Positive = Annotated[float, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stored(_Record):
    """A file, and how to tell that it is as it was written.

    Parameters
    ----------
    file : str
        Its name in the folder.
    sha256 : str
        Of its pixels and what is said of them; see `hash_steps`.
    size, mtime_ns : int
        When they are the same, it need not be read again.
    """

    file: _FileName
    sha256: Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]
    size: int
    mtime_ns: int


class Entry(_Record):
    """An annotated image; see `Annotation`.

    Parameters
    ----------
    name, axes, pixel_size, unpainted, labels_are
    shape : tuple of int
        Of the image.
    regions : tuple of vertices
    image, labels : Stored
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    pixel_size: dict[str, _Positive]
    unpainted: Literal["background", "unknown"]
    labels_are: Literal["objects", "classes"]
    regions: tuple[tuple[tuple[float, ...], ...], ...]
    image: Stored
    labels: Stored

    @model_validator(mode="after")
    def _axes_fit(self) -> Entry:
        letters = set(self.axes)
        if (
            len(self.axes) != len(self.shape)
            or len(letters) != len(self.axes)
            or not {"Y", "X"} <= letters <= set("TCZYXS")
            or {"C", "S"} <= letters
            or min(self.shape) < 1
        ):
            raise ValueError(f"the axes {self.axes!r} do not fit {self.shape}")
        return self

    def layout(self, kind: Kind) -> dict[str, int]:
        """Return the axes of the image or the labels and their lengths."""
        lengths = dict(zip(self.axes, self.shape, strict=True))
        if kind == "labels":
            return {axis: n for axis, n in lengths.items() if axis not in "CS"}
        return lengths


class Document(_Record):
    """The contents of ``project.json``.

    Parameters
    ----------
    format, library_version, saved
        What wrote it, and when.
    name, base, ndim, settings
        See `Project`.
    images : tuple of Entry
    obsolete : tuple of str
        Files that no entry refers to: of a save under way, or no longer needed.
    """

    format: Literal["napari-unet project 1"] = FORMAT
    library_version: str
    saved: AwareDatetime
    name: str
    base: str
    ndim: Literal[2, 3]
    settings: TrainingSettings
    images: tuple[Entry, ...] = ()
    obsolete: tuple[_FileName, ...] = ()


class _Head(BaseModel):
    format: str


def is_project(folder: str | Path) -> bool:
    """Tell whether a folder is an annotation project, whole or damaged."""
    return (Path(folder) / PROJECT_FILE).is_file()


def read_document(folder: Path) -> Document:
    """Read and check ``project.json``.

    Parameters
    ----------
    folder : Path
        Of a project.

    Returns
    -------
    Document
        Its files have not been looked at.

    Raises
    ------
    BadInput
        If it is missing, damaged, of a newer version or not ours.
    """
    path = folder / PROJECT_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(f"{path} is too large for an annotation project.")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(
            f"{folder} is no annotation project: it has no {PROJECT_FILE}. Choose the "
            "folder that was saved."
        ) from error
    except OSError as error:
        raise BadInput(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        head = _Head.model_validate_json(content).format
        if re.fullmatch(r"napari-unet project [0-9]{1,9}", head) and head != FORMAT:
            raise BadInput(
                f"{folder.name} was saved by a newer version of napari-unet; update "
                "it to open this project."
            )
        return Document.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise BadInput(
            f"{path} is damaged, or not of an annotation project ({what}). Get an "
            "earlier copy of it."
        ) from error


def write_document(folder: Path, document: Document) -> None:
    """Replace ``project.json``; raise `BadOutput` if that fails."""
    with atomic_path(folder / PROJECT_FILE) as part:
        Path(part).write_text(document.model_dump_json(indent=1), encoding="utf-8")


def file_path(folder: Path, name: str) -> Path:
    """Return where a file of a project is, but never outside of its folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadInput(
            f"{path} is a link to another folder, which is not followed; put the file "
            "itself there."
        )
    return path


def file_stem(name: str) -> str:
    """Make of any name one that all systems allow: small letters, digits and -."""
    stem = re.sub(r"(\.ome)?\.[a-z0-9]{2,4}\Z", "", name.lower())
    ascii_only = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    stem = re.sub("[^a-z0-9]+", "-", ascii_only.lower()).strip("-")
    return stem[:_STEM_LENGTH].strip("-") or "image"
