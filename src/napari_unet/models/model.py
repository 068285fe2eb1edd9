"""A model is a network and its passport: what it was trained on and how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from napari_unet.errors import BadInput, BadModel
from napari_unet.models.normalize import Normalization
from napari_unet.network.program_config import ProgramConfig

if TYPE_CHECKING:
    from napari_unet.network.program import Network
    from napari_unet.network.unet import UNet


MAX_RESCALING = 32  # beyond, a pixel size is a mistake and would fill the memory


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class ClassInfo(_Record):
    """One class of a model.

    Parameters
    ----------
    name : str
    kind : "background", "objects" or "region"
        "objects" are separated into instances; "region" stays semantic.
    color : str
        As "#rrggbb".
    """

    name: str
    kind: Literal["background", "objects", "region"]
    color: str = "#808080"


class BorderWeights(_Record):
    """Parameters of the border weight map used in training (DESIGN: weight map)."""

    preset: Literal["paper", "falk"] = "paper"
    w0: float = 10.0
    sigma: float = 5.0


class TrainingRecord(_Record):
    """One training: what data, how, with which result.

    Parameters
    ----------
    date : str
        ISO date.
    data : str
        The images in words.
    data_sha256 : str
        Hash over the training files.
    images, steps : int
    settings : dict
        Whatever is needed to repeat the training.
    scores : dict of str to float
        On held-out images.
    parent_sha256 : str or None
        The model it started from.
    """

    date: str
    data: str
    data_sha256: str = ""
    images: int = 0
    steps: int = 0
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)
    parent_sha256: str | None = None


class Passport(_Record):
    """What travels with a network in its checkpoint.

    Parameters
    ----------
    name, version, description, citation : str
    classes : tuple of ClassInfo
        One for each output; a network with one output (sigmoid) has two classes,
        background and what it finds.
    channels : tuple of str
        Names of the input channels, in order.
    pixel_size : tuple of float or None
        Pixel size of the training images in µm, one number for each spatial
        axis of the network; None if it is not known.
    object_diameter : float or None
        Typical diameter of an object in pixels of the training images.
    normalization : Normalization
    intensity_range : tuple of float or None
        1st and 99.8th percentile of the raw training images.
    threshold : float
        Recommended probability above which a pixel belongs to an object.
    minimal_size : int
        Recommended minimal object size in pixels (2D) or voxels (3D).
    split_touching : bool
        Whether splitting touching objects is recommended.
    grow : int
        Pixels by which objects are grown back after they are separated.
    border_weights : BorderWeights or None
        None if the model was trained without.
    history : tuple of TrainingRecord
        The oldest first.
    library_versions : dict of str to str
    thumbnail : str
        A small PNG, base64.
    former_sha256 : tuple of str
        What `model_sha256` was before facts of this passport were corrected, so that
        the models fine-tuned from it still find their parent.
    """

    name: str = "unnamed"
    version: str = "1"
    description: str = ""
    citation: str = ""
    classes: tuple[ClassInfo, ...] = ()
    channels: tuple[str, ...] = ()
    pixel_size: tuple[float, ...] | None = None
    object_diameter: float | None = None
    normalization: Normalization = Normalization()
    intensity_range: tuple[float, float] | None = None
    threshold: float = Field(0.5, gt=0, lt=1)
    minimal_size: int = Field(0, ge=0)
    split_touching: bool = False
    grow: int = Field(0, ge=0, le=10)
    border_weights: BorderWeights | None = None
    history: tuple[TrainingRecord, ...] = ()
    library_versions: dict[str, str] = Field(default_factory=dict)
    thumbnail: str = ""
    former_sha256: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _to_dict(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        told: dict[str, Any] = dump(self)
        if not told.get("former_sha256"):  # the hashes of older files stay the same
            told.pop("former_sha256", None)
        return told


# What is shown of the scores on held-out images, the first that there is; their names
# are those of the bundled models and of fine-tuning.
SCORES = {
    "held_out_ap50": "AP50",
    "AP@0.5": "AP50",
    "held_out_f1_50": "F1",
    "F1@0.5": "F1",
    "held_out_mean_ap": "mean AP",
    "held_out_dice": "Dice",
    "IoU": "IoU",
}
_COLORS = ("#000000", "#4daf4a", "#e41a1c", "#377eb8", "#ff7f00", "#984ea3")


def default_passport(network: Network) -> Passport:
    """Make the passport of a network of which nothing else is known."""
    config = network.config
    count = max(config.num_classes, 2)
    if count == 2:
        found = [ClassInfo(name="object", kind="objects", color=_COLORS[1])]
    else:
        found = [
            ClassInfo(name=f"class {i}", kind="region", color=_COLORS[i % len(_COLORS)])
            for i in range(1, count)
        ]
    background = ClassInfo(name="background", kind="background", color=_COLORS[0])
    return Passport(
        classes=(background, *found),
        channels=tuple(f"channel {i + 1}" for i in range(config.in_channels)),
    )


def check_model(model: object) -> None:
    """Say in words what to do with the name of a model in place of it.

    Raises
    ------
    BadInput
        If it is no `Model`.
    """
    if not isinstance(model, Model):
        raise BadInput(
            f"{model!r} is not a Model; load_model loads one by its name or path."
        )


class Model:
    """A network with its passport.

    Parameters
    ----------
    network : UNet or Program
    passport : Passport, optional
        Made with defaults when none is given.

    Raises
    ------
    BadModel
        If the passport describes another number of classes, channels or axes.
    """

    def __init__(self, network: Network, passport: Passport | None = None):
        if passport is None:
            passport = default_passport(network)
        self.network = network
        self.passport = passport
        config = network.config
        for what, said, is_ in (
            ("classes", len(passport.classes), max(config.num_classes, 2)),
            ("channels", len(passport.channels), config.in_channels),
            ("pixel sizes", len(passport.pixel_size or [0] * config.ndim), config.ndim),
        ):
            if said != is_:
                raise BadModel(
                    f"The passport of model {passport.name!r} names {said} {what}, "
                    f"its network has {is_}; the file does not belong together."
                )

    @property
    def ndim(self) -> int:
        """2 for a network of planes, 3 for one of volumes."""
        return self.network.config.ndim

    @property
    def untrainable_reason(self) -> str:
        """Why it can be neither fine-tuned nor rebuilt elsewhere, "" if it can."""
        if isinstance(self.network.config, ProgramConfig):
            return (
                f"The model {self.passport.name!r} is {self.network.config.title}, "
                "which runs as it is: its layers cannot be changed. Choose a model "
                "whose network is one of our own U-Nets."
            )
        return ""

    @property
    def unet(self) -> UNet:
        """The network where it is to be trained or rebuilt.

        Raises
        ------
        BadModel
            If it only runs as it is; see `untrainable_reason`.
        """
        if reason := self.untrainable_reason:
            raise BadModel(reason)
        return cast("UNet", self.network)

    @property
    def inexact_reason(self) -> str | None:
        """Why tiles are blended instead of exact, as a clause; None if exact."""
        return self.network.config.inexact_reason

    def describe(self) -> str:
        """Say in one line what the model finds, and how well."""
        passport = self.passport
        parts = [", ".join(info.name for info in passport.classes[1:])]
        parts.append("2D" if self.ndim == 2 else "3D")
        if passport.pixel_size is not None:
            parts.append(f"{passport.pixel_size[-1]:.3g} µm")
        elif passport.object_diameter is not None:
            parts.append(f"objects of about {passport.object_diameter:.0f} pixels")
        scores = passport.history[-1].scores if passport.history else {}
        for key, word in SCORES.items():
            if key in scores:
                parts.append(f"{word}\N{NO-BREAK SPACE}{scores[key]:.2f}")
                break
        return " · ".join(parts)

    def rescaling(self, pixel_size: dict[str, float]) -> tuple[float, ...] | None:
        """Return by how much an image is rescaled to the model's pixel size.

        Parameters
        ----------
        pixel_size : dict of str to float
            Of the image, in µm, by axis letter.

        Returns
        -------
        tuple of float or None
            One factor for each spatial axis of the network; None if either
            pixel size is unknown or they agree within 5 %.

        Raises
        ------
        BadInput
            If the sizes differ so much that one of them must be wrong.
        """
        axes = "ZYX"[-self.ndim :]
        wanted = self.passport.pixel_size
        if wanted is None or any(axis not in pixel_size for axis in axes):
            return None
        factors = tuple(
            pixel_size[axis] / size for axis, size in zip(axes, wanted, strict=True)
        )
        if np.allclose(factors, 1, atol=0.05):
            return None
        for axis, factor in zip(axes, factors, strict=True):
            if not 1 / MAX_RESCALING <= factor <= MAX_RESCALING:
                raise BadInput(
                    f"The image has pixels of {pixel_size[axis]:.3g} µm along {axis}, "
                    f"the model was trained at {pixel_size[axis] / factor:.3g} µm. "
                    "One of them is wrong: correct the image's pixel size or scale."
                )
        return factors

    def describe_fit(self, pixel_size: dict[str, float]) -> str:
        """Say in one sentence how the image's pixels compare with the model's."""
        factors = self.rescaling(pixel_size)
        if factors is None:
            return ""
        axes = "ZYX"[-self.ndim :]
        # Of the axis that differs most.
        worst = int(np.argmax(np.abs(np.log(factors))))
        along = "" if np.allclose(factors, factors[worst], rtol=0.05) else axes[worst]
        have, factor = pixel_size[axes[worst]], factors[worst]
        return (
            f"your pixels are {have:.3g} µm{' along ' * bool(along)}{along}, the model "
            f"was trained at {have / factor:.3g} µm: rescaling by {factor:.2f}"
        )

    def check_channels(self, count: int) -> None:
        """Raise `BadInput` unless the image has as many channels as the network."""
        names = self.passport.channels
        if count != len(names):
            expected = ", ".join(names)
            raise BadInput(
                f"The image has {count} channel{'s' * (count != 1)}, but the model "
                f"{self.passport.name!r} expects {len(names)} ({expected}). Choose "
                "the channels or another model."
            )
