"""A batch: file after file, with a journal, so that nothing is done twice or lost."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from napari_unet.batch.checks import check_batch, check_memory
from napari_unet.batch.cluster import recall_tasks
from napari_unet.batch.file import writing
from napari_unet.batch.job import TILES_IF_INEXACT, BatchJob, program_versions
from napari_unet.batch.journal import Journal
from napari_unet.batch.plan import (
    INTERNAL,
    JOB,
    JOURNAL,
    MEASUREMENTS,
    REPORT,
    SUMMARY,
    Item,
    few,
    identity,
    plan_batch_steps,
    result_folders,
)
from napari_unet.batch.run import Run, nameless_steps
from napari_unet.batch.scheduler import check_scheduler
from napari_unet.errors import BadInput, BadModel, BadOutput
from napari_unet.files.atomic import sweep
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from napari_unet.batch.run import BatchProgress, BatchReport
    from napari_unet.models.model import Model

__all__ = ["batch_steps"]


def batch_steps(
    job: BatchJob,
    *,
    resume: bool = False,
    overwrite: bool = False,
    scheduler: str | None = None,
) -> Generator[BatchProgress, None, BatchReport]:
    """Segment a folder of images; see :mod:`napari_unet.batch.plan` for the names.

    A file that cannot be used is recorded, and the rest goes on. Closing the
    generator keeps everything that is finished.

    Parameters
    ----------
    job : BatchJob
        What to do.
    resume : bool
        Skip what an earlier run has done with the same model, settings and versions,
        if neither image nor results have changed since; replace results only if
        this batch has made them.
    overwrite : bool
        Replace existing results, whoever made them.
    scheduler : str or None
        Of a Dask cluster that does the work, "tcp://host:8786" or "local"; see
        :mod:`napari_unet.batch.cluster`. None does it in this process.

    Yields
    ------
    BatchProgress
        Of those with a name first one for each file, "waiting" or "skipped".

    Returns
    -------
    BatchReport
        Look at its `error`: files may have failed.

    Raises
    ------
    BadInput, BadModel, BadOutput
        Before anything is done if the job cannot be; `BadOutput` also when the disk
        is full. What is finished then is kept, and the message says how much.
    """
    from napari_unet.inference.backends import Device, choose_device
    from napari_unet.models.library import load_model

    if scheduler:
        check_scheduler(scheduler)
    items = yield from nameless_steps(plan_batch_steps(job))
    journal_path = job.output / JOURNAL
    may_replace = overwrite or (resume and journal_path.is_file())
    check_batch(job, items, overwrite=may_replace)
    model = load_model(job.model)
    wanted = job.settings.device
    if scheduler:  # workers choose for themselves
        device = Device(wanted)
    else:
        device = choose_device(wanted)
        settings = job.settings
        check_memory(model, device, settings.precision, settings.memory_limit)
    told, job = job, complete_job(job, model)
    with _locked(job.output):
        recall_tasks(job.output / INTERNAL)
        for folder in result_folders(job.output, items):
            sweep(folder)
        journal = open_journal(job, model)
        todo = items
        if resume:
            looking = _todo_steps(items, journal, job.output)
            todo = yield from nameless_steps(looking)
        if not overwrite:
            _check_ownership(job, todo, journal)
        run = Run(*(job, model, items, todo, journal, device.name), scheduler=scheduler)
        notes = [device.note, _changed_versions(told, job)]
        if resume and (outdated := sum(journal.is_outdated(i.name) for i in todo)):
            were, are = ("file was", "is") if outdated == 1 else ("files were", "are")
            notes.append(
                f"{outdated} {were} done with another model, other settings or "
                f"versions, and {are} done again."
            )
        if not job.measure and (job.output / MEASUREMENTS).exists():
            notes.append(f"{MEASUREMENTS} is of an earlier run: this one has none.")
        with journal:
            job.save(job.output / JOB)
            return (yield from run.steps(notes))


def _todo_steps(
    items: Sequence[Item], journal: Journal, output: Path
) -> Generator[Progress, None, list[Item]]:
    todo = []
    for number, item in enumerate(items):
        yield Progress(number, len(items), "looking at the results")
        if not journal.is_done(item.name, item.state, output):
            todo.append(item)
    return todo


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other runs away from an output folder, which is made if needed."""
    with writing(output / INTERNAL):
        # Of the system: the lock of a process that has died is free. Not bound to a
        # thread, because a generator may be closed by another one.
        lock = FileLock(output / INTERNAL / "lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise BadOutput(
                f"Another batch is writing into {output}; wait until it has ended, or "
                "choose another output."
            ) from None
    try:
        yield
    finally:
        lock.release()


