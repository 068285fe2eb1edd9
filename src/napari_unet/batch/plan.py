"""What is made of which image, and where: all names, before anything runs.

Nothing here imports torch or reads pixels.
"""

from __future__ import annotations

import os
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from napari_unet.errors import BadInput
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from pathlib import Path

    from napari_unet.batch.job import BatchJob

TIFF = (".tif", ".tiff")
ZARR = ".zarr"
PROBABILITIES = "_probabilities"

# What a batch writes beside the results, and the folder for its own use.
INTERNAL = ".napari-unet"
JOURNAL = "journal.jsonl"
MEASUREMENTS = "measurements.csv"
SUMMARY = "summary.csv"
REPORT = "report.html"
JOB = "job.yaml"
RESERVED = (INTERNAL, JOURNAL, MEASUREMENTS, SUMMARY, REPORT, JOB)


@dataclass(frozen=True)
class Item:
    """One image and the files that are made of it.

    Parameters
    ----------
    name : str
        What it is called in tables: its path below the folder of images.
    image, labels : Path
    probabilities : Path or None
    state : (int, int)
        Size and time of change of the image when a batch was planned: if it changes
        later, what is made of it is not what it will have been made of.
    """

    name: str
    image: Path
    labels: Path
    probabilities: Path | None
    state: tuple[int, int] = (0, 0)

    @property
    def outputs(self) -> list[Path]:
        """The files to write."""
        return [path for path in (self.labels, self.probabilities) if path]


def result_folders(output: Path, items: Iterable[Item]) -> set[Path]:
    """Return the folders in which a batch writes files.

    Parameters
    ----------
    output : Path
        The folder of the results.
    items : iterable of Item
        What is done.
    """
    folders = {output, output / INTERNAL, *(item.labels.parent for item in items)}
    with suppress(OSError):
        folders.update((output / INTERNAL).iterdir())
    return folders


def split_name(path: Path) -> tuple[str, str]:
    """Return the stem and the suffix of a file; ``.ome.tif`` is one suffix."""
    stem, suffix = path.stem, path.suffix
    if stem.lower().endswith(".ome"):
        return stem[:-4], stem[-4:] + suffix
    return stem, suffix


def name_key(name: str) -> str:
    """Return what is equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def few(names: Sequence[object]) -> str:
    """List three names and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more


def plan_files(
    inputs: Sequence[Path], output: Path, *, probabilities: bool
) -> list[Item]:
    """Find the images and name what is made of each, all in one folder.

    Parameters
    ----------
    inputs : sequence of path
        Images, and folders of images.
    output : path
        A TIFF file if there is one image, otherwise a folder.
    probabilities : bool
        Whether they are written, too.

    Raises
    ------
    BadInput
        If there are no images, or ``output`` cannot hold the results of all.
    """
    images = _find_images(inputs)
    is_folder = os.path.isdir(output) and output.suffix != ZARR
    is_file = not is_folder and output.suffix.lower() in TIFF
    if is_file and len(images) > 1:
        raise BadInput(
            f"{output} is one file, but there are {len(images)} images; give a folder "
            "as output."
        )
    if not is_file and not is_folder and _looks_like_image(output):
        raise BadInput(
            f"Labels cannot be written as {output.name}; give a .tif file or a folder "
            "as output."
        )
    items = []
    for image in images:
        labels = output if is_file else output / f"{split_name(image)[0]}.tif"
        beside = _probabilities_beside(labels) if probabilities else None
        items.append(Item(str(image), image, labels, beside))
    return items


def _find_images(inputs: Sequence[Path]) -> list[Path]:
    from napari_unet.files.images import list_images

    found: dict[Path, Path] = {}
    for given in inputs:
        images = run_to_end(_members_steps(list_images(given)))
        if not images:
            raise BadInput(f"There are no images in the folder {given}.")
        for image in images:
            found.setdefault(image.resolve(), image)
    return list(found.values())


def _members_steps(
    images: Sequence[Path],
) -> Generator[Progress, None, dict[Path, list[Path]]]:
    """Find the files of each image that `list_images` has found in a folder.

    Of a multi-file OME-TIFF the first file that describes all of it is the image, and
    the others are left out.
    """
    from napari_unet.files.members import is_part, list_members

    members = {}
    for number, image in enumerate(images):
        yield Progress(number, len(images), "looking at the folder")
        members[image] = list_members(image)
    covered: set[Path] = set()
    for image in images:
        if image in covered:
            continue
        for other in members[image]:
            if other == image or other not in members:
                continue
            # A header may also name a file that has nothing to do with it.
            if image in members[other] or is_part(other):
                covered.add(other)
    return {image: members[image] for image in images if image not in covered}


def _looks_like_image(path: Path) -> bool:
    from napari_unet.files.images import SUFFIXES

    return path.suffix.lower() in (*SUFFIXES, ZARR)


def _probabilities_beside(labels: Path) -> Path:
    stem, suffix = split_name(labels)
    return labels.with_name(f"{stem}{PROBABILITIES}{suffix}")


def plan_batch_steps(job: BatchJob) -> Generator[Progress, None, list[Item]]:
    """Find the images of a batch and name what is made of each.

    Parameters
    ----------
    job : BatchJob
        Says which folders, names and formats.

    Yields
    ------
    Progress
        Over the files of one folder after the other.

    Returns
    -------
    list of Item
        In natural order, a folder's images before its subfolders.

    Raises
    ------
    BadInput
        If there are no images of that pattern, or one of the folders cannot be read.
    """
    from napari_unet.files.members import state_of

    items = []
    found = yield from _find_in_folder_steps(job)
    for number, (image, members) in enumerate(found.items()):
        yield Progress(number, len(found), "looking at the images")
        below = image.relative_to(job.input)
        stem = split_name(image)[0]
        labels = (job.output / below).with_name(f"{stem}.{job.format}")
        beside = _probabilities_beside(labels) if job.probabilities else None
        state = state_of(members)
        items.append(Item(below.as_posix(), image, labels, beside, state))
    if not items:
        like = f" like {job.pattern}" if job.pattern else ""
        where = " and its subfolders" if job.recursive else ""
        raise BadInput(f"There are no images{like} in the folder {job.input}{where}.")
    return items


def _find_in_folder_steps(
    job: BatchJob,
) -> Generator[Progress, None, dict[Path, list[Path]]]:
    """Find the images of that pattern, and the files of each."""
    from napari_unet.files.images import list_images
    from napari_unet.files.ome_zarr import is_zarr

    if os.path.lexists(job.input) and (not job.input.is_dir() or is_zarr(job.input)):
        raise BadInput(
            f"{job.input} is an image; give the folder that it lies in, and its name "
            "as pattern."
        )
    waiting = [job.input]
    seen = set()
    found: dict[Path, list[Path]] = {}
    while waiting:
        folder = waiting.pop(0)
        # A link may lead back to where it lies.
        if (place := identity(folder)) in seen:
            continue
        seen.add(place)
        images = list_images(folder)
        for image, members in (yield from _members_steps(images)).items():
            if job.pattern is None or _is_like(image.name, job.pattern):
                found[image] = members
        if job.recursive:
            waiting[:0] = sorted(
                child
                for child in folder.iterdir()
                if child.is_dir()
                and not child.name.startswith(".")
                and child not in images
            )
    return found


def _is_like(name: str, pattern: str) -> bool:
    return fnmatchcase(name_key(name), name_key(pattern))


def identity(path: Path) -> tuple[int, int] | None:
    """Return what two names of one file have in common; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
