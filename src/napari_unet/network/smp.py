"""Networks of segmentation_models_pytorch, run by that library."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from napari_unet.errors import BadModel
from napari_unet.network.program import Program, ProgramConfig

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

_INSTALL = 'pip install "napari-unet[smp]"'


class SmpProgram(Program):
    """A ``Unet`` of segmentation_models_pytorch.

    Parameters
    ----------
    config : ProgramConfig
        Its settings are the keyword arguments of that class.

    Raises
    ------
    BadModel
        If the library is missing or does not know these settings.
    """

    def __init__(self, config: ProgramConfig):
        super().__init__(config)
        self.network = build_unet(config)

    @classmethod
    def of_tensors(
        cls, config: ProgramConfig, tensors: dict[str, Tensor]
    ) -> SmpProgram:
        """Make it of its ``state_dict``."""
        with torch.device("meta"):  # a forged config cannot claim gigabytes
            program = cls(config)
        program.load_state_dict(tensors, assign=True)
        return program

    def on(self, device: torch.device) -> SmpProgram:
        """Return a copy that is ready on a device."""
        return copy.deepcopy(self).eval().to(device)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the network; see `Program.forward`."""
        result: Tensor = self.network(image)
        return result


def import_smp() -> ModuleType:
    """Import segmentation_models_pytorch, which is optional.

    Raises
    ------
    BadModel
        If it is not installed, or does not work.
    """
    try:
        import segmentation_models_pytorch
    except Exception as error:  # a broken installation raises anything
        raise BadModel("…") from error
    return segmentation_models_pytorch  # type: ignore[no-any-return]


def build_unet(config: ProgramConfig) -> Any:
    """Build the network, untrained and without downloading anything."""
    return import_smp().Unet(encoder_weights=None, **dict(config.settings))
