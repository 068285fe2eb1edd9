"""ONNX networks, run by onnxruntime."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from napari_unet.errors import BadModel, Cancelled
from napari_unet.network.combined import MOST, combine
from napari_unet.network.program import Program
from napari_unet.network.program_config import ProgramConfig, settings_of

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray
    from torch import Tensor

# Those that run a graph, the preferred one first.
_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
_FATAL = 4  # of onnxruntime's severities: nothing of less is printed
_MEMORY = 0.75  # of the computer's, which a graph may take
_opening = threading.Lock()
_NO_MEMORY = ("Failed to allocate memory", "smaller than requested bytes", "bad_alloc")
_STOPPED = "terminate flag"


class OnnxProgram(Program):
    """An ONNX graph; what is in it is checked before, by `napari_unet.models.onnx`.

    Parameters
    ----------
    config : ProgramConfig
        Its setting "output" is the name of what is taken of the graph's outputs. With
        "combined", "logits" or "probabilities", this is what the graph gives for each
        of some outputs whose combinations are the classes.
    graph : uint8 Tensor of shape (bytes,)
        The content of the file.
    device : str
        "cpu", or "cuda" where onnxruntime has it, also with an index: "cuda:1".
    memory : int, optional
        Bytes of main memory that it may take; by default most of the computer's.

    Raises
    ------
    BadModel
        If onnxruntime is missing or refuses the graph.
    """

    graph: Tensor

    def __init__(
        self,
        config: ProgramConfig,
        graph: Tensor,
        device: str = "cpu",
        memory: int | None = None,
    ):
        super().__init__(config)
        how, count = config.option("combined"), config.num_classes
        is_power = count in (1 << n for n in range(2, MOST + 1))
        if graph.dtype != torch.uint8 or graph.ndim != 1 or (how and not is_power):
            raise BadModel("Its ONNX graph is damaged. Get the file again.")
        self.register_buffer("graph", graph)
        self._session = open_session(graph.numpy().tobytes(), device, memory)
        self._input = self._session.get_inputs()[0].name
        self._run_options = import_onnxruntime().RunOptions()
        self._run_options.log_severity_level = _FATAL
        # Give the memory back after each tile, as torch does.
        self._run_options.add_run_config_entry(
            "memory.enable_memory_arena_shrinkage", "cpu:0"
        )

    @classmethod
    def of_tensors(
        cls, config: ProgramConfig, tensors: dict[str, Tensor]
    ) -> OnnxProgram:
        """Make it of its ``state_dict``."""
        if tensors.keys() != {"graph"}:
            raise BadModel("It holds no ONNX graph, or more. Get the file again.")
        return cls(config, tensors["graph"])

    def on(self, device: torch.device) -> OnnxProgram:
        """Return a copy with a session of its own; the graph itself is shared."""
        return OnnxProgram(self.config, self.graph, str(device)).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxProgram:
        return self.on(torch.device("cpu"))

    def problem_on(self, kind: str) -> str:
        """Say why it cannot run on "cuda" or "mps", "" if it can."""
        wanted = _PROVIDERS.get(kind, [""])[0]
        if wanted in import_onnxruntime().get_available_providers():
            return ""
        advice = " To use the GPU, install onnxruntime-gpu instead of it."
        return (
            "This model is an ONNX network, which the installed onnxruntime runs on "
            f"the CPU only.{advice if kind == 'cuda' else ''}"
        )

    def stop(self) -> None:
        """Make a running `forward` end at the next layer, with `Cancelled`."""
        self._run_options.terminate = True

    def forward(self, image: Tensor) -> Tensor:
        """Run the graph; see `Program.forward`.

        Raises
        ------
        BadModel
            If it fails, or gives something else than was announced.
        Cancelled
            After `stop`.
        MemoryError
            If memory ran out.
        """
        config = self.config
        found = torch.from_numpy(self.compute(image.float().cpu().numpy()))
        sides = [side - 2 * config.shrink for side in image.shape[2:]]
        how, count = config.option("combined"), config.num_classes
        wanted = (image.shape[0], count.bit_length() - 1 if how else count, *sides)
        if found.dtype != torch.float32 or found.shape != wanted:
            raise BadModel(
                f"The ONNX network gave {found.dtype} of shape {tuple(found.shape)} "
                f"instead of float32 of shape {wanted}: it does not take images of "
                f"{' x '.join(map(str, image.shape[2:]))} pixels. Export it again with "
                "a fixed input size."
            )
        if how:
            found = combine(found, are_probabilities=how == "probabilities")
        return found.to(image.device)

    def with_combinations(self) -> OnnxProgram:
        """Return it with a class for every combination of its outputs."""
        config = self.config
        settings = dict(config.settings) | {"combined": config.outputs}
        changed = replace(
            config,
            num_classes=1 << config.num_classes,
            outputs="logits",
            settings=settings_of(settings),
        )
        return OnnxProgram(changed, self.graph).eval()

    def compute(self, image: NDArray[np.float32]) -> NDArray[Any]:
        """Run the graph on numpy arrays; what it gives is not looked at."""
        pixels = {self._input: np.ascontiguousarray(image)}
        names = [self.config.option("output")]
        try:
            (result,) = self._session.run(names, pixels, self._run_options)
        except Exception as error:  # of many classes, that share no other base
            raise _translated(error) from error
        return np.asarray(result)


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime, which is optional.

    Raises
    ------
    BadModel
        If it is not installed, or does not work.
    """
    try:
        import onnxruntime
    except Exception as error:  # a broken installation raises anything
        raise BadModel(
            "It is an ONNX network, which needs onnxruntime"
            + (
                ": it is not installed. Install it: "
                if isinstance(error, ModuleNotFoundError)
                else f", and that does not work here ({error}). Install it again: "
            )
            + 'pip install "napari-unet[onnx]".'
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


def _limit_memory(onnxruntime: ModuleType, memory: int) -> None:
    """Give the next session a store of memory that has an end.

    An onnxruntime that cannot replace a store (before 1.23) keeps the first one.
    """
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    as_requested = 1  # its growth: no more than is asked for
    limits = {"max_mem": memory, "arena_extend_strategy": as_requested}
    try:
        onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg(limits))
    except Exception as error:  # onnxruntime's own, of no common base
        if "already" not in str(error):
            raise


