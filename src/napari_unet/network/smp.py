"""U-Nets of segmentation_models_pytorch, run by that library."""

from __future__ import annotations

import copy
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from napari_unet.errors import BadModel
from napari_unet.network.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from torch import Tensor

    from napari_unet.network.program_config import ProgramConfig

# What a name cannot have that would be looked up somewhere else, or downloaded.
_ENCODER = re.compile(r"[A-Za-z0-9_.-]{1,100}")
SETTINGS = (
    "encoder_name",
    "encoder_depth",
    "decoder_use_norm",
    "decoder_channels",
    "decoder_attention_type",
    "decoder_interpolation",
    "activation",
)


class SmpProgram(Program):
    """A ``Unet`` of segmentation_models_pytorch.

    Parameters
    ----------
    config : ProgramConfig
        Its settings are keyword arguments of that class, those of `SETTINGS`.

    Raises
    ------
    BadModel
        If the library is missing or cannot make such a network.
    """

    def __init__(self, config: ProgramConfig):
        super().__init__(config)
        self.network = _build(config)

    @classmethod
    def of_tensors(
        cls, config: ProgramConfig, tensors: dict[str, Tensor]
    ) -> SmpProgram:
        """Make it of its ``state_dict``."""
        _check_settings(config)
        for index, width in enumerate(config.option("decoder_channels", ())):
            # Before memory is taken for it: a forged config may claim gigabytes.
            first = tensors.get(f"network.decoder.blocks.{index}.conv1.0.weight")
            if first is None or first.ndim != 4 or len(first) != width:
                raise BadModel(
                    f"Its decoder has not the widths that its configuration says "
                    f"({str(width)[:20]} in block {index + 1}). The file is damaged or "
                    "mislabelled."
                )
        with _without_weights():
            program = cls(config)
        wanted = program.state_dict()
        for name, tensor in tensors.items():
            if name in wanted and tensor.dtype != wanted[name].dtype:
                raise BadModel(
                    f"Its weights {name[:80]} are {tensor.dtype} instead of "
                    f"{wanted[name].dtype}. Get the file again."
                )
        try:
            program.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise BadModel(
                f"Its weights do not fit its network: {_short(error)}. The file is "
                "damaged or mislabelled."
            ) from error
        return program

    def on(self, device: torch.device) -> SmpProgram:
        """Return a copy that is ready on a device."""
        return copy.deepcopy(self).eval().to(device)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the network; see `Program.forward`."""
        result: Tensor = self.network(image)
        return result


@contextmanager
def _without_weights() -> Iterator[None]:
    """Make networks here without memory for weights; a forged one may have 10^9.

    Not by torch's device "meta" for all that is made: many encoders compute with
    small tensors what they are made of.
    """
    mine = threading.get_ident()

    def drop(_: nn.Module, __: str, weight: nn.Parameter | None) -> nn.Parameter | None:
        if weight is None or threading.get_ident() != mine:
            return None  # as it is
        return nn.Parameter(weight.to("meta"), weight.requires_grad)

    # Torch's annotation forgets that what it returns is taken.
    hook = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def import_smp() -> ModuleType:
    """Import segmentation_models_pytorch, which is optional.

    Raises
    ------
    BadModel
        If it is not installed, or does not work.
    """
    try:
        import segmentation_models_pytorch
    except Exception as error:  # of torchvision, too, which does not fit any torch
        if isinstance(error, ModuleNotFoundError):
            problem = f"{error.name} is not installed. Install it"
        else:
            problem = f"its import fails here ({_short(error)}). Install it again"
        raise BadModel(
            "It is a network of segmentation_models_pytorch, which runs it, but "
            f'{problem}: pip install "napari-unet[smp]".'
        ) from error
    return segmentation_models_pytorch  # type: ignore[no-any-return]


def _build(config: ProgramConfig) -> Any:
    """Build the network, with weights to be replaced, and without downloading any."""
    _check_settings(config)
    unet = import_smp().Unet
    try:
        with torch.random.fork_rng(devices=[]):  # it draws what is replaced
            return unet(
                **dict(config.settings),
                encoder_weights=None,
                in_channels=config.in_channels,
                classes=config.num_classes,
            )
    except Exception as error:  # whatever its parts raise
        raise BadModel(
            "segmentation_models_pytorch cannot make its network with the encoder "
            f"{config.option('encoder_name')!r}: {_short(error)}. Install the version "
            "that wrote the file."
        ) from error


def _check_settings(config: ProgramConfig) -> None:
    """Raise `BadModel` unless they are plain, bounded and name nothing elsewhere."""
    settings = dict(config.settings)
    encoder = settings.get("encoder_name")
    channels = settings.get("decoder_channels", ())
    is_named = isinstance(encoder, str) and _ENCODER.fullmatch(encoder)
    known = settings.keys() <= {*SETTINGS} and _are_widths(channels)
    if not is_named or not known:
        raise BadModel(
            "Its configuration is not one of a Unet of segmentation_models_pytorch: "
            f"{str(settings)[:200]}. Get the file again."
        )


def _are_widths(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= 8
        and all(type(width) is int and 1 <= width <= 4096 for width in value)
    )


def _short(error: Exception) -> str:
    lines = str(error).split()
    return " ".join(lines)[:200].rstrip(".") or type(error).__name__
