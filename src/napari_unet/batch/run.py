"""One run of a batch: what it tells while files are done, and what it leaves."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from napari_unet.batch.cluster import distributed_steps
from napari_unet.batch.file import Task
from napari_unet.batch.overlap import overlapped_steps
from napari_unet.batch.plan import INTERNAL, REPORT, Item, few
from napari_unet.batch.report import write_report
from napari_unet.batch.tables import (
    join_measurements_steps,
    make_rows,
    write_summary,
)
from napari_unet.errors import Partial, UnetError
from napari_unet.steps import Progress, mapped_steps, run_to_end, seldom_steps

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from napari_unet.batch.file import FileStep
    from napari_unet.batch.job import BatchJob
    from napari_unet.batch.journal import Entry, Journal, Status
    from napari_unet.models.model import Model

Result = TypeVar("Result")

__all__ = ["BatchProgress", "BatchReport", "Run", "nameless_steps"]


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

    @property
    def named_note(self) -> str:
        """The note, which says of which file it is; "" if there is none."""
        own = self.name.rpartition("/")[2]
        is_named = not self.note or own in self.note
        return self.note if is_named else f"{self.name}: {self.note}"


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


def nameless_steps(
    steps: Generator[Progress, None, Result], done: int = 0, total: int = 1
) -> Generator[BatchProgress, None, Result]:
    """Tell now and then what is done beside the files."""

    def named(tick: Progress) -> Generator[BatchProgress, None, None]:
        far = f"{tick.done:,} of {tick.total:,}"
        yield BatchProgress(done, total, f"{tick.message}, {far}")

    return mapped_steps(seldom_steps(steps), named)


class Run:
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
            return (yield from nameless_steps(steps, self._total, self._total))
        except UnetError as error:
            raise self._with_what_is_kept(error) from error

    def _with_what_is_kept(self, error: UnetError) -> UnetError:
        """Add to what has ended a batch how to go on, if anything is left of it."""
        if not self._journal.path.exists():
            return error
        files = len(self._items)
        found = [self._entries.get(item.name) for item in self._items]
        done = sum(entry is not None and entry.status == "done" for entry in found)
        if files == 1:
            kept = "The image is done and kept" if done else "The image is not done yet"
        elif done:
            kept = f"{done} of {files} images are done and kept"
        else:
            kept = f"None of the {files} images is done yet"
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
