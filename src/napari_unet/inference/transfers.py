"""Between the computer's memory and that of a device, beside what it computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from napari_unet.inference.spread import spread_steps
from napari_unet.models.normalize import count_values
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from napari_unet.models.normalize import Scaling

    Pending = Callable[[], NDArray]

__all__ = ["Transfers", "count_by_sorting", "make_transfers"]

_BLOCK = 1 << 24  # pixels that are counted at a time
_COPIED = 1 << 21  # of these, copied by one thread


@cache  # torch uses the memory of a stream again within it only
def make_transfers(device: torch.device) -> Transfers:
    """Return what brings arrays to a device and back in the best way it has."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers(device)


class Transfers:
    """Brings arrays to a device and back, one after the other.

    Parameters
    ----------
    device : torch.device
    """

    in_flight = 1  # tiles that are computed at a time

    def __init__(self, device: torch.device):
        self._device = device

    @torch.inference_mode()  # as the tensors that a network was compiled with
    def upload(self, pixels: NDArray, scaling: Scaling | None) -> Tensor:
        """Bring the pixels of a tile to the device, in any thread.

        Parameters
        ----------
        pixels : array of shape (channel, *spatial)
            On their way, integers of up to 16 bits are half the bytes of float32.
        scaling : Scaling or None
            How they are normalised; None if they are already.

        Returns
        -------
        float32 Tensor of shape (1, channel, *spatial)
            Normalised.
        """
        if scaling is not None and not self._normalises(pixels):
            pixels, scaling = scaling.apply(pixels), None
        tensor = self._copy(pixels)
        if scaling is not None:
            tensor = scaling.apply_to_tensor(tensor)
        return tensor[None]

    def count(self, values: NDArray) -> NDArray[np.int64]:
        """Do what `count_values` does, on the device if that is faster."""
        return count_values(values)

    def _normalises(self, pixels: NDArray) -> bool:
        """Tell whether pixels are normalised on the device."""
        del pixels
        return False

    def _copy(self, pixels: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)

    def compute(self, image: Tensor, function: Callable[[], Tensor]) -> Pending:
        """Start a computation, and fetch its result.

        Parameters
        ----------
        image : Tensor
            The uploaded tile of which it computes.
        function : callable
            Returns the result, on the device.

        Returns
        -------
        callable
            Waits for the result and returns it as an array, in any thread.
        """
        del image
        array: NDArray = function().cpu().numpy()
        return lambda: array


class CudaTransfers(Transfers):
    """Brings arrays to a GPU and back while it computes other tiles.

    Uploads, computations and downloads have a stream each; host memory is
    page-locked, in buffers that torch keeps and uses again. One thread starts all
    computations, because torch has a plan of each convolution for each thread, and
    never forgets it.
    """

    in_flight = 3  # one is computed, one is queued, one is fetched

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._up, self._computing, self._down = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self._starter = ThreadPoolExecutor(1, "gpu-start")

    def upload(self, pixels: NDArray, scaling: Scaling | None) -> Tensor:
        """See `Transfers.upload`."""
        with torch.cuda.stream(self._up):
            return super().upload(pixels, scaling)

    def count(self, values: NDArray) -> NDArray[np.int64]:
        """See `Transfers.count`."""
        try:
            return self._count(values)
        except torch.OutOfMemoryError:
            return count_values(values)

    def _count(self, values: NDArray) -> NDArray[np.int64]:
        with torch.cuda.stream(self._up):
            return count_by_sorting(values, self._device)

    def _normalises(self, pixels: NDArray) -> bool:
        return pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2

    def _copy(self, pixels: NDArray) -> Tensor:
        dtype: torch.dtype = getattr(torch, pixels.dtype.name)
        tensor = torch.empty(pixels.shape, dtype=dtype, pin_memory=True)
        tensor.numpy()[...] = pixels
        return tensor.to(self._device, non_blocking=True)

    def compute(self, image: Tensor, function: Callable[[], Tensor]) -> Pending:
        """See `Transfers.compute`."""
        return self._starter.submit(self._start, image, function).result()

    @torch.inference_mode()
    def _start(self, image: Tensor, function: Callable[[], Tensor]) -> Pending:
        self._computing.wait_stream(self._up)
        image.record_stream(self._computing)
        with torch.cuda.stream(self._computing):
            tensor = function().contiguous()
        self._down.wait_stream(self._computing)
        with torch.cuda.stream(self._down):
            array = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            array.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._down)
        tensor.record_stream(self._down)

        def wait() -> NDArray:
            done.synchronize()
            result: NDArray = array.numpy()
            return result

        return wait


def count_by_sorting(values: NDArray, device: torch.device) -> NDArray[np.int64]:
    """Do what `count_values` does on a device.

    Counters would wait for each other where many pixels are alike.
    """
    half = 256**values.dtype.itemsize // 2
    # Signed of the same bits, because torch sorts hardly any others.
    flat = values.reshape(-1).view(f"i{values.dtype.itemsize}")
    total = torch.zeros(2 * half, dtype=torch.int64, device=device)
    for first in range(0, flat.size, _BLOCK):
        part = _copy_spread(flat[first : first + _BLOCK], device)
        found, times = torch.unique(part, return_counts=True)
        total.index_add_(0, found.int() + half, times)
    counts: NDArray[np.int64] = total.cpu().numpy()
    return counts if values.dtype.kind == "i" else np.roll(counts, half)


def _copy_spread(values: NDArray, device: torch.device) -> Tensor:
    """Bring many values to a device, on all cores: nothing else is done meanwhile."""
    dtype: torch.dtype = getattr(torch, values.dtype.name)
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=device.type == "cuda")
    target = pinned.numpy()

    def copy(first: int) -> None:
        part = slice(first, first + _COPIED)
        target[part] = values[part]

    run_to_end(spread_steps(copy, range(0, values.size, _COPIED)))
    return pinned.to(device, non_blocking=True)
