"""Many files on several machines or GPUs: one task a file, sent to Dask workers.

A copy of the model lies in the output folder as long as a run lasts. The workers read
it; one that does not see it does not see the folder; and when it is gone, whatever
still runs somewhere stops.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from napari_unet.batch.failure import failed
from napari_unet.batch.file import FileStep
from napari_unet.batch.job import program_versions
from napari_unet.batch.plan import result_folders
from napari_unet.batch.results import writing
from napari_unet.batch.scheduler import PATIENCE, connected
from napari_unet.batch.worker import (
    Order,
    Unseen,
    segment_on_worker,
    sweep_folders,
    with_absolute_paths,
)
from napari_unet.errors import BadCluster, BadInput, BadOutput, Cancelled, UnetError
from napari_unet.files.source import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from napari_unet.batch.file import Task
    from napari_unet.batch.journal import Entry
    from napari_unet.batch.plan import Item
    from napari_unet.models.model import Model

HEARTBEAT = 0.25  # seconds between two yields while nothing happens
AHEAD = 2  # files a worker is given at once: one to compute, one to read or write
FETCH = 2.0  # seconds to get the few bytes that a task returns

_KILLED = (
    "The workers that segmented it died, one after the other. Memory may have run out: "
    "crop the image, or use workers with more."
)
_MODEL = "model-{}.safetensors"


def recall_tasks(internal: Path) -> None:
    """Stop the tasks of a killed run, which may still be running somewhere.

    Parameters
    ----------
    internal : Path
        The folder for own use in an output folder that is locked.
    """
    for model in internal.glob(_MODEL.format("*")):
        with suppress(OSError):
            model.unlink()


def distributed_steps(
    items: Sequence[Item],
    model: Model,
    task: Task,
    record: Callable[[Entry], None],
    *,
    scheduler: str,
) -> Generator[FileStep, None, None]:
    """Segment files on the workers of a Dask cluster.

    A worker that dies loses only what it was doing; others do that. A file with which
    workers die again and again is recorded as failed.

    Parameters
    ----------
    items : sequence of Item
        What to do.
    model : Model
        For all of them.
    task : Task
        What is done with each.
    record : callable
        Gets what became of each, in the order in which they are finished.
    scheduler : str
        See :func:`~napari_unet.batch.scheduler.check_scheduler`.

    Yields
    ------
    FileStep
        Of one file or another.

    Raises
    ------
    BadCluster
        If there is no scheduler or no worker, they were lost, or do not fit.
    BadModel, BadOutput
        When going on would make no sense.
    """
    if not items:
        return
    output = task.output.absolute()
    try:
        yield FileStep(items[0], message="starting the workers")
        with connected(scheduler, task) as client, _ordered(model, task) as order:
            yield from _Window(client, items, order, record).steps()
            with suppress(Exception):  # the next run would do it
                folders = sorted(result_folders(output, items))
                client.run(sweep_folders, folders, on_error="ignore")
    finally:
        # Listed now: at the start some were not there yet.
        sweep_folders(result_folders(output, items))


@contextmanager
def _ordered(model: Model, task: Task) -> Iterator[Order]:
    from napari_unet.models.checkpoint import model_sha256, save_model

    internal = task.internal.absolute()
    name = uuid.uuid4().hex
    with writing(internal):
        copy = save_model(model, internal / _MODEL.format(name))
    try:
        yield Order(
            task=replace(task, output=task.output.absolute(), internal=internal),
            model=copy,
            sha256=model_sha256(model),
            topic=f"napari-unet-{name}",
            versions=program_versions(model),
        )
    finally:
        with suppress(OSError):
            copy.unlink()


class _Window:
    """The files that are with the workers: never many, so that little is lost."""

    def __init__(
        self,
        client: Any,
        items: Sequence[Item],
        order: Order,
        record: Callable[[Entry], None],
    ):
        self._client, self._items, self._order = client, items, order
        self._record = record
        self._address = client.scheduler.address
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._waiting = deque(range(len(items)))
        self._running: dict[int, Any] = {}
        self._last: dict[int, FileStep] = {}  # of those that are running
        # Whether a file has killed its workers or another one beside it is known
        # when it is alone.
        self._suspects: deque[int] = deque()
        self._alone: set[int] = set()
        self._workers = 0
        self._seen = time.monotonic()  # when there was a worker last
        self._look_at = 0.0

    def steps(self) -> Generator[FileStep, None, None]:
        """Keep the workers busy until all files are finished."""
        self._client.subscribe_topic(self._order.topic, lambda e: self._inbox.put(e[1]))
        while self._waiting or self._running or self._suspects:
            self._look()
            self._submit()
            try:
                told = self._inbox.get(timeout=HEARTBEAT)
            except Empty:
                yield self._heartbeat()
                continue
            step = self._hear(told) if isinstance(told, dict) else self._take(*told)
            if step:
                yield step

    def _look(self) -> None:
        """See now and then how many workers there are."""
        if self._client.status != "running":
            raise self._lost()
        now = time.monotonic()
        if now < self._look_at:
            return
        try:
            self._workers = len(self._client.nthreads())
        except (OSError, TimeoutError) as error:
            raise self._lost() from error
        self._look_at = now + (5.0 if self._workers else HEARTBEAT)
        if self._workers:
            self._seen = now
        elif now > self._seen + PATIENCE:
            raise BadCluster(
                f"The Dask scheduler at {self._address} has had no workers for "
                f"{PATIENCE / 60:.0f} minutes. Start some."
            )

    def _submit(self) -> None:
        if not (self._waiting or self._running):
            number = self._suspects.popleft()
            self._alone.add(number)
            self._waiting.append(number)
        while self._waiting and len(self._running) < AHEAD * self._workers:
            number = self._waiting.popleft()
            future = self._client.submit(
                segment_on_worker,
                number,
                with_absolute_paths(self._items[number]),
                self._order,
                key=f"{self._order.topic}-{number}-{len(self._alone)}",
                pure=False,
            )
            self._running[number] = future
            future.add_done_callback(lambda f, n=number: self._inbox.put((n, f)))

    def _heartbeat(self) -> FileStep:
        for number in self._running:
            if number in self._last:
                return replace(self._last[number], note="")
        numbers = [*self._running, *self._waiting, *self._suspects]
        return FileStep(self._items[numbers[0]], message="waiting for a worker")

    def _hear(self, told: dict[str, Any]) -> FileStep | None:
        number = told["number"]
        if number not in self._running:
            return None
        step = FileStep(
            self._items[number], told["part"], told["message"], told["note"]
        )
        self._last[number] = step
        return step

    def _take(self, number: int, future: Any) -> FileStep | None:
        """Record what became of a file."""
        from distributed import KilledWorker

        item = self._items[number]
        try:
            entry = future.result(timeout=FETCH)
        except TimeoutError:
            # The worker has died with the result, and another one makes it again.
            future.add_done_callback(lambda f: self._inbox.put((number, f)))
            return None
        except KilledWorker:
            if number not in self._alone:
                self._forget(number)
                self._suspects.append(number)
                return None
            entry = failed(item, BadInput(_KILLED))
        except Unseen:
            if item.image.exists():
                raise
            entry = failed(item, BadInput(f"{item.image} is gone."))
        except Cancelled as error:
            raise BadOutput(
                f"Another batch has taken over {self._order.task.output}, or its "
                f"folder {self._order.task.internal.name} was removed."
            ) from error
        except UnetError:
            raise
        except Exception as error:
            if future.status != "error":
                raise self._lost() from error
            raise BadCluster(
                f"The cluster at {self._address} cannot run napari-unet "
                f"({type(error).__name__}: {one_line(error, 200)}). Install the same "
                "version of it with the scheduler and with all workers."
            ) from error
        self._forget(number)
        self._record(entry)
        return FileStep(item, 1.0, entry=entry)

    def _forget(self, number: int) -> None:
        self._last.pop(number, None)
        self._running.pop(number).release()

    def _lost(self) -> BadCluster:
        return BadCluster(
            f"The connection to the Dask scheduler at {self._address} was lost; it may "
            "have been stopped."
        )
