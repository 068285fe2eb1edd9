"""What a batch would do, before it does: what is done, what is left, what is lost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from napari_unet.batch.checks import check_batch, check_memory
from napari_unet.batch.folder import (
    complete_job,
    foreign_tables,
    open_journal,
    other_images,
)
from napari_unet.batch.plan import JOURNAL, plan_batch_steps
from napari_unet.errors import BadInput
from napari_unet.files.images import read_image
from napari_unet.inference.backends import choose_device
from napari_unet.inference.source import open_source
from napari_unet.steps import Progress, seldom_steps

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from napari_unet.batch.job import BatchJob
    from napari_unet.batch.journal import Entry, Journal
    from napari_unet.batch.plan import Item
    from napari_unet.models.model import Model

__all__ = ["FileState", "Survey", "survey_steps"]

_FIRST_BYTES = 2**24  # of the first image; a larger one is not read


@dataclass(frozen=True)
class FileState:
    """How one image stands.

    Parameters
    ----------
    item : Item
        The image and its results.
    status : str
        "skipped" if it is done; "failed" or "waiting" if it is not; "other" if there
        are results that were made in another way or changed since.
    entry : Entry or None
        What became of it, if it is "skipped" or "failed".
    """

    item: Item
    status: Literal["skipped", "failed", "waiting", "other"]
    entry: Entry | None = None


@dataclass(frozen=True)
class Survey:
    """What a batch would do.

    Parameters
    ----------
    job : BatchJob
        With the hash of the model and the versions.
    files : tuple of FileState
        In the order of the plan.
    foreign_tables : tuple of Path
        Those in the output folder that are not of these images.
    is_begun : bool
        Whether there is a journal, so that the batch can be resumed.
    doubt : str
        Why the first image, or none, cannot be segmented; "" if it can.
    pixel_size : dict
        Of the first image: axis letter to micrometres.
    """

    job: BatchJob
    files: tuple[FileState, ...]
    foreign_tables: tuple[Path, ...]
    is_begun: bool
    doubt: str
    pixel_size: dict[str, float]

    def count(self, status: str) -> int:
        """Return the number of files of a status."""
        return sum(file.status == status for file in self.files)


def survey_steps(job: BatchJob, model: Model) -> Generator[Progress, None, Survey]:
    """Look what a batch would do; nothing is written into its output.

    Parameters
    ----------
    job : BatchJob
        What is to be done.
    model : Model
        The job's, loaded.

    Yields
    ------
    Progress

    Returns
    -------
    Survey

    Raises
    ------
    BadInput, BadModel, BadOutput
        Why the job cannot be done at all.
    """
    yield Progress(0, 1, "looking at the folder")
    job = complete_job(job, model)
    items = yield from seldom_steps(plan_batch_steps(job))
    check_batch(job, items, overwrite=True)
    files = yield from seldom_steps(_look_steps(items, job, open_journal(job, model)))
    doubt, pixel_size = _try_first(items[0], job, model)
    doubt = _try_device(job, model) or doubt
    is_begun = (job.output / JOURNAL).is_file()
    tables = tuple(foreign_tables(job))
    return Survey(job, tuple(files), tables, is_begun, doubt, pixel_size)


def _look_steps(
    items: Sequence[Item], job: BatchJob, journal: Journal
) -> Generator[Progress, None, list[FileState]]:
    entries = journal.entries
    is_elsewhere = other_images(job) is not None
    files = []
    for number, item in enumerate(items):
        yield Progress(number, len(items), "looking at the results")
        entry = entries.get(item.name)
        files.append(_look(item, job, journal, entry, is_elsewhere))
    return files


def _look(
    item: Item,
    job: BatchJob,
    journal: Journal,
    entry: Entry | None,
    is_elsewhere: bool,
) -> FileState:
    if journal.is_done(item.name, item.state, job.output):
        return FileState(item, "skipped", entry)
    # More careful than `--resume`: what was finished is not replaced unasked, also
    # if only the image or the settings have changed since.
    was_done = entry is not None and entry.status == "done"
    is_other = (
        was_done
        or journal.is_outdated(item.name)
        or is_elsewhere
        or journal.foreign(item.name, item.outputs, job.output)
    )
    if is_other and any(map(os.path.lexists, item.outputs)):
        return FileState(item, "other")
    if entry and entry.status == "failed":
        return FileState(item, "failed", entry)
    return FileState(item, "waiting")


def _try_first(item: Item, job: BatchJob, model: Model) -> tuple[str, dict[str, float]]:
    """See whether the first image fits: if not, the others hardly will."""
    try:
        image = read_image(item.image, job.axes, max_bytes=_FIRST_BYTES)
        known = {**image.pixel_size, **(job.pixel_size or {})}
        sizes = {axis: known[axis] for axis in image.axes if axis in known}
        open_source(image.data, model, image.axes, job.settings.channels)
        model.rescaling(sizes)
    except BadInput as error:
        return f"{item.name}: {error}", {}
    return "", sizes


def _try_device(job: BatchJob, model: Model) -> str:
    """See whether the network fits into what it may take."""
    settings = job.settings
    if settings.memory_limit is None:
        return ""  # nothing to see, and not worth waking a GPU
    try:
        device = choose_device(settings.device)
        check_memory(model, device, settings.precision, settings.memory_limit)
    except BadInput as error:
        return str(error)
    return ""
