"""How a network is executed: CUDA, MPS or CPU."""

from __future__ import annotations

import math
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import torch

from napari_unet.errors import BadInput, Cancelled
from napari_unet.inference.classify import keep_all
from napari_unet.inference.executors import Idle
from napari_unet.inference.settings import DEVICES
from napari_unet.inference.transfers import make_transfers
from napari_unet.network.blocks import narrow
from napari_unet.network.config import UNetConfig
from napari_unet.network.cropping import can_crop, cropping
from napari_unet.network.program import Program
from napari_unet.network.program_config import ProgramConfig
from napari_unet.network.receptive_field import receptive_field

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.inference.classify import Reduction
    from napari_unet.network.cropping import Span
    from napari_unet.network.program import Network

Precision = Literal["auto", "float32"]

# Pixels. Larger tiles have less halo, but report progress less often on a CPU, the
# more so the wider the network is; on a GPU transfers beside them become longer.
LARGEST_CPU_TILE = 2240**2  # of a network of up to 32 channels
LARGEST_GPU_TILE = 3072**2

_idle = Idle()
# Networks whose maps went beyond 65504, the largest number of float16.
_overflowed: weakref.WeakSet[Network] = weakref.WeakSet()


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
            "can't alloc",
            "CUDNN_STATUS_ALLOC_FAILED",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "Failed to allocate",
            "std::bad_alloc",
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
    memory_limit : float, optional
        GB of the device's memory that tiles may take.
    """

    def __init__(
        self,
        network: Network,
        device: str,
        precision: Precision = "auto",
        memory_limit: float | None = None,
    ):
        if precision not in get_args(Precision):
            raise BadInput(
                f"There is no precision {precision!r}; choose 'auto' or 'float32'."
            )
        if memory_limit is not None and not memory_limit > 0:
            raise BadInput(f"A memory limit of {memory_limit} GB leaves nothing.")
        self.device = torch.device(device)
        self.config = network.config
        self.transfers = make_transfers(self.device)
        self._network = network
        self._memory_limit = memory_limit
        self._stop = threading.Event()
        self._turn = threading.Lock()  # to run the executor
        self._changing = threading.Lock()  # whether it runs, and whether it is wanted
        self._is_running = False
        reduced = precision == "auto" and network not in _overflowed
        self._key, self._executor = _idle.take(network, self.device, reduced)
        self._shrink = receptive_field(self.config).shrink

    @property
    def title(self) -> str:
        """What runs the network, and how precisely."""
        return self._executor.title

    def close(self) -> None:
        """End what still runs, without waiting for it; keep the rest for the next."""
        with self._changing:
            if self._stop.is_set():
                return
            self._stop.set()
            if self._is_running:
                self._executor.stop()
            else:
                _idle.put(self._key, self._executor)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Take a turn with the executor; after the last one keep it for the next."""
        with self._turn:
            with self._changing:
                if self._stop.is_set():
                    raise Cancelled("The computation was stopped.")
                self._is_running = True
            try:
                yield
            finally:
                with self._changing:
                    self._is_running = False
                    # A program that was told to stop would stop the next time, too.
                    is_usable = not isinstance(self._network, Program)
                    if self._stop.is_set() and is_usable:
                        _idle.put(self._key, self._executor)

    def run(
        self,
        image: Tensor,
        keep: Sequence[Span] | None = None,
        *,
        augment: bool = False,
        reduce: Reduction = keep_all,
    ) -> NDArray:
        """Compute the probabilities of one tile, and what is kept of them.

        While one thread waits for a GPU's result, another may start the next tile.

        Parameters
        ----------
        image : float32 Tensor of shape (1, channel, *spatial)
            Normalised, of legal sides, from ``transfers.upload``.
        keep : sequence of (int, int), optional
            The part of the output that is wanted: start and stop along each axis.
        augment : bool
            Average the probabilities over 8 flips and rotations in YX.
        reduce : callable
            See `Reduction`.

        Returns
        -------
        array of shape (kept, *spatial)
            Of the probabilities: float32, (class, *spatial), softmax over the classes,
            sigmoid where there is one.

        Raises
        ------
        Cancelled
            If it was closed meanwhile.
        """

        @torch.inference_mode()
        def compute() -> Tensor:
            predict = self._average_turned if augment else self._predict
            return reduce(predict(image, keep))

        with self._running():
            pending = self.transfers.compute(image, compute)
        return pending()

    def _predict(self, image: Tensor, keep: Sequence[Span] | None) -> Tensor:
        """Return the probabilities (class, *spatial) of what is wanted of a tile."""
        config, crop = self.config, None
        if keep and isinstance(config, UNetConfig) and can_crop(config):
            crop = cropping(config, keep, image.shape[2:])
        output = self._executor.run(image, crop, self._stop)
        if self._executor.precision == "float16" and not output.isfinite().all():
            _overflowed.add(self._network)
            self._key, self._executor = _idle.take(self._network, self.device, False)
            output = self._executor.run(image, crop, self._stop)
        if keep and crop is None:
            output = narrow(output, keep)
        if isinstance(config, ProgramConfig) and config.outputs == "probabilities":
            return output[0].clone()
        return (output.sigmoid() if output.shape[1] == 1 else output.softmax(1))[0]

    def _average_turned(self, image: Tensor, keep: Sequence[Span] | None) -> Tensor:
        """Average the probabilities over 8 flips and rotations in YX."""
        total: Tensor | None = None
        for flip in (False, True):
            for quarters in range(4):
                one = self._predict_turned(image, keep, quarters, flip)
                total = one if total is None else total.add_(one)
        assert total is not None
        return total.div_(8)

    def _predict_turned(
        self, image: Tensor, keep: Sequence[Span] | None, quarters: int, flip: bool
    ) -> Tensor:
        """Predict a rotated and flipped tile, and turn the result back."""
        if keep:
            sides = [side - 2 * self._shrink for side in image.shape[-2:]]
            keep = _turned(keep, sides, quarters, flip)
        turned = image.rot90(quarters, (-2, -1))
        result = self._predict((turned.flip(-1) if flip else turned).contiguous(), keep)
        return (result.flip(-1) if flip else result).rot90(-quarters, (-2, -1))

    @property
    def bytes_per_pixel(self) -> int:
        """Expected peak memory for each input pixel of a tile."""
        config = self.config
        # At the end of the finest level live: the joined maps, what a convolution
        # takes and gives, and some that was not given back at once.
        maps = 5 * config.base_channels + 2 * config.num_classes + config.in_channels
        waiting = 4 * config.in_channels * self.transfers.in_flight
        return self._executor.itemsize * maps + waiting

    @property
    def max_input_pixels(self) -> int:
        """Pixels of a tile, halo included, that fit comfortably into memory.

        Raises
        ------
        BadInput
            If the limit is too low even for the smallest tile.
        """
        of_all = self.bytes_per_pixel * self._executor.tiles_at_once
        if self.device.type == "cuda":
            usable, largest = 0.6 * _free_of_gpu(self.device), LARGEST_GPU_TILE
        else:
            usable = psutil.virtual_memory().available / 3
            largest = LARGEST_CPU_TILE * 32 // max(32, self.config.base_channels)
        if self._memory_limit is not None:
            allowed = self._memory_limit * 1e9 - self._fixed_bytes
            if allowed < of_all * self._least_pixels:
                needed = (of_all * self._least_pixels + self._fixed_bytes) / 1e9
                raise BadInput(
                    f"A memory limit of {self._memory_limit} GB is too low for this "
                    f"network; allow {math.ceil(100 * needed) / 100} GB or more."
                )
            usable = min(usable, allowed)
        return max(1, min(int(usable / of_all), largest))

    @property
    def _least_pixels(self) -> int:
        """Pixels of the smallest tile, halo included."""
        field, config = receptive_field(self.config), self.config
        if isinstance(config, ProgramConfig) and config.fixed_shape:
            return math.prod(config.fixed_shape)
        side = field.input_size(field.alignment + sum(field.halo))
        return math.prod([side] * config.ndim)

    @property
    def _fixed_bytes(self) -> int:
        """Expected memory that does not depend on the tile: the weights, twice."""
        tensors = self._network.state_dict().values()
        # Of 32 bits, also in the bytes of a program's file.
        weights: int = sum(tensor.nbytes for tensor in tensors) // 4
        return 2 * self._executor.itemsize * weights

    def release(self) -> None:
        """Give unused memory back, until the next tile."""
        self._executor.release()


def _free_of_gpu(device: torch.device) -> int:
    """Return the bytes that are free, or that torch keeps and does not use."""
    free: int = torch.cuda.mem_get_info(device)[0]
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept


def _turned(
    box: Sequence[Span], sides: Sequence[int], quarters: int, flip: bool
) -> list[Span]:
    """Return where a box lies when its array is turned in YX, then flipped in X."""
    *others, y, x = box
    height, width = sides
    for _ in range(quarters):
        y, x = (width - x[1], width - x[0]), y
        height, width = width, height
    return [*others, y, (width - x[1], width - x[0]) if flip else x]
