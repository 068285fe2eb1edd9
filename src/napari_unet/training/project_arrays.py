"""The images and labels of an annotation project, and their files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.errors import BadInput
from napari_unet.files.images import read_image
from napari_unet.files.outputs import write_labels
from napari_unet.files.pixels import (
    Pixels,
    file_order,
    file_pixels,
    write_pixels_steps,
)
from napari_unet.steps import Progress
from napari_unet.training.annotations import checked_labels
from napari_unet.training.project_file import Stored, file_path, file_stem

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unet.training.annotations import Annotation
    from napari_unet.training.project_file import Entry, Kind

__all__ = ["Part", "current_steps", "open_array", "parts_steps", "write_steps"]

_LARGEST_LABEL = 2**32 - 1
# Other programs get to see no others: a header cannot hold them.
_MICROMETRES = (1e-6, 1e6)


@dataclass(frozen=True, eq=False)
class Part:
    """An image or its labels, as a file will have them.

    Parameters
    ----------
    kind : "image" or "labels"
    stem : str
        How the name of the file begins.
    pixels : Pixels
    pixel_size : dict of str to float
        Axis letter to micrometres.
    sha256 : str
        Of all that the file will hold.
    """

    kind: Kind
    stem: str
    pixels: Pixels
    pixel_size: dict[str, float]
    sha256: str


def parts_steps(
    annotation: Annotation,
) -> Generator[Progress, None, tuple[Part, Part]]:
    """Convert and hash an image and its labels.

    Parameters
    ----------
    annotation : Annotation
        Its image may be lazy.

    Yields
    ------
    Progress
        Heartbeats.

    Returns
    -------
    image, labels : Part

    Raises
    ------
    BadInput
        If they do not fit each other, or TIFF cannot hold their numbers.
    """
    labels = _file_labels(checked_labels(annotation))
    both: list[tuple[Kind, Pixels]] = [
        ("image", file_pixels(annotation.image, annotation.image_axes)),
        ("labels", file_pixels(labels, annotation.label_axes)),
    ]
    stem = file_stem(annotation.name)
    parts = []
    for kind, pixels in both:
        size = _file_size(annotation.pixel_size, pixels.axes)
        sha256 = yield from _hash_steps(kind, pixels, size)
        parts.append(Part(kind, stem, pixels, size, sha256))
    return parts[0], parts[1]


def write_steps(
    folder: Path, file: str, part: Part
) -> Generator[Progress, None, Stored]:
    """Write a file that does not exist yet.

    Parameters
    ----------
    folder : Path
        Of the project.
    file : str
        Its name there.
    part : Part
        What it will hold.

    Yields
    ------
    Progress
        Heartbeats.

    Returns
    -------
    Stored

    Raises
    ------
    BadOutput
        If it cannot be written.
    """
    path, pixels = file_path(folder, file), part.pixels
    if part.kind == "image":
        yield from write_pixels_steps(path, pixels, part.pixel_size)
    else:
        write_labels(
            path, pixels.image, axes=pixels.given_axes, pixel_size=part.pixel_size
        )
    return Stored(file=file, sha256=part.sha256, **_stamp(path))


def open_array(folder: Path, entry: Entry, kind: Kind) -> Any:
    """Read an image or labels with the axes of their entry.

    Parameters
    ----------
    folder : Path
        Of the project.
    entry : Entry
        Says which file.
    kind : "image" or "labels"
        Which of the two.

    Returns
    -------
    numpy or dask array

    Raises
    ------
    BadInput
        If the file is missing, damaged or of another size.
    """
    stored: Stored = getattr(entry, kind)
    path = file_path(folder, stored.file)
    if not path.is_file():
        raise BadInput(
            f"The project {folder.name} is incomplete: {stored.file} is missing. Put "
            "the file back, or start anew."
        )
    layout = entry.layout(kind)
    letters = file_order("".join(layout), tuple(layout.values()))
    lengths = dict(zip(letters, layout.values(), strict=True))
    order = sorted(letters, key="TZCYXS".index)
    named = "".join(a for a in order if a in "YX" or lengths[a] > 1)
    data = read_image(path, named).data
    if data.shape != tuple(lengths[axis] for axis in named):
        sides = " x ".join(str(lengths[axis]) for axis in named)
        found = " x ".join(map(str, data.shape))
        raise BadInput(
            f"{stored.file} of the project {folder.name} is {found} and was {sides} "
            "when it was saved. Put the old file back, or start anew."
        )
    if kind == "labels" and data.dtype.kind not in "bui":
        raise BadInput(
            f"{stored.file} of the project {folder.name} holds numbers of type "
            f"{data.dtype}; labels are whole numbers. Save it as 16 bits."
        )
    data = data.reshape(tuple(lengths[axis] for axis in order))
    return data.transpose([order.index(axis) for axis in letters])


def current_steps(
    folder: Path, entry: Entry, kind: Kind
) -> Generator[Progress, None, Stored | None]:
    """Look what a file holds now: another program may have changed it.

    Parameters
    ----------
    folder : Path
        Of the project.
    entry : Entry
        Says which file. It is read only if its size or time differ, as those of a
        copied folder do.
    kind : "image" or "labels"
        Which of the two.

    Yields
    ------
    Progress
        Heartbeats.

    Returns
    -------
    Stored or None
        With the present hash and time; None if the file cannot be used.
    """
    stored: Stored = getattr(entry, kind)
    try:
        now = _stamp(file_path(folder, stored.file))
        if now == {"size": stored.size, "mtime_ns": stored.mtime_ns}:
            return stored
        axes = "".join(entry.layout(kind))
        pixels = file_pixels(open_array(folder, entry, kind), axes)
        size = _file_size(entry.pixel_size, axes)
        sha256 = yield from _hash_steps(kind, pixels, size)
    except (BadInput, OSError):
        return None
    return Stored(file=stored.file, sha256=sha256, **now)


def _file_labels(labels: NDArray) -> NDArray:
    """Convert labels to the type that `write_labels` chooses."""
    highest = int(labels.max())
    if highest > _LARGEST_LABEL:
        raise BadInput(
            f"The labels go up to {highest}, and a label file holds numbers up to "
            f"{_LARGEST_LABEL}. Number the objects anew from 1."
        )
    return labels.astype(np.uint16 if highest < 2**16 else np.uint32, copy=False)


def _file_size(pixel_size: Mapping[str, float], axes: str) -> dict[str, float]:
    low, high = _MICROMETRES
    return {
        axis: float(size)
        for axis, size in sorted(pixel_size.items())
        if axis in "ZYX" and axis in axes and low < size < high
    }


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _hash_steps(
    kind: Kind, pixels: Pixels, pixel_size: Mapping[str, float]
) -> Generator[Progress, None, str]:
    sizes = sorted(pixel_size.items())
    facts = (kind, pixels.axes, pixels.shape, str(pixels.dtype), sizes)
    digest = hashlib.sha256(repr(facts).encode())
    for band in pixels.bands():
        digest.update(band.data)
        yield Progress(0, 1, "looking for changes")
    return digest.hexdigest()
