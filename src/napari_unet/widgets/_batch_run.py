"""The steps of a batch, at a pace that a viewer can follow.

What they need is imported when they run, in a thread: torch takes seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from napari_unet.steps import Progress, mapped_steps
from napari_unet.widgets._batch_table import Row

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from napari_unet.batch.job import BatchJob
    from napari_unet.batch.run import BatchProgress, BatchReport
    from napari_unet.batch.survey import Survey
    from napari_unet.models.model import Model

INTERVAL = 0.05  # seconds between two steps
PARTS = 10_000  # of the whole; bytes are too many for a progress bar


@dataclass(frozen=True)
class BatchStep(Progress):
    """What has happened since the last step.

    Parameters
    ----------
    changed : mapping of str to Row
        What has become of which file.
    is_plan : bool
        Whether these are all files, in order.
    current : str
        The file that is computed.
    """

    changed: Mapping[str, Row] = field(default_factory=dict)
    is_plan: bool = False
    current: str = ""


def look_steps(job: BatchJob, model: Model) -> Generator[Progress, None, Survey]:
    """Do what `survey_steps` does."""
    from napari_unet.batch.survey import survey_steps

    return (yield from survey_steps(job, model))


def run_batch_steps(
    job: BatchJob, *, resume: bool, overwrite: bool
) -> Generator[BatchStep, None, BatchReport]:
    """Do what `batch_steps` does, with fewer and larger steps.

    Parameters
    ----------
    job : BatchJob
        What to do.
    resume, overwrite : bool
        See `batch_steps`.

    Yields
    ------
    BatchStep

    Returns
    -------
    BatchReport
    """
    yield BatchStep(0, PARTS, "preparing")
    from napari_unet.batch.folder import batch_steps

    gathered = _Gathered()

    def gather(step: BatchProgress) -> Generator[BatchStep, None, None]:
        if step.name:
            gathered.add(step)
            if gathered.is_due:
                yield gathered.take()
            return
        # What is done beside the files comes seldom, and may take long.
        if gathered.changed:
            yield gathered.take()
        done = PARTS * step.done // max(step.total, 1)
        yield BatchStep(done, PARTS, step.message or "preparing", step.note)

    steps = batch_steps(job, resume=resume, overwrite=overwrite)
    report = yield from mapped_steps(steps, gather)
    if gathered.changed:
        yield gathered.take()
    return report


class _Gathered:
    """Steps that are not passed on yet."""

    def __init__(self) -> None:
        self.changed: dict[str, Row] = {}
        self._note = ""
        self._is_noted = False  # whether there was one
        self._is_plan = True
        self._last: BatchProgress | None = None
        self._running = 0, ""
        self._passed = time.monotonic()

    def add(self, step: BatchProgress) -> None:
        """Take up one step."""
        if step.status == "running":
            self._running = max(self._running, (step.index + 1, step.name))
        if step.note and not self._is_noted:  # all are in the tips of their rows
            self._note, self._is_noted = step.named_note, True
        self.changed[step.name] = Row(step.name, step.status, step.entry)
        self._last = step

    @property
    def is_due(self) -> bool:
        """Whether it is time to pass on what was gathered."""
        step = self._last
        if self._is_plan:  # which comes first, file by file
            return step is not None and step.index + 1 == step.files
        return time.monotonic() - self._passed >= INTERVAL

    def take(self) -> BatchStep:
        """Return all of it as one step."""
        step = self._last
        assert step is not None
        number, name = self._running
        taken = BatchStep(
            PARTS * step.done // max(step.total, 1),
            PARTS,
            f"file {number} of {step.files}" if number else "preparing",
            self._note,
            changed=self.changed,
            is_plan=self._is_plan,
            current=name,
        )
        self.changed, self._note, self._is_plan = {}, "", False
        self._passed = time.monotonic()
        return taken
