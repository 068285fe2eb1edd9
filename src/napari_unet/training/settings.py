"""What a training is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from napari_unet.models.model import BorderWeights
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = [
    "NO_AUGMENTATION",
    "W0_SIGMA",
    "AugmentationSettings",
    "TrainingSettings",
    "TrainingStep",
    "View",
]

# Height and width of the border term of the weight map, by preset.
W0_SIGMA = {"paper": (10.0, 5.0), "falk": (50.0, 6.0)}


class AugmentationSettings(BaseModel):
    """How much patches vary. Lengths are in pixels along Y and X.

    Parameters
    ----------
    flips : bool
        Mirror along every axis, and along the diagonal of Y and X where the patch is
        square: together all its flips and quarter turns, exactly.
    rotation : float
        Largest angle in degrees, either way, about the Z axis.
    scale : float
        Largest factor; its inverse is the smallest. 1 is off.
    shift : float
        Largest shift along an axis; at most a quarter of a side.
    elastic_sigma : float
        Standard deviation of the random displacements at the nodes of a coarse grid,
        between which they are interpolated bicubically. 10 in the U-Net paper; 0 is
        off. At most a sixth of the distance between nodes is used, so that the image
        does not fold.
    elastic_grid : int
        Nodes along the longest side; 3 in the U-Net paper. Shorter sides have as
        many as fit at that distance.
    anisotropy : float
        Distance of planes over the pixel size along Y and X: shift, displacements
        and blur are as many times smaller along Z, counted in planes.
    gain : float
        Largest factor on grey values; its inverse is the smallest. 1 is off.
    offset : float
        Largest value added to the normalised grey values, or subtracted.
    gamma : float
        Largest exponent; its inverse is the smallest. 1 is off. Values up to 1 are
        raised to it, keeping their sign; beyond, the curve goes on as a line.
    noise : float
        Largest standard deviation of Gaussian noise.
    blur : float
        Largest standard deviation of a Gaussian blur.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    flips: bool = True
    rotation: float = Field(180.0, ge=0, le=180)
    scale: float = Field(1.25, ge=1, le=4)
    shift: float = Field(10.0, ge=0)
    elastic_sigma: float = Field(10.0, ge=0)
    elastic_grid: int = Field(3, ge=2, le=64)
    anisotropy: float = Field(1.0, gt=0)
    gain: float = Field(1.25, ge=1, le=100)
    offset: float = Field(0.1, ge=0)
    gamma: float = Field(1.4, ge=1, le=10)
    noise: float = Field(0.05, ge=0)
    blur: float = Field(1.0, ge=0, le=20)

    @property
    def warps(self) -> bool:
        """Whether pixels are interpolated."""
        return bool(self.rotation or self.scale > 1 or self.shift or self.elastic_sigma)


NO_AUGMENTATION = AugmentationSettings(
    flips=False, rotation=0, scale=1, shift=0, elastic_sigma=0,
    gain=1, offset=0, gamma=1, noise=0, blur=0,
)  # fmt: skip


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
