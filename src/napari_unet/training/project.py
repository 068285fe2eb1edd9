"""An annotation project: images, labels and regions in a folder of plain files.

``project.json`` says what belongs together. The files that it names never change:
whatever differs gets a new name, and what nothing refers to any more is removed
after ``project.json`` was replaced. So a save that is interrupted anywhere leaves
the state before it or after it.
"""

from __future__ import annotations

import datetime
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from napari_unet.errors import BadInput, BadOutput
from napari_unet.files.atomic import bad_output, sweep
from napari_unet.steps import Progress, run_to_end
from napari_unet.training.annotations import Annotation
from napari_unet.training.project_arrays import (
    Part,
    current_steps,
    open_array,
    parts_steps,
    write_steps,
)
from napari_unet.training.project_file import (
    BASE_FILE,
    FOLDERS,
    PROJECT_FILE,
    Document,
    Entry,
    Stored,
    file_path,
    is_project,
    read_document,
    write_document,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from napari_unet.training.settings import TrainingSettings

__all__ = [
    "Project",
    "base_of",
    "load_project",
    "save_project",
    "save_project_steps",
]


@dataclass(frozen=True, eq=False)
class Project:
    """What a model is to be trained on, and how.

    Parameters
    ----------
    annotations : tuple of Annotation
        Labels lie in memory, images only where there is room for them.
    settings : TrainingSettings
    base : str
        The model to start from: a name in the library or a path; "" for a new one.
    ndim : int
        Of a new model: 2 for a network of planes, 3 for one of volumes.
    name : str
        Of the model to be made.
    saved : datetime
        When.
    """

    annotations: tuple[Annotation, ...]
    settings: TrainingSettings
    base: str
    ndim: Literal[2, 3]
    name: str
    saved: datetime.datetime


def base_of(folder: str | Path, project: Project) -> str | Path:
    """Return the model to start from: the one in the folder, or else the named one.

    Parameters
    ----------
    folder : path
        Of the project.
    project : Project
        Loaded from there.

    Returns
    -------
    str or path
        For `load_model`; "" for a new one.
    """
    own = Path(folder) / BASE_FILE
    return own if own.is_file() else project.base


def load_project(folder: str | Path) -> Project:
    """Load what `save_project` saved.

    Parameters
    ----------
    folder : path
        Other programs may have changed its images and labels, but not their sizes.

    Returns
    -------
    Project

    Raises
    ------
    BadInput
        If something is missing, damaged or of a newer version.
    """
    folder = Path(folder)
    document = read_document(folder)
    return Project(
        tuple(_annotation(folder, entry) for entry in document.images),
        document.settings,
        document.base,
        document.ndim,
        document.name,
        document.saved,
    )


def save_project(
    folder: str | Path,
    annotations: Sequence[Annotation],
    settings: TrainingSettings,
    *,
    base: str = "",
    ndim: Literal[2, 3] = 2,
    name: str = "",
) -> Path:
    """Save annotations, and how to train on them, to go on at any time.

    Only what has changed since the last save is written.

    Parameters
    ----------
    folder : path
        New, empty, or a project.
    annotations : sequence of Annotation
        They need not be complete. All numbers are kept; types may become others
        that hold the same numbers.
    settings, base, ndim, name
        See `Project`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    BadInput
        If an annotation does not fit its image, or has numbers that TIFF cannot hold.
    BadOutput
        If the folder has other files, or cannot be written; it is as before.
    """
    return run_to_end(
        save_project_steps(
            folder, annotations, settings, base=base, ndim=ndim, name=name
        )
    )


def save_project_steps(
    folder: str | Path,
    annotations: Sequence[Annotation],
    settings: TrainingSettings,
    *,
    base: str = "",
    ndim: Literal[2, 3] = 2,
    name: str = "",
) -> Generator[Progress, None, Path]:
    """Do the same step by step; to close the generator leaves everything as before.

    Nothing that is passed may change meanwhile: copy labels that are painted on.

    Yields
    ------
    Progress
        Over the images and labels.
    """
    folder = Path(folder)
    previous = _previous(folder)
    facts = [_facts(annotation) for annotation in annotations]
    pairs = []
    for annotation in annotations:
        try:
            pairs.append((yield from parts_steps(annotation)))
        except BadInput as error:
            raise _named(annotation, error) from error
    parts = [part for pair in pairs for part in pair]
    kept = yield from _kept_steps(folder, previous)
    document = Document(
        library_version=version("napari-unet"),
        saved=datetime.datetime.now(datetime.UTC),
        name=_text(name),
        base=_text(base),
        ndim=ndim,
        settings=settings,
    )
    with _undone_on_failure(folder, previous) as written:
        new = _name_files(folder, [part for part in parts if part.sha256 not in kept])
        if new:  # so that the next save removes them should this one be killed
            draft = {"obsolete": tuple(new.values())}
            write_document(folder, (previous or document).model_copy(update=draft))
        for done, part in enumerate(parts):
            yield Progress(done, len(parts), f"saving {part.stem}")
            if part.sha256 not in kept:
                file = new[part.sha256]
                written.append(file)
                kept[part.sha256] = yield from write_steps(folder, file, part)
        entries = [
            Entry(**fact, image=kept[image.sha256], labels=kept[labels.sha256])
            for fact, (image, labels) in zip(facts, pairs, strict=True)
        ]
        needed = {part.sha256 for part in parts}
        was = _files(previous)  # what another program has changed stays
        old = tuple(
            one.file
            for one in kept.values()
            if one.sha256 not in needed and was.get(one.file) == one.sha256
        )
        update = {"images": tuple(entries), "obsolete": old}
        write_document(folder, document.model_copy(update=update))
    _remove(folder, old)
    return folder


def _facts(annotation: Annotation) -> dict[str, Any]:
    """Return what is known of an annotation beside its files."""
    try:
        regions = [np.asarray(region, float) for region in annotation.regions]
        for number, region in enumerate(regions, start=1):
            if region.ndim != 2 or not np.isfinite(region).all():
                raise ValueError(f"Region {number} has a corner that is no place.")
        sizes = {axis: float(size) for axis, size in annotation.pixel_size.items()}
        for axis, size in sizes.items():
            if not 0 < size < np.inf:
                raise ValueError(f"The pixel size along {axis} is {size}.")
    except (ValueError, TypeError) as error:
        raise _named(annotation, f"{error} Correct it before saving.") from error
    return {
        "name": _text(annotation.name),
        "axes": annotation.image_axes,
        "shape": tuple(int(n) for n in np.shape(annotation.image)),
        "pixel_size": sizes,
        "unpainted": annotation.unpainted,
        "labels_are": annotation.labels_are,
        "regions": [region.tolist() for region in regions],
    }


def _text(name: str) -> str:
    """Replace what is no text: names of files may have any bytes."""
    return name.encode(errors="replace").decode()


def _named(annotation: Annotation, problem: object) -> BadInput:
    return BadInput(f"{annotation.name}: {problem}" if annotation.name else problem)


def _previous(folder: Path) -> Document | None:
    """Read the project that is to be replaced; refuse to mix with other files."""
    try:
        if is_project(folder):
            return read_document(folder)
        if any(not child.name.startswith(".") for child in folder.iterdir()):
            raise BadOutput(
                f"{folder} has files already and is no annotation project; choose a "
                "new or an empty folder."
            )
    except FileNotFoundError:
        pass
    except OSError as error:
        raise bad_output(folder, error) from error
    except BadInput as error:
        raise BadOutput(f"Cannot save into {folder}: {error}") from error
    return None


def _kept_steps(
    folder: Path, previous: Document | None
) -> Generator[Progress, None, dict[str, Stored]]:
    """Return the files that need not be written again, by hash."""
    kept: dict[str, Stored] = {}
    for entry in previous.images if previous else ():
        for kind in FOLDERS:
            stored = yield from current_steps(folder, entry, kind)
            if stored is not None:
                kept[stored.sha256] = stored
    return kept


@contextmanager
def _undone_on_failure(folder: Path, previous: Document | None) -> Iterator[list[str]]:
    """Prepare the folder; unless all succeeds, remove the files that are listed."""
    is_new = not folder.exists()
    written: list[str] = []
    try:
        try:
            for name in FOLDERS.values():
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise bad_output(folder, error) from error
        for place in (folder, *(folder / name for name in FOLDERS.values())):
            sweep(place)
        if previous:
            used = _files(previous)
            _remove(folder, [file for file in previous.obsolete if file not in used])
        yield written
    except BaseException:
        used = _files(previous)
        with suppress(BadInput):  # the end may have been the very last moment
            used |= _files(read_document(folder))
        _remove(folder, [file for file in written if file not in used])
        if previous is None and not used:
            with suppress(OSError):
                (folder / PROJECT_FILE).unlink(missing_ok=True)
                for name in FOLDERS.values():
                    (folder / name).rmdir()
                if is_new:
                    folder.rmdir()
        raise


def _files(document: Document | None) -> dict[str, str]:
    """Return the files of all images and labels, and their hashes."""
    entries = document.images if document else ()
    both = (stored for entry in entries for stored in (entry.image, entry.labels))
    return {stored.file: stored.sha256 for stored in both}


def _remove(folder: Path, files: Sequence[str]) -> None:
    """Remove files that nothing refers to; what cannot be is left for the next save."""
    for file in files:
        with suppress(OSError, BadInput):
            file_path(folder, file).unlink()


def _name_files(folder: Path, parts: Sequence[Part]) -> dict[str, str]:
    """Give all that is to be written names that are free, by hash."""
    names: dict[str, str] = {}
    for part in parts:
        stem = f"{FOLDERS[part.kind]}/{part.stem}-{part.sha256[:8]}"
        name, number = f"{stem}.tif", 1
        while os.path.lexists(folder / name) or name in names.values():
            number += 1
            name = f"{stem}-{number}.tif"
        names.setdefault(part.sha256, name)
    return names


def _annotation(folder: Path, entry: Entry) -> Annotation:
    return Annotation(
        open_array(folder, entry, "image"),
        np.asarray(open_array(folder, entry, "labels")),
        [np.array(vertices, float) for vertices in entry.regions],
        axes=entry.axes,
        pixel_size=dict(entry.pixel_size),
        unpainted=entry.unpainted,
        labels_are=entry.labels_are,
        name=entry.name,
    )
