"""Batches, ready when the network wants them.

A GPU learns from a batch sooner than one thread makes it, so several threads make the
next ones meanwhile: cutting, copying and computing on the device leave Python to the
others. A CPU learns longer than that by far, and with all its cores, so there a batch
is made when it is asked for. Every batch is the same either way.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from napari_unet.training.patches import Batch, Patches
    from napari_unet.training.plan import PatchPlan

__all__ = ["Feed"]

_MOST_WORKERS = 4  # more would wait for Python


class Feed:
    """Batches of one step after the other.

    Parameters
    ----------
    patches : Patches
        What makes them.
    plan : PatchPlan
        Their shape.
    device : torch.device
        Where they are wanted.
    workers : int, optional
        Threads that make batches ahead, twice as many as they are; 0 makes each when
        it is asked for. By default 0 but for CUDA.
    """

    def __init__(
        self,
        patches: Patches,
        plan: PatchPlan,
        device: torch.device,
        workers: int | None = None,
    ):
        if workers is None:
            workers = _workers_for(device)
        self.plan = plan
        self._patches = patches
        self._device = device
        self._ahead = 2 * workers
        self._made: dict[int, Future[Batch]] = {}
        self._pool = None
        if workers:
            self._pool = ThreadPoolExecutor(
                workers, "napari-unet", _take_own_stream, (device,)
            )

    def batch(self, step: int) -> Batch:
        """Return the patches of a step, which waits for them if need be.

        Parameters
        ----------
        step : int
            From 1; whatever was made ahead of another than the next is dropped.

        Returns
        -------
        image, target, weights : Tensor
            As `Patches.batch` makes them.

        Raises
        ------
        Exception
            What went wrong when they were made.
        """
        if self._pool is None:
            return self._patches.batch(step, self.plan, self._device)
        wanted = range(step, step + self._ahead + 1)
        for other in self._made.keys() - wanted:
            self._made.pop(other).cancel()
        for number in wanted:
            if number not in self._made:
                self._made[number] = self._pool.submit(self._make, number, self.plan)
        batch = self._made.pop(step).result()
        if self._device.type == "cuda":
            for tensor in batch:  # their memory is of a worker's stream
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def use(self, plan: PatchPlan) -> None:
        """Go on with batches of another shape; all others are gone then."""
        for future in self._made.values():
            future.cancel()
        wait(self._made.values())  # for their memory
        self._made.clear()
        self.plan = plan

    def close(self) -> None:
        """End what makes batches; what is being made is finished in the background."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._made.clear()

    def _make(self, step: int, plan: PatchPlan) -> Batch:
        batch = self._patches.batch(step, plan, self._device)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return batch


def _workers_for(device: torch.device) -> int:
    """Leave one core to the thread that keeps the device busy."""
    if device.type != "cuda":
        return 0
    return min(max((os.cpu_count() or 1) - 1, 1), _MOST_WORKERS)


def _take_own_stream(device: torch.device) -> None:
    """Let a worker copy and compute while the network learns."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
