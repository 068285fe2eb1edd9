"""A batch: file after file, with a journal, so that nothing is done twice or lost."""

from __future__ import annotations

import os
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock, Timeout

from napari_unet.batch.cluster import distributed_steps, recall_tasks
from napari_unet.batch.file import Task, writing
from napari_unet.batch.job import TILES_IF_INEXACT, BatchJob, program_versions
from napari_unet.batch.journal import Entry, Journal, Status
from napari_unet.batch.overlap import overlapped_steps
from napari_unet.batch.plan import (
    INTERNAL,
    JOB,
    JOURNAL,
    REPORT,
    Item,
    check_batch,
    few,
    identity,
    plan_batch_steps,
    result_folders,
)
from napari_unet.batch.report import write_report
from napari_unet.batch.scheduler import check_scheduler
from napari_unet.batch.tables import (
    join_measurements_steps,
    make_rows,
    write_summary,
)
from napari_unet.errors import BadInput, BadModel, BadOutput, Partial, UnetError
from napari_unet.files.atomic import sweep
from napari_unet.steps import Progress, run_to_end, seldom_steps

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from napari_unet.batch.file import FileStep
    from napari_unet.models.model import Model

Result = TypeVar("Result")

__all__ = ["BatchProgress", "BatchReport", "batch_steps"]


@dataclass(frozen=True)
class BatchProgress(Progress):
    """How far a batch is: `done` and `total` are bytes of images.

    Parameters
    ----------
    index : int
        Of the file that this is about, in the order of the plan.
    files : int
        How many there are.
    name : str
        The file's path below the folder of images; "" before they are known, if it
        takes long to find them, and when the tables are put together.
    status : str
        "waiting", "running", "done", "skipped" (done by an earlier run) or "failed".
    entry : Entry or None
        What became of it: objects, seconds, reason and so on.
    """

    index: int = 0
    files: int = 0
    name: str = ""
    status: Status = "waiting"
    entry: Entry | None = None


@dataclass(frozen=True)
class BatchReport:
    """What became of a batch.

    Parameters
    ----------
    job : BatchJob
        With the hash of the model and the versions.
    entries : tuple of Entry
        Of all files, in the order of the plan.
    skipped : int
        How many of them were done by an earlier run.
    report : Path
        To be opened in a browser.
    """

    job: BatchJob
    entries: tuple[Entry, ...]
    skipped: int
    report: Path

    @property
    def failed(self) -> list[Entry]:
        """The files that could not be segmented."""
        return [entry for entry in self.entries if entry.status == "failed"]

    @property
    def error(self) -> Partial | None:
        """What to raise if not all went well; it lists the failed files."""
        if not (failed := self.failed):
            return None
        names = few([entry.name for entry in failed])
        rest = " The others are done." if len(failed) < len(self.entries) else ""
        return Partial(
            f"{len(failed)} of {len(self.entries)} images could not be segmented: "
            f"{names}.{rest} The reasons are in {self.report}."
        )


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
    items = yield from _nameless_steps(plan_batch_steps(job))
    journal_path = job.output / JOURNAL
    may_replace = overwrite or (resume and journal_path.is_file())
    check_batch(job, items, overwrite=may_replace)
    with _locked(job.output):
        recall_tasks(job.output / INTERNAL)
        for folder in result_folders(job.output, items):
            sweep(folder)
        model = load_model(job.model)
        wanted = job.settings.device
        # Workers choose for themselves.
        device = Device(wanted) if scheduler else choose_device(wanted)
        told, job = job, complete_job(job, model)
        journal = open_journal(job, model)
        todo = items
        if resume:
            looking = _todo_steps(items, journal, job.output)
            todo = yield from _nameless_steps(looking)
        if not overwrite:
            _check_ownership(job, todo, journal)
        run = _Run(
            *(job, model, items, todo, journal, device.name), scheduler=scheduler
        )
        notes = [device.note, _changed_versions(told, job)]
        if resume and (outdated := sum(journal.is_outdated(i.name) for i in todo)):
            notes.append(
                f"{outdated} files were done with another model, other settings or "
                "versions, and are done again."
            )
        with journal:
            job.save(job.output / JOB)
            return (yield from run.steps(notes))


def _nameless_steps(
    steps: Generator[Progress, None, Result], done: int = 0, total: int = 1
) -> Generator[BatchProgress, None, Result]:
    """Tell now and then what is done beside the files."""
    with closing(seldom_steps(steps)) as ticks:
        while True:
            try:
                tick = next(ticks)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            far = f"{tick.done:,} of {tick.total:,}"
            yield BatchProgress(done, total, f"{tick.message}, {far}")


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
            "that one again, or name the model with --model to use this one."
        )
    settings = job.settings
    if model.inexact_reason and settings.tile is None:
        tile = TILES_IF_INEXACT[model.ndim]
        settings = settings.model_copy(update={"tile": tile})
    return job.model_copy(
        update={
            "model_sha256": found,
            "settings": settings,
            "versions": program_versions(),
        }
    )


def other_images(job: BatchJob) -> Path | None:
    """Return whose results the output folder holds, if not of the job's images."""
    with suppress(BadInput):
        images = BatchJob.load(job.output / JOB).input
        if identity(images) != identity(job.input):
            return images
    return None


