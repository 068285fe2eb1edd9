"""The shape of patches and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil
import torch

from napari_unet.errors import BadInput
from napari_unet.network.receptive_field import receptive_field
from napari_unet.training.augment import source_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet.network.config import UNetConfig
    from napari_unet.network.receptive_field import ReceptiveField
    from napari_unet.training.settings import AugmentationSettings, TrainingSettings

__all__ = ["PatchPlan", "choose_plan", "smaller_plan"]

_SIDE = {"default": {2: 256, 3: 64}, "paper": {2: 512, 3: 96}}
_CPU_WORK = 4 * 256**2 * 16  # pixels times channels of a step that takes about a second
_LARGEST_BATCH = 8


@dataclass(frozen=True)
class PatchPlan:
    """The shape of a batch.

    Parameters
    ----------
    batch_size : int
        Patches.
    shape : tuple of int
        Of what the network gets.
    shrink : int
        Pixels that its output lacks on each side.
    augmentation : AugmentationSettings
        How much patches vary.
    """

    batch_size: int
    shape: tuple[int, ...]
    shrink: int
    augmentation: AugmentationSettings

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of what the network gives."""
        return tuple(side - 2 * self.shrink for side in self.shape)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of what is cut out, so that augmentation finds real pixels."""
        return source_shape(self.shape, self.augmentation)

    def __str__(self) -> str:
        plural = "es" if self.batch_size > 1 else ""
        return f"{self.batch_size} patch{plural} of {' x '.join(map(str, self.shape))}"


def choose_plan(
    config: UNetConfig,
    sides: Sequence[int],
    settings: TrainingSettings,
    augmentation: AugmentationSettings,
    device: torch.device,
) -> PatchPlan:
    """Choose the shape of patches and the batch size, where they are not given.

    Parameters
    ----------
    config : UNetConfig
        Of the network.
    sides : sequence of int
        Of the largest image along each spatial axis, on the model's grid.
    settings : TrainingSettings
        What is given is taken.
    augmentation : AugmentationSettings
        Part of the plan.
    device : torch.device
        Its memory counts, and that a step on a CPU should not take long.

    Returns
    -------
    PatchPlan
    """
    field, ndim = receptive_field(config), config.ndim
    context = 2 * field.shrink
    if settings.patch_shape is None:
        target = _SIDE[settings.preset][ndim]
        largest = [*sides[:-2], max(sides[-2:]), max(sides[-2:])]
        shape = [_legal(field, min(target, side) + context) for side in largest]
        if settings.preset == "paper" and context:
            shape = [_legal(field, min(572, side + context)) for side in largest]
        limit = _affordable_pixels(config, device)
        while math.prod(shape) > limit:
            smaller = _halved(field, shape)
            if smaller == shape:
                break
            shape = smaller
    elif len(settings.patch_shape) != ndim or min(settings.patch_shape) < 1:
        raise BadInput(
            f"patch_shape={settings.patch_shape} does not name {ndim} positive sides."
        )
    else:
        shape = [_legal(field, side) for side in settings.patch_shape]
    batch_size = settings.batch_size
    if batch_size is None and settings.preset == "paper":
        batch_size = 1
    elif batch_size is None:
        fitting = _affordable_pixels(config, device)
        if device.type == "cpu":
            fitting = min(fitting, _CPU_WORK // config.base_channels)
        batch_size = min(max(fitting // math.prod(shape), 1), _LARGEST_BATCH)
    return PatchPlan(batch_size, tuple(shape), field.shrink, augmentation)


def smaller_plan(config: UNetConfig, plan: PatchPlan) -> PatchPlan | None:
    """Halve a batch, or the longest sides of a single patch.

    Parameters
    ----------
    config : UNetConfig
        Of the network.
    plan : PatchPlan
        For which memory does not suffice.

    Returns
    -------
    PatchPlan or None
        None if there is no smaller one.
    """
    if plan.batch_size > 1:
        return replace(plan, batch_size=plan.batch_size // 2)
    shape = tuple(_halved(receptive_field(config), plan.shape))
    return None if shape == plan.shape else replace(plan, shape=shape)


def _legal(field: ReceptiveField, side: int) -> int:
    """Round up to a side that the network can learn from."""
    # At least two pixels at the bottom, which have statistics.
    least = 2 * (field.shrink + field.alignment)
    return field.input_size(max(side, least))


def _halved(field: ReceptiveField, shape: Sequence[int]) -> list[int]:
    """Halve what the network gives along the longest sides, as far as is legal."""
    context = 2 * field.shrink
    smaller = _legal(field, context + (max(shape) - context) // 2)
    return [min(side, smaller) for side in shape]


def _affordable_pixels(config: UNetConfig, device: torch.device) -> int:
    """Estimate how many pixels of patches fit into half of the free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    # At each level all maps of encoder and decoder stay, before and after their
    # normalisation; with each level they are half as large in all, or less.
    maps = config.base_channels * (4 * config.convs_per_level + 4) * 2
    return int(0.5 * free) // (4 * maps)