def open_session(graph: bytes, device: str = "cpu", memory: int | None = None) -> Any:
    """Open a graph without computing anything.

    Parameters
    ----------
    graph : bytes
        The content of an ONNX file.
    device : str
        "cpu" or "cuda", also with an index.
    memory : int, optional
        Bytes of main memory that it may take; by default most of the computer's.

    Returns
    -------
    onnxruntime.InferenceSession

    Raises
    ------
    BadModel
        If onnxruntime is missing or refuses the graph.
    """
    onnxruntime = import_onnxruntime()
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    if memory is None:
        memory = int(_MEMORY * psutil.virtual_memory().total)
    try:
        with _opening:
            _limit_memory(onnxruntime, memory)
            return onnxruntime.InferenceSession(
                graph,
                options,
                providers=_providers(device),
                # A hostile graph has constants that are computed, and huge.
                disabled_optimizers=["ConstantFolding"],
            )
    except Exception as error:
        raise BadModel(
            f"onnxruntime refuses the ONNX network ({_reason(error)}). Get the file "
            "again, or export it again for this version of onnxruntime."
        ) from error


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """Say what runs a graph, and on which of several GPUs."""
    kind, _, index = device.partition(":")
    first, *others = _PROVIDERS[kind]
    chosen = {"device_id": index} if kind == "cuda" and index else {}
    return [(first, chosen), *((name, {}) for name in others)]


def _translated(error: Exception) -> Exception:
    """Say in our errors what went wrong in a run."""
    text = str(error)
    if _STOPPED in text:
        return Cancelled("The computation was stopped.")
    if any(sign in text for sign in _NO_MEMORY):
        return MemoryError("onnxruntime has no more memory")
    return BadModel(
        f"The ONNX network failed ({_reason(error)}). Export it again with a fixed "
        "input size, or ask for its PyTorch weights."
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("[ONNXRuntimeError] : ")[:200].rstrip(".")