def _check_ownership(job: BatchJob, todo: Sequence[Item], journal: Journal) -> None:
    """Refuse to replace what this batch has not made."""
    existing = [p for item in todo for p in item.outputs if os.path.lexists(p)]
    if existing and (images := other_images(job)):
        raise BadOutput(
            f"{job.output} holds the results of the images in {images}; use "
            "--overwrite to replace them, or choose another output."
        )
    foreign = [
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


class _Run:
    """One run of a batch, after everything was checked."""

    def __init__(
        self,
        job: BatchJob,
        model: Model,
        items: Sequence[Item],
        todo: Sequence[Item],
        journal: Journal,
        device: str,
        *,
        scheduler: str | None,
    ):
        self._job, self._model, self._journal = job, model, journal
        self._items, self._todo = items, todo
        self._scheduler = scheduler
        self._task = Task(
            output=job.output,
            internal=job.output / INTERNAL,
            options={**job.settings.options(model.ndim), "device": device},
            axes=job.axes,
            pixel_size=job.pixel_size,
            measure=job.measure,
            thumbnails=True,
            overwrite=True,  # what may not be replaced was refused before
        )
        self._index = {item.name: index for index, item in enumerate(items)}
        names = {item.name for item in todo}
        self._entries = {
            name: entry for name, entry in journal.entries.items() if name not in names
        }
        self._skipped = self._index.keys() - names
        # Files of more bytes take longer, and every file takes some time.
        self._weights = {item.name: item.state[0] + 4096 for item in items}
        self._total = sum(self._weights[name] for name in names)
        self._done = 0
        self._parts: dict[str, float] = {}  # of the files in work
        self._told = {""}

    def steps(self, notes: list[str]) -> Generator[BatchProgress, None, BatchReport]:
        """Do what is not done yet; begin with what there is to tell."""
        for item in self._items:
            is_skipped = item.name in self._skipped
            yield self._progress(item, "skipped" if is_skipped else "waiting")
        for note in filter(None, notes):
            yield BatchProgress(0, self._total, note=note)
        self._journal.forget(item.name for item in self._todo)
        try:
            with closing(self._file_steps()) as files:
                for step in files:
                    yield self._follow(step)
        except BaseException as error:
            # Whatever fails now, the first error is the one to tell.
            with suppress(Exception):
                run_to_end(self._conclude_steps())
            if isinstance(error, UnetError):
                raise self._with_what_is_kept(error) from error
            raise
        try:
            steps = self._conclude_steps()
            return (yield from _nameless_steps(steps, self._total, self._total))
        except UnetError as error:
            raise self._with_what_is_kept(error) from error

    def _with_what_is_kept(self, error: UnetError) -> UnetError:
        """Add to what has ended a batch how to go on."""
        entries = self._entries
        names = [item.name for item in self._items if item.name in entries]
        done = sum(entries[name].status == "done" for name in names)
        kept = f"None of the {len(self._items)} images is done yet"
        if done:
            are = "image is" if len(self._items) == 1 else "images are"
            kept = f"{done} of {len(self._items)} {are} done and kept"
        return type(error)(f"{error} {kept}; resume the batch (--resume) for the rest.")

    def _file_steps(self) -> Generator[FileStep, None, None]:
        what = self._todo, self._model, self._task, self._record
        if self._scheduler:
            return distributed_steps(*what, scheduler=self._scheduler)
        return overlapped_steps(*what)

    def _record(self, entry: Entry) -> None:
        self._journal.add(entry)
        self._entries[entry.name] = entry

    def _follow(self, step: FileStep) -> BatchProgress:
        name = step.item.name
        if step.entry:
            self._parts.pop(name, None)
            self._done += self._weights[name]
        else:
            self._parts[name] = step.part
        note = "" if step.note in self._told else step.note
        self._told.add(note)
        status = step.entry.status if step.entry else "running"
        return self._progress(step.item, status, step.message, note)

    def _progress(
        self, item: Item, status: Status, message: str = "", note: str = ""
    ) -> BatchProgress:
        number = self._index[item.name] + 1
        parts = [f"file {number} of {len(self._items)}", item.name, message]
        begun = [self._weights[name] * part for name, part in self._parts.items()]
        return BatchProgress(
            done=self._done + int(sum(begun)),
            total=self._total,
            message=", ".join(filter(None, parts)),
            note=note,
            index=number - 1,
            files=len(self._items),
            name=item.name,
            status=status,
            entry=None if status == "running" else self._entries.get(item.name),
        )

    def _conclude_steps(self) -> Generator[Progress, None, BatchReport]:
        """Put together what was found so far, what is most wanted first."""
        found = [self._entries.get(item.name) for item in self._items]
        entries = tuple(entry for entry in found if entry is not None)
        yield Progress(0, len(entries), "writing the report")
        rows = make_rows(entries, self._model.ndim)
        write_summary(self._task, rows, self._model.ndim)
        report = self._job.output / REPORT
        write_report(report, self._job, self._model, self._task, rows, len(self._items))
        if self._task.measure:
            yield from join_measurements_steps(self._task, entries)
        return BatchReport(self._job, entries, len(self._skipped), report)
