"""One image of a batch: from its file to the files that are made of it.

Three parts, so that a folder of files can overlap them: to read, to compute (the
only one that needs the network), and to finish: to measure and to write.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.batch.failure import check_output, check_unchanged
from napari_unet.batch.journal import Entry, size_of
from napari_unet.batch.results import write_results, writing
from napari_unet.batch.volume import BLOCK_PIXELS, segment_into_steps
from napari_unet.files.atomic import bad_output, make_scratch
from napari_unet.files.images import ImageFile, read_image
from napari_unet.files.scratch import Scratch
from napari_unet.inference.engine import Predictor
from napari_unet.inference.segment import take_settings
from napari_unet.steps import Progress, mapped_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path

    from napari_unet.batch.plan import Item
    from napari_unet.inference.segment import Found, SegmentOptions
    from napari_unet.models.model import Model

__all__ = [
    "FileStep",
    "Opened",
    "Segmented",
    "Task",
    "compute_steps",
    "finish",
    "read",
    "segment_file_steps",
    "writing",
]

# Larger images are read, and larger results kept, in pieces. Fixed, so that the
# results never depend on the free memory.
LAZY_BYTES = 2**28
LAZY_VALUES = BLOCK_PIXELS  # blocks need the same folder for what is temporary


@dataclass(frozen=True)
class Task:
    """What is done with every image; plain data.

    Parameters
    ----------
    output : Path
        The folder below which the results lie.
    internal : Path
        A folder for what is temporary and what is put together at the end.
    options : SegmentOptions
        All but what belongs to the image.
    axes, pixel_size
        Override what the files say.
    measure : bool
        Whether each object is measured.
    thumbnails : bool
        Whether a small picture is made of each.
    overwrite : bool
        Whether results may be replaced.
    """

    output: Path
    internal: Path
    options: SegmentOptions
    axes: str | None = None
    pixel_size: Mapping[str, float] | None = None
    measure: bool = False
    thumbnails: bool = False
    overwrite: bool = False

    def measurements(self, name: str) -> Path:
        """Return where the measurements of an image are kept."""
        return self.internal / "measurements" / f"{_key(name)}.csv"

    def thumbnail(self, name: str) -> Path:
        """Return where the small picture of an image is kept."""
        return self.internal / "thumbnails" / f"{_key(name)}.jpg"


def _key(name: str) -> str:
    """Return a file name of fixed length for a name that may have any."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class FileStep:
    """How far one file of several is.

    Parameters
    ----------
    item : Item
        The file.
    part : float
        Of its computing, from 0 to 1.
    message, note : str
        As in `Progress`.
    entry : Entry or None
        What became of it, when it is finished; it is in the journal then.
    """

    item: Item
    part: float = 0.0
    message: str = ""
    note: str = ""
    entry: Entry | None = None


@dataclass(frozen=True)
class Opened:
    """An image that was read, or will be read plane by plane."""

    item: Item
    image: ImageFile
    seconds: float


@dataclass(frozen=True)
class Segmented:
    """An image whose results are computed, but not written yet."""

    opened: Opened
    pixel_size: Mapping[str, float]
    labels: Any
    probabilities: Any
    found: Found
    scratch: Scratch | None
    seconds: float
    notes: tuple[str, ...]

    @property
    def is_small(self) -> bool:
        """Whether everything is in memory."""
        return self.scratch is None and isinstance(self.opened.image.data, np.ndarray)

    def discard(self) -> None:
        """Remove the temporary files."""
        if self.scratch is not None:
            self.scratch.remove()


def read(item: Item, axes: str | None = None) -> Opened:
    """Read an image, in memory only if it is small."""
    started = time.perf_counter()
    image = read_image(item.image, axes, max_bytes=LAZY_BYTES)
    return Opened(item, image, time.perf_counter() - started)


