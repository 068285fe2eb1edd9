"""What runs a network: torch on any device, or OpenVINO on the CPU.

An executor is made once for a network and kept for the next image, because to make
one takes longer than to segment a small image.
"""

from __future__ import annotations

import importlib.util
import threading
import zlib
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from napari_unet.errors import Cancelled
from napari_unet.inference.compiled import CompiledLater, can_compile
from napari_unet.inference.openvino_executor import OpenVinoExecutor, can_execute
from napari_unet.inference.spread import spread_steps
from napari_unet.network.folding import fold, split_first, split_values
from napari_unet.network.program import Program
from napari_unet.network.unet import UNet
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from napari_unet.network.cropping import Cropping
    from napari_unet.network.program import Network

    Compute = Callable[[Tensor, Cropping | None], Tensor]

_SWITCHES = threading.RLock()  # those of cuDNN are of the whole process
KEPT_SECONDS = 10  # that the working memory of an executor waits for the next image
_SUMMED = 1 << 22  # bytes of weights that are summed up at a time

__all__ = [
    "Executor",
    "Idle",
    "TorchExecutor",
    "computes_bfloat16",
    "make_executor",
    "memory_format",
    "without_tf32",
]


class Executor(Protocol):
    """A network that is ready to run; for one thread at a time."""

    precision: str
    tiles_at_once: int  # whose maps are in memory

    @property
    def title(self) -> str:
        """What runs the network, and how precisely."""

    @property
    def itemsize(self) -> int:
        """Bytes of one number of its maps."""

    def run(
        self, image: Tensor, cropping: Cropping | None, stop: threading.Event
    ) -> Tensor:
        """Compute what the network gives for a tile.

        Parameters
        ----------
        image : float32 Tensor of shape (1, channel, *spatial)
            Normalised, on the executor's device, contiguous, of legal sides.
        cropping : Cropping or None
            What is wanted of the output; everything if None.
        stop : threading.Event
            Ends the computation soon after it is set, with `Cancelled`.

        Returns
        -------
        float32 Tensor of shape (1, class, *spatial)
            Valid until the next run. A GPU may still be computing it.
        """

    def release(self) -> None:
        """Give back the memory that only a run needs."""

    def stop(self) -> None:
        """End a run whose ``stop`` is set and that does not look at it."""


def make_executor(network: Network, device: torch.device, reduced: bool) -> Executor:
    """Make the fastest executor that is there.

    Parameters
    ----------
    network : UNet or Program
        Left as it is.
    device : torch.device
        One that works.
    reduced : bool
        Whether 16-bit numbers may be used.
    """
    if device.type == "cpu" and isinstance(network, UNet):
        if can_execute(network.config) and importlib.util.find_spec("openvino"):
            return OpenVinoExecutor(network, torch.get_num_threads(), reduced)
    return TorchExecutor(network, device, reduced)


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes bfloat16 itself, about twice as fast."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # torch has no public question for this.
        asks = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(asks())
    return False


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let convolutions on a GPU take all bits of their numbers, within it."""
    # Not by torch.backends.cudnn.flags, which fails where somebody has chosen the
    # precision of convolutions in the new way.
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with _SWITCHES:
        before = convolutions.fp32_precision
        convolutions.fp32_precision = "ieee"
        try:
            yield
        finally:
            convolutions.fp32_precision = before


def memory_format(device: torch.device, ndim: int) -> torch.memory_format:
    """Return the order of the numbers of maps with which a device is fastest.

    On Apple's GPUs channels last are slow, and wrong in some versions of torch.
    """
    gains = ndim == 2 and device.type in ("cpu", "cuda")
    return torch.channels_last if gains else torch.contiguous_format


class TorchExecutor:
    """A network run by torch: batch norms folded, channels last, 16 bits where able.

    Parameters
    ----------
    network : UNet or Program
        Left as it is.
    device : torch.device
    reduced : bool
        See `make_executor`. Without, TF32 is off, too.
    """

    def __init__(self, network: Network, device: torch.device, reduced: bool):
        self._device, self._reduced = device, reduced
        self._dtype = _reduced_type(network, device) if reduced else torch.float32
        self.precision = str(self._dtype).removeprefix("torch.")
        self._network: Network
        splits = False
        if isinstance(network, UNet):
            folded = fold(network)
            splits = self._dtype.itemsize == 2 and split_first(folded, self._dtype)
            folded.to(device, self._dtype)
            layout = memory_format(device, network.config.ndim)
            folded.to(memory_format=layout)  # type: ignore[call-overload]
            self._network = folded
        else:
            self._network = network.on(device).requires_grad_(False)
        # Neither it nor the hooks know this object: what they hold is then given back
        # as soon as this is not used any more.
        forward = _Forward(self._network, self._dtype, splits)
        self._prepare = forward.prepare
        self._compute: Compute = forward.compute
        self._stops = [threading.Event()]
        self.tiles_at_once = 1
        # A network that is being trained is another one before it would be compiled.
        stays = isinstance(network, UNet) and not network.training
        if stays and reduced and can_compile(device):
            self._compute = CompiledLater(forward.compute)
            self.tiles_at_once = 2  # one of them to compile with
        elif device.type != "cuda":
            # Between any two layers, so that a large tile on a slow CPU ends soon.
            for module in self._network.modules():
                if not list(module.children()):
                    module.register_forward_pre_hook(
                        partial(_end_if_stopped, self._stops)
                    )
        if device.type == "cuda":  # tiles are computed in another stream
            torch.cuda.current_stream(device).synchronize()

    @property
    def title(self) -> str:
        """What runs the network, and how precisely."""
        compiled = isinstance(self._compute, CompiledLater) and self._compute.is_ready
        return f"torch, {self.precision}{', compiled' * compiled}"

    @property
    def itemsize(self) -> int:
        """Bytes of one number of its maps."""
        # float16 that overflows is computed again with float32.
        return 4 if self._dtype == torch.float16 else self._dtype.itemsize

    @torch.inference_mode()
    def run(
        self, image: Tensor, cropping: Cropping | None, stop: threading.Event
    ) -> Tensor:
        """See `Executor.run`."""
        self._stops[0] = stop
        prepared = self._prepare(image)
        if self._reduced or self._device.type != "cuda":
            return self._compute(prepared, cropping)
        with without_tf32():
            return self._compute(prepared, cropping)

    def release(self) -> None:
        """Give unused GPU memory back to the driver."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def stop(self) -> None:
        """End a program; its executor is of no use any more."""
        if isinstance(self._network, Program):
            self._network.stop()


