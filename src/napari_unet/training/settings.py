"""What a training is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from napari_unet.models.model import BorderWeights
from napari_unet.steps import Progress
from napari_unet.training.augment import AugmentationSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["TrainingSettings", "TrainingStep", "View"]


class TrainingSettings(BaseModel):
    """How to train; JSON-able, and kept in the passport of the result.

    Parameters
    ----------
    steps : int
        Optimiser steps at most.
    batch_size : int or None
        Patches in each step; None chooses by memory, and 1 for "paper".
    patch_shape : tuple of int or None
        Sides of what the network gets, one for each of its spatial axes; rounded up
        to what it can take. None chooses by memory and the size of the images.
    preset : "default" or "paper"
        "default": AdamW, the learning rate warmed up and then decaying as a cosine.
        "paper": as Ronneberger et al. 2015, plain SGD with momentum 0.99 at a
        constant rate, one large patch in each step, dropout 0.5.
    learning_rate : float or None
        The highest; None is the preset's.
    loss : "cross_entropy" or "cross_entropy+dice"
        Weighted cross-entropy, binary for a network with one output, alone or plus
        soft Dice.
    border_weights : BorderWeights or None
        None weights all known pixels alike.
    augmentation : AugmentationSettings
        How much patches vary.
    freeze_encoder : bool
        Train only the expanding path: faster, and needs fewer annotations.
    validate_every : int
        Steps between two looks at the held-out part.
    patience : int
        Stop after so many looks without a better score.
    held_out : float
        Part of the annotation that is kept for scoring.
    seed : int
        Of everything random.
    device : str
        "auto", "cpu", "cuda" or "mps".
    precision : "auto" or "float32"
        "auto" is bfloat16 on GPUs and CPUs that compute it themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(500, ge=1)
    batch_size: int | None = Field(None, ge=1)
    patch_shape: tuple[int, ...] | None = None
    preset: Literal["default", "paper"] = "default"
    learning_rate: float | None = Field(None, gt=0)
    loss: Literal["cross_entropy", "cross_entropy+dice"] = "cross_entropy"
    border_weights: BorderWeights | None = BorderWeights()
    augmentation: AugmentationSettings = AugmentationSettings()
    freeze_encoder: bool = False
    validate_every: int = Field(50, ge=1)
    patience: int = Field(5, ge=1)
    held_out: float = Field(0.2, gt=0, le=0.5)
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    precision: Literal["auto", "float32"] = "auto"


@dataclass(frozen=True)
class TrainingStep(Progress):
    """One optimiser step, or a heartbeat that does not advance ``done``.

    Parameters
    ----------
    loss : float or None
        Of this step's patches; None for a heartbeat.
    learning_rate : float or None
        Of this step.
    scores : dict of str to float or None
        On the held-out part, where it was looked at: "loss" (mean cross-entropy of
        its pixels, all weighted alike), "IoU" of the foreground, "F1@0.5" and
        "AP@0.5" of the objects at the best of a few thresholds. With ``done`` 0 those
        of the model before training.
    best : bool
        Whether these scores are the best so far.
    preview : integer array or None
        Objects that the network finds in the `View`, of the shape of its region.
    """

    loss: float | None = None
    learning_rate: float | None = None
    scores: dict[str, float] | None = None
    best: bool = False
    preview: NDArray | None = None


@dataclass(frozen=True)
class View:
    """The part of an annotated image of which a preview is wanted.

    Parameters
    ----------
    annotation : int
        Index of the annotated image.
    region : mapping of str to slice
        By axis letter; what is not named is seen whole.
    """

    annotation: int = 0
    region: Mapping[str, slice] = field(default_factory=dict)
