"""What the command line does with files: plans, and segments one.

Nothing here imports torch or reads pixels before it is called.
"""

from __future__ import annotations

import errno
import math
import os
import time
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from napari_unet.errors import BadInput, BadOutput
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unet.inference.segment import SegmentOptions
    from napari_unet.models.model import Model

TIFF = (".tif", ".tiff")
PROBABILITIES = "_probabilities"


@dataclass(frozen=True)
class Job:
    """One image and the files that are made of it."""

    image: Path
    labels: Path
    probabilities: Path | None

    @property
    def outputs(self) -> list[Path]:
        """The files to write."""
        return [path for path in (self.labels, self.probabilities) if path]


def split_name(path: Path) -> tuple[str, str]:
    """Return the stem and the suffix of a file; ``.ome.tif`` is one suffix."""
    stem, suffix = path.stem, path.suffix
    if stem.lower().endswith(".ome"):
        return stem[:-4], stem[-4:] + suffix
    return stem, suffix


def name_key(name: str) -> str:
    """Return what is equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def one_line(text: object) -> str:
    """Leave out what would break a line, or command a terminal."""
    return "".join(c if c.isprintable() or _is_byte(c) else " " for c in str(text))


def _is_byte(character: str) -> bool:
    """Tell whether a character stands for a byte of a name that is not text."""
    return "\udc80" <= character <= "\udcff"


def few(names: Sequence[object], shown: int = 3) -> str:
    """List some names and say how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def plan(inputs: Sequence[Path], output: Path, *, probabilities: bool) -> list[Job]:
    """Find the images and name what is made of each.

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
    is_folder = os.path.isdir(output)
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
    jobs = []
    for image in images:
        labels = output if is_file else output / f"{split_name(image)[0]}.tif"
        stem, suffix = split_name(labels)
        beside = labels.with_name(f"{stem}{PROBABILITIES}{suffix}")
        jobs.append(Job(image, labels, beside if probabilities else None))
    return jobs


def _find_images(inputs: Sequence[Path]) -> list[Path]:
    from napari_unet.files.images import list_images

    found: dict[Path, Path] = {}
    for given in inputs:
        images = list_images(given)
        if not images:
            raise BadInput(f"There are no images in the folder {given}.")
        for image in images:
            found.setdefault(image.resolve(), image)
    return list(found.values())


def _looks_like_image(path: Path) -> bool:
    from napari_unet.files.images import SUFFIXES

    return path.suffix.lower() in SUFFIXES


def check_plan(jobs: Sequence[Job], *, overwrite: bool) -> None:
    """Refuse before any work what could not be written, or would destroy a file.

    Parameters
    ----------
    jobs : sequence of Job
        From `plan`.
    overwrite : bool
        Whether results of an earlier run may be replaced; images never are.

    Raises
    ------
    BadInput
        If two images would have results of the same name.
    BadOutput
        If a result exists, would replace an image or cannot be written.
    """
    _check_collisions(jobs)
    folder = jobs[0].labels.parent
    _check_folder(folder)
    images = {_identity(job.image): job.image for job in jobs}
    for place in (folder, *folder.absolute().parents):
        if image := images.get(_identity(place)):
            raise BadOutput(
                f"The output lies inside the image {image}, which would change it; "
                "choose another folder."
            )
    existing = []
    for target in [path for job in jobs for path in job.outputs]:
        _check_target(target)
        if not os.path.lexists(target):
            continue
        if _identity(target) in images:
            raise BadOutput(
                f"{target} is one of the images, which are never overwritten; choose "
                "another output."
            )
        existing.append(target)
    if existing and not overwrite:
        one = len(existing) == 1
        raise BadOutput(
            f"{few(existing)} exist{'s' * one} already; use --overwrite to replace "
            f"{'it' if one else 'them'}, or choose another output."
        )


def _check_collisions(jobs: Sequence[Job]) -> None:
    taken: dict[str, Job] = {}
    for job in jobs:
        for target in job.outputs:
            other = taken.setdefault(name_key(target.name), job)
            if other is not job:
                raise BadInput(
                    f"The results of {other.image} and {job.image} would both be "
                    f"named {target.name}; rename one, or segment them into different "
                    "folders."
                )


def _check_folder(folder: Path) -> None:
    """Try to write into a folder, or where it will be made; tidy it up."""
    from napari_unet.files.atomic import check_writable, sweep

    places = (folder.absolute(), *folder.absolute().parents)
    place = next(place for place in places if os.path.lexists(place))
    if not os.path.isdir(place):
        raise BadOutput(
            f"Cannot write into {folder}: {place} is not a folder; choose another one."
        )
    check_writable(place)
    if place == folder.absolute():
        sweep(folder)


def _check_target(target: Path) -> None:
    from napari_unet.files.atomic import MAX_NAME_BYTES, bad_output

    if os.path.isdir(target):
        raise bad_output(target, IsADirectoryError(errno.EISDIR, ""))
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
        raise bad_output(target, OSError(errno.ENAMETOOLONG, ""))


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what two names of one file have in common; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def segment_file_steps(
    job: Job,
    model: Model,
    options: SegmentOptions,
    *,
    axes: str | None = None,
    pixel_size: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> Generator[Progress, None, str]:
    """Segment one image and write the results.

    Parameters
    ----------
    job : Job
        What to read and to write.
    model : Model
        Of the library or the user.
    options : SegmentOptions
        All but what belongs to the image.
    axes, pixel_size
        Override what the file says.
    overwrite : bool
        Whether results may be replaced.

    Yields
    ------
    Progress
        Over the tiles.

    Returns
    -------
    str
        What was found, in words.
    """
    from napari_unet.files.images import read_image
    from napari_unet.inference.segment import segment_and_predict_steps, segment_steps

    started = time.perf_counter()
    image = read_image(job.image, axes)
    for note in image.notes:
        yield Progress(0, 1, note=note)
    known = {**image.pixel_size, **(pixel_size or {})}
    size = {axis: known[axis] for axis in image.axes if axis in known}
    complete: SegmentOptions = {**options, "axes": image.axes, "pixel_size": size}
    probabilities = None
    if job.probabilities:
        labels, probabilities = yield from segment_and_predict_steps(
            image.data, model, **complete
        )
    else:
        labels = yield from segment_steps(image.data, model, **complete)
    left = "".join(axis for axis in image.axes if axis not in "CS")
    _write(job, model, labels, probabilities, left, size, overwrite)
    planes = math.prod(
        labels.shape[left.index(axis)]
        for axis in left
        if axis not in "ZYX"[-model.ndim :]
    )
    where = "" if planes == 1 else f" in {planes} planes"
    return f"{_found(labels, model)}{where}, {duration(time.perf_counter() - started)}"


def _write(
    job: Job,
    model: Model,
    labels: NDArray,
    probabilities: NDArray | None,
    axes: str,
    pixel_size: Mapping[str, float],
    overwrite: bool,
) -> None:
    from napari_unet import __version__
    from napari_unet.files.atomic import bad_output
    from napari_unet.files.outputs import write_labels, write_probabilities

    passport = model.passport
    try:
        job.labels.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_output(job.labels.parent, error) from error
    # The labels last: where they are, everything is.
    if job.probabilities and probabilities is not None:
        names = [info.name for info in passport.classes]
        write_probabilities(
            job.probabilities,
            probabilities,
            axes="C" + axes,
            pixel_size=pixel_size,
            # A network with one output says nothing of the background.
            class_names=names[-len(probabilities) :],
            overwrite=overwrite,
        )
    write_labels(
        job.labels,
        labels,
        axes=axes,
        pixel_size=pixel_size,
        description=f"Segmented by napari-unet {__version__} with the model "
        f"{passport.name} {passport.version}.",
        overwrite=overwrite,
    )


def _found(labels: NDArray, model: Model) -> str:
    """Count the objects, and say how much of the image each region covers."""
    classes = model.passport.classes
    kinds = [info.kind for info in classes]
    parts = []
    if "objects" in kinds:
        first = len(kinds) if "region" in kinds else 1
        count = max(int(labels.max(initial=0)) - first + 1, 0)
        parts.append(f"{count} object{'s' * (count != 1)}")
    for index, info in enumerate(classes):
        if info.kind == "region":
            parts.append(f"{float((labels == index).mean()):.1%} {info.name}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