class _Forward:
    """A network that computes with numbers of one type, but takes and gives float32."""

    def __init__(self, network: Network, dtype: torch.dtype, splits: bool):
        self._network, self._dtype, self._splits = network, dtype, splits

    def prepare(self, image: Tensor) -> Tensor:
        """Make of an image what the network takes.

        It is not compiled: a compiler computes as if nothing were rounded to 16 bits
        in between, and of a value in two parts the second would be 0.
        """
        if self._splits:
            image = split_values(image, self._dtype)
        image = image.to(self._dtype)
        layout = memory_format(image.device, image.ndim - 2)
        return image.contiguous(memory_format=layout)

    def compute(self, prepared: Tensor, cropping: Cropping | None) -> Tensor:
        if isinstance(self._network, UNet):
            result: Tensor = self._network(prepared, cropping)
        else:
            result = self._network(prepared)
        return result.float()


def _end_if_stopped(stops: list[threading.Event], module: nn.Module, _: Any) -> None:
    if stops[0].is_set():
        raise Cancelled("The computation was stopped.")


def _reduced_type(network: Network, device: torch.device) -> torch.dtype:
    """Return the fastest type that keeps what a network finds."""
    # Rounding moves the maxima that unpooling looks for; a program may have reasons
    # for its own types.
    keeps = isinstance(network, UNet) and network.config.upsampling != "unpool"
    if not keeps or device.type == "mps":
        return torch.float32
    if computes_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


class Idle:
    """The executor that was used last, until the next image comes.

    An executor is given to one user at a time: it is taken out, and put back when
    nothing runs in it any more. Its working memory is kept for the next image of a
    batch, and given back when none comes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Any = None
        self._executor: Executor | None = None
        self._releasing: threading.Timer | None = None

    def take(
        self, network: Network, device: torch.device, reduced: bool
    ) -> tuple[Any, Executor]:
        """Return an executor of a network and the key under which to put it back."""
        key = _key(network), str(device), reduced, torch.get_num_threads()
        with self._lock:
            executor, self._executor = self._executor, None
            kept, self._key = self._key, None
        if executor is None or kept != key:
            if executor is not None:
                executor.release()
            del executor  # its memory, before that of the next
            executor = make_executor(network, device, reduced)
        return key, executor

    def put(self, key: Any, executor: Executor) -> None:
        """Keep an executor in which nothing runs, in place of the last."""
        with self._lock:
            self._key, self._executor = key, executor
            if self._releasing is not None:
                self._releasing.cancel()
            self._releasing = threading.Timer(KEPT_SECONDS, self._release)
            self._releasing.daemon = True
            self._releasing.start()

    def _release(self) -> None:
        with self._lock:
            if self._executor is not None:
                self._executor.release()


def _key(network: Network) -> Any:
    """Return what changes with a network, also when it is trained."""
    weights = network.state_dict().values()
    parts = [part for tensor in weights for part in _split_bytes(tensor)]
    sums = tuple(run_to_end(spread_steps(zlib.crc32, parts)))
    return network.config, network.training, sums


def _split_bytes(tensor: Tensor) -> list[memoryview]:
    data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
    return [data[first : first + _SUMMED] for first in range(0, len(data), _SUMMED)]
