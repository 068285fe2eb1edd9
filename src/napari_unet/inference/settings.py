"""What a segmentation is told; imports no torch, so that forms open at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from napari_unet.models.model import Passport

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class ObjectSettings:
    """How objects are made of probabilities.

    Parameters
    ----------
    threshold : float
        A pixel belongs to an object where its probability is above it.
    minimal_size : int
        Smaller objects, in pixels or voxels, are left out.
    split_touching : bool
        Separate objects at their necks by a seeded watershed.
    grow : int
        Pixels by which objects grow back what was cut between them.
    """

    threshold: float = 0.5
    minimal_size: int = 0
    split_touching: bool = False
    grow: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or self.minimal_size < 0 or self.grow < 0:
            raise BadInput(
                f"A threshold of {self.threshold}, a minimal size of "
                f"{self.minimal_size} and growth by {self.grow} make no objects: the "
                "first is between 0 and 1, the others are not negative."
            )

    @classmethod
    def recommended(cls, passport: Passport) -> ObjectSettings:
        """Take what the model's passport recommends."""
        return cls(
            passport.threshold,
            passport.minimal_size,
            passport.split_touching,
            passport.grow,
        )