def open_journal(job: BatchJob, model: Model) -> Journal:
    """Read the journal of a complete job's output, if there is one."""
    fingerprint = job.fingerprint(is_exact=model.inexact_reason is None)
    return Journal(job.output / JOURNAL, fingerprint)


def complete_job(job: BatchJob, model: Model) -> BatchJob:
    """Add the hash of the model, which must be the same if it is known.

    With it the versions of the programs and, where the result depends on it, the
    tile size.
    """
    from napari_unet.models.checkpoint import model_sha256

    found = model_sha256(model)
    if job.model_sha256 and job.model_sha256 != found:
        raise BadModel(
            f"The model {job.model} is not the one that the job was made with (its "
            f"hash begins with {found[:8]} instead of {job.model_sha256[:8]}). Get "
            "that one again, or choose this one anew (--model)."
        )
    settings = job.settings
    if model.inexact_reason and settings.tile is None:
        tile = TILES_IF_INEXACT[model.ndim]
        settings = settings.model_copy(update={"tile": tile})
    return job.model_copy(
        update={
            "model_sha256": found,
            "settings": settings,
            "versions": program_versions(model),
        }
    )


def other_images(job: BatchJob) -> Path | None:
    """Return whose results the output folder holds, if not of the job's images."""
    with suppress(BadInput):
        images = BatchJob.load(job.output / JOB).input
        if identity(images) != identity(job.input):
            return images
    return None


def foreign_tables(job: BatchJob) -> list[Path]:
    """Return the tables in the output folder that are not of the job's images."""
    tables = [job.output / name for name in (MEASUREMENTS, SUMMARY, REPORT)]
    images = other_images(job)
    # A folder that has gone may have been moved to where the job's images are.
    is_elsewhere = images is not None and images.exists()
    if not is_elsewhere and (job.output / JOURNAL).is_file():
        return []
    return [path for path in tables if os.path.lexists(path)]


def _check_ownership(job: BatchJob, todo: Sequence[Item], journal: Journal) -> None:
    """Refuse to replace what this batch has not made."""
    tables = foreign_tables(job)
    existing = [p for item in todo for p in item.outputs if os.path.lexists(p)]
    if (existing or tables) and (images := other_images(job)):
        raise BadOutput(
            f"{job.output} holds the results of the images in {images}; use "
            "--overwrite to replace them, or choose another output."
        )
    foreign = tables + [
        path
        for item in todo
        for path in journal.foreign(item.name, item.outputs, job.output)
    ]
    if foreign:
        one = len(foreign) == 1
        were = "was" if one else "were"
        raise BadOutput(
            f"{few(foreign)} exist{'s' * one} and {were} not made by this batch, or "
            f"{were} changed since; use --overwrite to replace "
            f"{'it' if one else 'them'}, or choose another output."
        )


def _changed_versions(told: BatchJob, job: BatchJob) -> str:
    """Say that a job is repeated with other programs than it was made with."""
    changed = [
        f"{name} {was} (now {job.versions.get(name, 'none')})"
        for name, was in told.versions.items()
        if job.versions.get(name) != was
    ]
    if not changed:
        return ""
    return (
        f"The job was made with {', '.join(changed)}: the results may differ a little."
    )