def compute_steps(
    opened: Opened, model: Model, task: Task
) -> Generator[Progress, None, Segmented]:
    """Run the network and make objects; see `segment_file_steps`."""
    started = time.perf_counter()
    image, item = opened.image, opened.item
    for note in image.notes:
        yield Progress(0, 1, note=note)
    notes = [*image.notes]
    known = {**image.pixel_size, **(task.pixel_size or {})}
    pixel_size = {axis: known[axis] for axis in image.axes if axis in known}
    options: Any = {**task.options, "axes": image.axes, "pixel_size": pixel_size}
    settings = take_settings(options, model.passport)
    predictor = Predictor(image.data, model, **options)
    scratch = None
    try:
        shape = predictor.output_shape
        if math.prod(shape if item.probabilities else shape[1:]) > LAZY_VALUES:
            check_output(task)
            with writing(task.internal):
                scratch = Scratch(make_scratch(task.internal))
        axes = _label_axes(image)
        labels = _array(scratch, axes, shape[1:], np.uint32)
        probabilities = None
        if item.probabilities:
            probabilities = _array(scratch, "C" + axes, shape, np.float32)
        folder = scratch.folder if scratch else None
        steps = segment_into_steps(
            predictor, settings, labels, probabilities, scratch=folder
        )
        found = yield from _noting_steps(steps, notes)
    except BaseException as error:
        if scratch is not None:
            scratch.remove()
            if isinstance(error, OSError):
                raise bad_output(scratch.folder, error) from error
        raise
    finally:
        predictor.close()
    seconds = opened.seconds + time.perf_counter() - started
    return Segmented(
        *(opened, pixel_size, labels, probabilities, found, scratch, seconds),
        notes=tuple(dict.fromkeys(notes)),
    )


def _noting_steps(
    steps: Generator[Progress, None, Found], notes: list[str]
) -> Generator[Progress, None, Found]:
    """Go through a generator and keep what it notes."""

    def noted(step: Progress) -> Generator[Progress, None, None]:
        if step.note:
            notes.append(step.note)
        yield step

    return mapped_steps(steps, noted)


def _written_size(path: Path) -> int:
    """Return the size of what was written, which may just be replaced by the same.

    A worker that was taken for dead does that: the folder has no name for a moment.
    """
    deadline = time.monotonic() + 5
    while (size := size_of(path)) < 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    return size


def _label_axes(image: ImageFile) -> str:
    return "".join(axis for axis in image.axes if axis not in "CS")


def _array(
    scratch: Scratch | None, axes: str, shape: tuple[int, ...], dtype: Any
) -> Any:
    """Make an array in memory, or in a folder that holds it compressed."""
    if scratch is None:
        return np.zeros(shape, dtype)
    chunks = tuple(
        min(n, 512) if axis in "YX" else 1 for axis, n in zip(axes, shape, strict=True)
    )
    with writing(scratch.folder):
        return scratch.new_array(shape, chunks, dtype)


def finish(
    done: Segmented, model: Model, task: Task, check: Callable[[], None]
) -> Entry:
    """Measure an image and write its results, the labels last.

    Parameters
    ----------
    done : Segmented
        Its temporary files are removed in any case.
    model : Model
        Named in the files.
    task : Task
        What is wanted.
    check : callable
        Called now and then with large images; raises to stop.
    """
    started = time.perf_counter()
    item, image = done.opened.item, done.opened.image
    axes = _label_axes(image)
    outputs = [*item.outputs]
    if task.measure:
        outputs.append(task.measurements(item.name))
    try:
        check_output(task)
        check_unchanged(item)
        with writing(item.labels.parent):
            write_results(done, axes, model, task, check)
    finally:
        done.discard()
    planes = math.prod(
        done.labels.shape[axes.index(axis)]
        for axis in axes
        if axis not in "ZYX"[-model.ndim :]
    )
    where = "" if planes == 1 else f" in {planes} planes"
    kinds = [info.kind for info in model.passport.classes]
    size, mtime_ns = item.state
    return Entry(
        name=item.name,
        status="done",
        size=size,
        mtime_ns=mtime_ns,
        outputs={_below(path, task.output): _written_size(path) for path in outputs},
        seconds=round(done.seconds + time.perf_counter() - started, 3),
        objects=sum(done.found.objects) if "objects" in kinds else None,
        covered=sum(done.found.pixels[1:]) / sum(done.found.pixels),
        pixels=math.prod(done.labels.shape),
        object_pixels=sum(
            pixels
            for pixels, kind in zip(done.found.pixels, kinds, strict=True)
            if kind == "objects"
        ),
        pixel_size=dict(done.pixel_size),
        found=done.found.describe() + where,
        notes=done.notes,
    )


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def segment_file_steps(
    item: Item, model: Model, task: Task
) -> Generator[Progress, None, Entry]:
    """Segment one image and write the results.

    Parameters
    ----------
    item : Item
        What to read and to write.
    model : Model
        Of the library or the user.
    task : Task
        What is done with it.

    Yields
    ------
    Progress
        Over the tiles.

    Returns
    -------
    Entry
        What was found.

    Raises
    ------
    BadInput, OutOfMemory
        If this image cannot be used.
    BadOutput
        If the results cannot be written; of each file there is then the old one
        or none.
    """
    opened = read(item, task.axes)
    segmented = yield from compute_steps(opened, model, task)
    return finish(segmented, model, task, lambda: None)
