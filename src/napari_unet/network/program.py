"""Networks that run as they are: by onnxruntime, or by the library that made them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from napari_unet.network.unet import UNet

if TYPE_CHECKING:
    import torch

    from napari_unet.network.program_config import ProgramConfig


class Program(nn.Module):
    """A network that runs as it is; it segments, but it cannot be trained here.

    Its ``state_dict`` and its config are all that a file needs of it.

    Parameters
    ----------
    config : ProgramConfig
    """

    def __init__(self, config: ProgramConfig):
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Compute what the network gives, which ``config.outputs`` names.

        Parameters
        ----------
        image : float32 Tensor of shape (batch, in_channels, *spatial)
            Of legal sides.

        Returns
        -------
        float32 Tensor of shape (batch, num_classes, *spatial)
            Smaller by ``config.shrink`` on each side.
        """

    @abstractmethod
    def on(self, device: torch.device) -> Program:
        """Return a copy that is ready on a device; this one is left as it is."""

    def problem_on(self, kind: str) -> str:
        """Say why it cannot run on "cuda" or "mps", "" if it can."""
        del kind
        return ""

    def stop(self) -> None:
        """Make a running `forward` end soon, with `Cancelled`; also those to come."""


Network = UNet | Program


def build_program(config: ProgramConfig, tensors: dict[str, Tensor]) -> Program:
    """Make a program of its configuration and its tensors.

    Parameters
    ----------
    config : ProgramConfig
        As its file says.
    tensors : dict
        Its ``state_dict``, on the CPU.

    Returns
    -------
    Program
        In evaluation mode.

    Raises
    ------
    BadModel
        If they do not fit each other, or the library that runs it is missing.
    """
    if config.kind == "onnx":
        from napari_unet.network.onnx import OnnxProgram

        return OnnxProgram.of_tensors(config, tensors).eval()
    from napari_unet.network.smp import SmpProgram

    return SmpProgram.of_tensors(config, tensors).eval()
