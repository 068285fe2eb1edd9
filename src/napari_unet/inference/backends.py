"""How a network is executed: CUDA, MPS or CPU."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from napari_unet.errors import BadInput, Cancelled
from napari_unet.network.program import Program, ProgramConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unet.network.program import Network

Precision = Literal["auto", "float32"]
DEVICES = ("auto", "cpu", "cuda", "mps")


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
    """A copy of a network, ready on a device.

    Parameters
    ----------
    network : UNet or Program
        Left as it is.
    device : str
        Name of a working device.
    precision : "auto" or "float32"
        "auto" is mixed precision on CUDA. "float32" also switches TF32 off.
    """

    def __init__(self, network: Network, device: str, precision: Precision = "auto"):
        if precision not in get_args(Precision):
            raise BadInput(
                f"There is no precision {precision!r}; choose 'auto' or 'float32'."
            )
        self.device = torch.device(device)
        self.precision = precision
        self.config = network.config
        self._stop = threading.Event()
        self._network: Network
        if isinstance(network, Program):
            self._network = network.on(self.device)
        else:
            self._network = copy.deepcopy(network).eval().to(self.device)
        self._network.requires_grad_(False)
        if self.config.ndim == 2:
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Between any two layers, so that a large tile on a slow CPU ends soon.
        for module in self._network.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(self._end_if_stopped)

    def stop(self) -> None:
        """Make a running `run` end with `Cancelled` at the next layer."""
        self._stop.set()
        if isinstance(self._network, Program):
            self._network.stop()

    def _end_if_stopped(self, module: nn.Module, inputs: Any) -> None:
        if self._stop.is_set():
            raise Cancelled("The computation was stopped.")

    @torch.inference_mode()
    def run(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the probabilities of one tile.

        Parameters
        ----------
        image : float32 array of shape (channel, *spatial)
            Normalised, of legal sides.

        Returns
        -------
        float32 array of shape (class, *spatial)
            Softmax over the classes; sigmoid where there is one.
        """
        tensor = torch.from_numpy(np.ascontiguousarray(image))[None].to(self.device)
        if tensor.ndim == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        kind = self.device.type
        if kind != "cuda":
            logits = self._network(tensor)
        elif self.precision == "float32":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                logits = self._network(tensor)
        else:
            half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
            with torch.autocast("cuda", dtype=half):
                logits = self._network(tensor)
        probabilities = self._to_probabilities(logits.float())
        result: NDArray[np.float32] = probabilities[0].cpu().numpy()
        return result

    def _to_probabilities(self, logits: Tensor) -> Tensor:
        config = self.config
        if isinstance(config, ProgramConfig) and config.outputs == "probabilities":
            return logits
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)

    def run_augmented(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Average the probabilities over 8 flips and rotations in YX."""
        turns = [self._run_turned(image, k, flip) for flip in (0, 1) for k in range(4)]
        mean: NDArray[np.float32] = np.mean(turns, axis=0)
        return mean

    def _run_turned(
        self, image: NDArray[np.float32], quarters: int, flip: int
    ) -> NDArray[np.float32]:
        """Predict a rotated and flipped tile, and turn the result back."""
        turned = np.rot90(image, quarters, axes=(-2, -1))
        result = self.run(turned[..., ::-1] if flip else turned)
        return np.rot90(result[..., ::-1] if flip else result, -quarters, (-2, -1))

    @property
    def max_input_pixels(self) -> int:
        """Pixels of a tile, halo included, that fit comfortably into memory."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return max(1, int(0.6 * free) // self.bytes_per_pixel)
        available = int(psutil.virtual_memory().available)
        # Larger tiles are not faster on a CPU, but report progress less often.
        largest = 1400**2
        return max(1, min(available // 3 // self.bytes_per_pixel, largest))

    @property
    def bytes_per_pixel(self) -> int:
        """Estimated peak memory for each input pixel, in float32."""
        config = self.config
        width = config.base_channels
        # At the end of the finest level live: the joined maps, a block's input
        # and output, and the encoder's maps of the levels below.
        maps = 6 * width + 2 * config.num_classes + config.in_channels
        return 4 * maps

    def empty_cache(self) -> None:
        """Give unused GPU memory back to the driver."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
