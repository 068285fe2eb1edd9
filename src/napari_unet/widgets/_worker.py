"""Start a generator in a thread: the only caller of napari's `create_worker`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari.qt.threading import GeneratorWorker, create_worker
from napari.utils import progress
from napari.utils.notifications import show_error

from napari_unet.errors import UnetError
from napari_unet.steps import ChildError, ChildSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari_unet.steps import Progress


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
        if isinstance(self.steps, ChildSteps):
            self.steps.cancel()  # does not wait for the step to end

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
    on_progress: Callable[[Progress], None],
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
        Of the bar in the activity dock.
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
    bar = progress(total=1, desc=title)

    def advance(step: Progress) -> None:
        bar.total = max(step.total, 1)
        bar.update(step.done - bar.n)
        on_progress(step)

    def deliver(outcome: _Outcome) -> None:
        if outcome.problem:
            show_error(outcome.problem)
            on_error(outcome.problem)
        else:
            on_result(outcome.value)

    def end() -> None:
        bar.close()
        on_finished()

    worker.yielded.connect(advance)
    worker.returned.connect(deliver)
    worker.errored.connect(lambda error: on_error(str(error)))
    worker.finished.connect(end)
    worker.start()
    return worker
