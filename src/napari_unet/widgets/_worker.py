"""Start a generator in a thread: the only caller of napari's `create_worker`."""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari.qt.threading import GeneratorWorker, create_worker
from napari.utils import progress
from napari.utils.notifications import show_error
from qtpy.QtCore import QObject, QThreadPool, QTimer
from superqt.utils import WorkerBase

from napari_unet.errors import UnetError
from napari_unet.steps import ChildError
from napari_unet.widgets._dock import while_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari_unet.steps import Progress


_BAR_INTERVAL = 0.1  # seconds
_THREADS = 8  # a training and a batch hold theirs; autosave and surveys need others

# A worker begins a millisecond after its start. If napari ends meanwhile, it begins
# after napari has waited for all workers, and Python must not end before it.
atexit.register(WorkerBase.await_workers)


class UnexpectedError(Exception):
    """A `RuntimeError` under another name: superqt's worker swallows those."""


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    problem: str = ""


class _ClosingWorker(GeneratorWorker):
    """Closes the steps when it is quit; Qt's own worker leaves them open."""

    steps: Generator[Progress, None, Any] | None = None

    def quit(self) -> None:
        super().quit()
        # Steps in a child process can be told without waiting for the current one.
        cancel = getattr(self.steps, "cancel", None)
        if cancel is not None:
            cancel()

    def work(self) -> Any:
        try:
            return super().work()
        finally:
            if self.steps is not None:
                self.steps.close()


def start_worker(
    steps: Generator[Progress, None, Any],
    *,
    title: str,
    on_progress: Callable[[Any], None],
    on_result: Callable[[Any], None],
    on_error: Callable[[str], None],
    on_finished: Callable[[], None],
) -> GeneratorWorker:
    """Run a generator in a thread, with a bar in napari's activity dock.

    All callbacks run on the main thread. ``worker.quit()`` cancels: then only
    ``on_finished`` is called.

    Parameters
    ----------
    steps : generator
        From a function whose name ends in ``_steps``; not yet started.
    title : str
        Of the bar in the activity dock; "" for a small computation in the
        background, which has none and whose errors are not shown here.
    on_progress, on_result, on_error, on_finished : callable
        ``on_error`` gets a sentence, which is also shown as a notification.

    Returns
    -------
    GeneratorWorker
        Started.
    """

    def run() -> Generator[Progress, None, _Outcome]:
        try:
            return _Outcome((yield from steps))
        except (UnetError, ChildError) as error:
            # Shown in words, without a traceback; not at all if the worker was quit.
            return _Outcome(problem=str(error))
        except RuntimeError as error:
            raise UnexpectedError(str(error)) from error

    worker = create_worker(run, _worker_class=_ClosingWorker)
    worker.steps = steps
    bar = progress(total=1, desc=title) if title else None
    moved = 0.0

    def advance(step: Progress) -> None:
        nonlocal moved
        on_progress(step)
        # Each update runs the event loop, which may deliver the next step: last, and
        # not for hundreds of steps a second.
        if bar is not None and time.monotonic() - moved > _BAR_INTERVAL:
            moved = time.monotonic()
            bar.total = max(step.total, 1)
            bar.update(step.done - bar.n)

    def deliver(outcome: _Outcome) -> None:
        if worker.abort_requested:  # when it had just come to its end
            return
        if outcome.problem:
            if title:
                show_error(outcome.problem)
            on_error(outcome.problem)
        else:
            on_result(outcome.value)

    def end() -> None:
        if bar is not None:
            bar.close()
        on_finished()

    worker.yielded.connect(advance)
    worker.returned.connect(deliver)
    worker.errored.connect(lambda error: on_error(str(error)))
    worker.finished.connect(end)
    pool = QThreadPool.globalInstance()  # in which napari starts all workers
    assert pool is not None
    pool.setMaxThreadCount(max(pool.maxThreadCount(), _THREADS))
    worker.start()
    return worker


class FollowUp(QObject):
    """Computes something in a thread, a moment after the last change.

    One computation at a time; a change during one leads to another. Errors are
    given to `on_error` and shown nowhere else.

    Parameters
    ----------
    parent : QObject
        Ends it with itself.
    delay : int
        Milliseconds.
    make_steps : callable
        Returns the generator to run, or None if there is nothing to do. Called on
        the main thread.
    on_result : callable
        Gets the result on the main thread.
    on_error : callable
        Gets a sentence.
    """

    def __init__(
        self,
        parent: QObject,
        delay: int,
        make_steps: Callable[[], Generator[Progress, None, Any] | None],
        on_result: Callable[[Any], None],
        on_error: Callable[[str], None],
    ):
        super().__init__(parent)
        self._make_steps = make_steps
        self._on_result = on_result
        self._on_error = on_error
        self._worker: GeneratorWorker | None = None
        self._again = False
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(delay)
        self._timer.timeout.connect(self._begin)

    @while_alive
    def request(self, event: object = None) -> None:
        """Compute soon."""
        self._timer.start()

    @while_alive
    def cancel(self) -> None:
        """Compute nothing more until the next request."""
        self._timer.stop()
        self._again = False
        if self._worker is not None:
            self._worker.quit()

    @property
    def is_busy(self) -> bool:
        """Whether a result is still to come."""
        return self._worker is not None or self._timer.isActive()

    def _begin(self) -> None:
        if self._worker is not None:
            self._again = True
            return
        steps = self._make_steps()
        if steps is None:
            return
        self._worker = start_worker(
            steps,
            title="",
            on_progress=lambda step: None,
            on_result=self._deliver,
            on_error=self._fail,
            on_finished=self._end,
        )

    @while_alive
    def _deliver(self, result: Any) -> None:
        self._on_result(result)

    @while_alive
    def _fail(self, message: str) -> None:
        self._on_error(message)

    @while_alive
    def _end(self) -> None:
        self._worker = None
        if self._again:
            self._again = False
            self.request()
