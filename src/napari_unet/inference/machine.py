"""What computes a prediction: a backend, and threads beside it."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from napari_unet.errors import Cancelled
from napari_unet.inference.backends import Backend, is_out_of_memory
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["Machine"]

Result = TypeVar("Result")


class Machine:
    """What computes one prediction, for all parts of it.

    Parameters
    ----------
    backend_on : callable
        Makes a backend on a device; the CPU's takes over from a full GPU.
    device : str
        Name of one that works.
    """

    def __init__(self, backend_on: Callable[[str], Backend], device: str):
        self._backend_on = backend_on
        self.note = ""  # what the user should know of the device
        try:
            self.backend = backend_on(device)
        except Exception as error:
            if device == "cpu" or not is_out_of_memory(error):
                raise
            self.note = f"{device} is full; computing on the CPU."
            self.backend = backend_on("cpu")
        try:
            # Chosen once, so that all parts have the same tiles.
            self.max_input_pixels = self.backend.max_input_pixels
        except BaseException:
            self.backend.close()
            raise
        self.longest_side: int | None = None  # of a tile, once memory ran out
        # Tiles that are computed, one that is read, the next plane that is read, a
        # strip that is handed on, and objects that are made.
        threads = self.backend.transfers.in_flight + 4
        self._pool = ThreadPoolExecutor(threads, "napari-unet")
        self._is_closed = threading.Event()

    def leave_gpu(self) -> None:
        """Go on on the CPU."""
        self.backend.close()
        self.backend = self._backend_on("cpu")

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run something beside the prediction."""
        return self._pool.submit(function, *args)

    def submit_steps(self, steps: Generator[Any, None, Result]) -> Future[Result]:
        """Run a generator beside the prediction, at most until that is closed."""
        return self._pool.submit(run_to_end, steps, self._check_open)

    def _check_open(self, step: object) -> None:
        del step
        if self._is_closed.is_set():
            raise Cancelled("The computation was stopped.")

    def close(self) -> None:
        """End everything that still runs, without waiting for it."""
        self._is_closed.set()
        self.backend.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
