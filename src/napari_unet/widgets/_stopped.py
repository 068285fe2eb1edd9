"""The offer to go on with a training that was stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from napari_unet.widgets._dock import while_alive
from napari_unet.widgets._offer import Offer
from napari_unet.widgets._training import discard_training, find_stopped_steps
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unet.widgets._training import Stopped


class StoppedTraining(Offer):
    """Looks for a training that was cancelled, killed or lost, and offers it.

    Parameters
    ----------
    on_resume : callable
        Gets the training.
    on_change : callable
        Called when another training is offered, or none any more.
    """

    def __init__(
        self, on_resume: Callable[[Stopped], None], on_change: Callable[[], None]
    ):
        super().__init__(
            "Resume",
            "Go on from there, with the annotations as they were.",
            lambda: on_resume(self.stopped) if self.stopped else None,
            self._forget,
        )
        self._on_change = on_change
        self.stopped: Stopped | None = None

    @property
    def name(self) -> str:
        """Of the model that the offered training makes; "" if there is none."""
        return self.stopped.name if self.stopped is not None else ""

    def look(self) -> None:
        """Look for one in a thread."""
        start_worker(
            find_stopped_steps(),
            title="",
            on_progress=lambda step: None,
            on_result=self.offer,
            on_error=lambda message: None,
            on_finished=lambda: None,
        )

    @while_alive
    def offer(self, stopped: Stopped | None) -> None:
        """Offer a training; None offers nothing any more."""
        self.stopped = stopped
        self.show_text(
            ""
            if stopped is None
            else f"The training of {stopped.name!r} was stopped. It can go on from "
            f"step {stopped.step} of {stopped.steps}."
        )
        self._on_change()

    def _forget(self) -> None:
        if self.stopped is not None:
            discard_training(self.stopped.name)
        self.offer(None)
        self.look()
