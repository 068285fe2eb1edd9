"""How fast a network learns, by which rule, and how it is as before a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from napari_unet.training.settings import TrainingSettings

__all__ = ["Statistics", "learning_rate", "make_optimizer"]

_RATE = 1e-3
_WARM_UP = 100  # steps at most, and a tenth of all


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """Return the learning rate of a step, counted from 1.

    The paper's stays. The default's rises linearly in the first tenth of the steps,
    at most 100, and then falls as half a period of a cosine.
    """
    rate = settings.learning_rate or _RATE
    if settings.preset == "paper":
        return rate
    warm_up = min(_WARM_UP, max(1, settings.steps // 10))
    if step <= warm_up:
        return rate * step / warm_up
    part = (step - warm_up) / (settings.steps - warm_up + 1)
    return rate * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(
    weights: list[nn.Parameter], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """Make the optimiser that the settings name."""
    if settings.preset == "paper":
        return torch.optim.SGD(weights, momentum=0.99, fused=True)
    return torch.optim.AdamW(weights, weight_decay=1e-2, fused=True)


class Statistics:
    """What a network notes of its batches, to be put back after a step that failed.

    Parameters
    ----------
    network : Module
        Its buffers stay the same tensors from now on.
    """

    def __init__(self, network: nn.Module):
        # By type, so that one copy takes them all: one for each keeps a GPU waiting.
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer.view(-1))
        self._now = list(by_type.values())
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copy them."""
        self._kept = [torch.cat(buffers) for buffers in self._now]

    def put_back(self) -> None:
        """Make them what they were when they were copied last."""
        for buffers, kept in zip(self._now, self._kept, strict=True):
            before = torch.split(kept, [len(buffer) for buffer in buffers])
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
