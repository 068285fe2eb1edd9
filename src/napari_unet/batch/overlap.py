"""Many files in this process: reading and writing overlap with computing."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from napari_unet.batch.failure import failed
from napari_unet.batch.file import FileStep, compute_steps, finish, read
from napari_unet.errors import Cancelled
from napari_unet.steps import mapped_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from napari_unet.batch.file import Opened, Segmented, Task
    from napari_unet.batch.journal import Entry
    from napari_unet.batch.plan import Item
    from napari_unet.models.model import Model
    from napari_unet.steps import Progress

HEARTBEAT = 0.25  # seconds between two yields while something is waited for


def overlapped_steps(
    items: Sequence[Item],
    model: Model,
    task: Task,
    record: Callable[[Entry], None],
) -> Generator[FileStep, None, None]:
    """Segment files one after the other.

    While the network computes one, the next is read, if it is small, and the one
    before is measured and written. There is never more than one of each, and a
    large image is alone. So a kill costs the results of at most one file, and what
    the network had begun on the next.

    Parameters
    ----------
    items : sequence of Item
        What to do, in this order.
    model : Model
        For all of them.
    task : Task
        What is done with each.
    record : callable
        Gets what became of each, in order, when its results are on the disk.

    Yields
    ------
    FileStep
        Of one file or another.

    Raises
    ------
    BadModel, BadOutput
        When going on would make no sense. What was computed before is still written.
    """
    line = _Line(items, model, task, record)
    try:
        for number in range(len(items)):
            yield from line.file_steps(number)
        yield from line.settle_steps()
    finally:
        line.close()


class _Line:
    """The file that is read, and the one that is finished, beside the computed one."""

    def __init__(
        self,
        items: Sequence[Item],
        model: Model,
        task: Task,
        record: Callable[[Entry], None],
    ):
        self._items, self._model, self._task = items, model, task
        self._record = record
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2, "napari-unet-batch")
        self._ahead: Future[Opened] | None = None
        self._behind: tuple[Item, Future[Entry]] | None = None
        self._read_ahead(0)

    def _read_ahead(self, number: int) -> None:
        if number < len(self._items):
            item = self._items[number]
            self._ahead = self._pool.submit(read, item, self._task.axes)

    def file_steps(self, number: int) -> Generator[FileStep, None, None]:
        """Compute one file, and begin to finish it."""
        item = self._items[number]
        yield FileStep(item)
        reading = self._ahead
        assert reading is not None
        yield from self._wait_steps(reading, item)
        self._read_ahead(number + 1)
        opened = None
        try:
            opened = reading.result()
            segmented = yield from self._compute_steps(opened)
        except Exception as error:
            entry = failed(item, error, opened)
        else:
            yield from self._finish_steps(segmented)
            return
        yield from self.settle_steps()
        self._record(entry)
        yield FileStep(item, 1.0, entry=entry)

    def _compute_steps(self, opened: Opened) -> Generator[FileStep, None, Segmented]:
        def follow(step: Progress) -> Generator[FileStep, None, None]:
            part = step.done / max(step.total, 1)
            yield FileStep(opened.item, part, step.message, step.note)
            if self._behind and self._behind[1].done():
                yield from self.settle_steps()

        return mapped_steps(compute_steps(opened, self._model, self._task), follow)

    def _finish_steps(self, segmented: Segmented) -> Generator[FileStep, None, None]:
        try:
            yield from self.settle_steps()
        except BaseException:
            segmented.discard()
            raise
        item = segmented.opened.item
        self._behind = item, self._pool.submit(self._finish, segmented)
        if not segmented.is_small:
            yield from self.settle_steps()

    def _finish(self, segmented: Segmented) -> Entry:
        def check() -> None:
            # What is small is rather finished than thrown away.
            if self._stop.is_set() and not segmented.is_small:
                raise Cancelled("The batch was stopped.")

        opened = segmented.opened
        try:
            entry = finish(segmented, self._model, self._task, check)
        except Cancelled:
            raise
        except Exception as error:
            entry = failed(opened.item, error, opened)
        self._record(entry)
        return entry

    def settle_steps(self) -> Generator[FileStep, None, None]:
        """Wait until the file before is finished."""
        if self._behind is None:
            return
        item, finishing = self._behind
        yield from self._wait_steps(finishing, item, 1.0)
        self._behind = None
        yield FileStep(item, 1.0, entry=finishing.result())

    def _wait_steps(
        self, future: Future[Any], item: Item, part: float = 0.0
    ) -> Generator[FileStep, None, None]:
        while not wait([future], HEARTBEAT).done:
            yield FileStep(item, part, "writing" if part else "reading")

    def close(self) -> None:
        """Finish what is small, and give up what is not."""
        self._stop.set()
        try:
            # Before the pool is told to drop what it has not begun yet.
            if self._behind:
                wait([self._behind[1]])
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
