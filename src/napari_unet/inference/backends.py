"""How a network is executed: CUDA, MPS or CPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import psutil
import torch

from napari_unet.errors import BadInput, Cancelled
from napari_unet.inference.executors import Idle
from napari_unet.inference.settings import DEVICES
from napari_unet.network.blocks import narrow
from napari_unet.network.config import ProgramConfig, UNetConfig
from napari_unet.network.cropping import can_crop, cropping
from napari_unet.network.program import Program
from napari_unet.network.receptive_field import receptive_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.network.cropping import Span
    from napari_unet.network.program import Network

Precision = Literal["auto", "float32"]

# Pixels. Larger tiles are hardly faster on a CPU, but report progress less often.
LARGEST_CPU_TILE = 1600**2

_idle = Idle()


@dataclass(frozen=True)
class Device:
    """Where a network runs.

    Parameters
    ----------
    name : str
        "cpu", "cuda" or "mps", also with an index: "cuda:1".
    note : str
        Why it is not the faster one that seemed to be there; "" if it is.
    """

    name: str
    note: str = ""

    def that_runs(self, network: Network) -> Device:
        """Return this device, or the CPU where this one cannot run a network."""
        if isinstance(network, Program):
            problem = network.problem_on(self.name.split(":")[0])
            return Device("cpu", problem) if problem else self
        return self


def choose_device(wanted: str = "auto") -> Device:
    """Pick a device and try it with a tiny convolution.

    Parameters
    ----------
    wanted : str
        "auto" takes a working GPU, else the CPU; "cpu", "cuda" and "mps" are
        taken as they are.

    Returns
    -------
    Device

    Raises
    ------
    BadInput
        If a device was named that is not there or does not work.
    """
    if wanted.split(":")[0] not in DEVICES:
        raise BadInput(
            f"There is no device {wanted!r}; choose one of {', '.join(DEVICES)}."
        )
    if wanted != "auto":
        problem = "" if wanted == "cpu" else _problem(wanted)
        if problem:
            raise BadInput(
                f"The device {wanted!r} cannot be used: {problem}. Choose 'auto' or "
                "'cpu'."
            )
        return Device(wanted)
    for name, present in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ):
        if present:
            problem = _problem(name)
            if not problem:
                return Device(name)
            return Device(
                "cpu", f"The GPU cannot be used ({problem}); computing on the CPU."
            )
    return Device("cpu")


def _problem(name: str) -> str:
    """Run a tiny convolution on a device; return what went wrong, "" if nothing."""
    try:
        ones = torch.ones(1, 1, 8, 8, device=name)
        result = torch.nn.functional.conv2d(ones, ones[..., :3, :3])
        if float(result.cpu().mean()) != 9.0:
            return "it computes wrong results"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0].rstrip(".")
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, and nothing else."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "out of memory",
            "can't allocate memory",
            "CUDNN_STATUS_ALLOC_FAILED",
            "CUBLAS_STATUS_ALLOC_FAILED",
        )
    )


class Backend:
    """A network, ready on a device, for one prediction.

    Parameters
    ----------
    network : UNet or Program
        Left as it is.
    device : str
        Name of a working device.
    precision : "auto" or "float32"
        "auto" computes with 16 bits where the device does so itself; where classes
        are likelier by more than its rounding, they stay the same. "float32" also
        switches TF32 off.
    """

    def __init__(self, network: Network, device: str, precision: Precision = "auto"):
        if precision not in get_args(Precision):
            raise BadInput(
                f"There is no precision {precision!r}; choose 'auto' or 'float32'."
            )
        self.device = torch.device(device)
        self.config = network.config
        self._stop = threading.Event()
        self._running = threading.Lock()
        self._key, self._executor = _idle.take(
            network, self.device, precision == "auto"
        )
        self._shrink = receptive_field(self.config).shrink

    @property
    def title(self) -> str:
        """What runs the network, and how precisely."""
        return self._executor.title

    def close(self) -> None:
        """End what still runs, without waiting for it; keep the rest for the next."""
        self._stop.set()
        if self._running.acquire(blocking=False):
            _idle.put(self._key, self._executor)
            self._running.release()
        else:
            self._executor.stop()

    @torch.inference_mode()
    def run(
        self, image: NDArray[np.float32], keep: Sequence[Span] | None = None
    ) -> NDArray[np.float32]:
        """Compute the probabilities of one tile.

        Parameters
        ----------
        image : float32 array of shape (channel, *spatial)
            Normalised, of legal sides.
        keep : sequence of (int, int), optional
            The part of the output that is wanted: start and stop along each axis.

        Returns
        -------
        float32 array of shape (class, *spatial)
            Softmax over the classes; sigmoid where there is one.

        Raises
        ------
        Cancelled
            If it was closed meanwhile.
        """
        image = np.ascontiguousarray(image)
        config, crop = self.config, None
        if keep and isinstance(config, UNetConfig) and can_crop(config):
            crop = cropping(config, keep, image.shape[1:])
        with self._running:
            if self._stop.is_set():
                raise Cancelled("The computation was stopped.")
            output = self._executor.run(image, crop, self._stop)
            if keep and crop is None:
                output = narrow(output, keep)
            probabilities = self._to_probabilities(output)
            result: NDArray[np.float32] = probabilities[0].cpu().numpy()
        return result

    def _to_probabilities(self, output: Tensor) -> Tensor:
        config = self.config
        if isinstance(config, ProgramConfig) and config.outputs == "probabilities":
            return output.clone()
        return output.sigmoid() if output.shape[1] == 1 else output.softmax(dim=1)

    def run_augmented(
        self, image: NDArray[np.float32], keep: Sequence[Span] | None = None
    ) -> NDArray[np.float32]:
        """Average the probabilities over 8 flips and rotations in YX."""
        turns = [
            self._run_turned(image, keep, k, flip) for flip in (0, 1) for k in range(4)
        ]
        mean: NDArray[np.float32] = np.mean(turns, axis=0)
        return mean

    def _run_turned(
        self,
        image: NDArray[np.float32],
        keep: Sequence[Span] | None,
        quarters: int,
        flip: int,
    ) -> NDArray[np.float32]:
        """Predict a rotated and flipped tile, and turn the result back."""
        turned = np.rot90(image, quarters, axes=(-2, -1))
        if keep:
            sides = [side - 2 * self._shrink for side in image.shape[-2:]]
            keep = _turned(keep, sides, quarters, flip)
        result = self.run(turned[..., ::-1] if flip else turned, keep)
        return np.rot90(result[..., ::-1] if flip else result, -quarters, (-2, -1))

    @property
    def bytes_per_pixel(self) -> int:
        """Expected peak memory for each input pixel of a tile."""
        config = self.config
        # At the end of the finest level live: the joined maps, a block's input
        # and output, and the encoder's maps of the levels below.
        maps = 6 * config.base_channels + 2 * config.num_classes + config.in_channels
        return self._executor.itemsize * maps

    @property
    def max_input_pixels(self) -> int:
        """Pixels of a tile, halo included, that fit comfortably into memory."""
        each = self.bytes_per_pixel
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return max(1, int(0.6 * free) // each)
        available = int(psutil.virtual_memory().available)
        return max(1, min(available // 3 // each, LARGEST_CPU_TILE))

    def empty_cache(self) -> None:
        """Give unused memory back, after it ran out."""
        self._executor.release()


def _turned(
    box: Sequence[Span], sides: Sequence[int], quarters: int, flip: int
) -> list[Span]:
    """Return where a box lies when its array is turned in YX, then flipped in X."""
    *others, y, x = box
    height, width = sides
    for _ in range(quarters):
        y, x = (width - x[1], width - x[0]), y
        height, width = width, height
    return [*others, y, (width - x[1], width - x[0]) if flip else x]
