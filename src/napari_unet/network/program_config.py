"""What is known of networks that run as they are, without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from napari_unet.errors import BadInput, BadModel

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["onnx", "smp"]
Outputs = Literal["logits", "probabilities"]
Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ProgramConfig:
    """What is known of a network whose layers are not ours; JSON-able.

    Parameters
    ----------
    kind : "onnx" or "smp"
        What runs it.
    in_channels : int
        Channels of the image.
    num_classes : int
        Output channels.
    ndim : 2 or 3
        Spatial dimensions.
    alignment : int
        Tiles start at multiples of it, and legal sides are such.
    minimum : int
        The smallest legal side.
    fixed_shape : tuple of int or None
        The only legal sides, where there is but one choice.
    shrink : int
        Pixels that the output lacks on each side; only with ``fixed_shape``.
    halo : int
        Pixels of context that tiles get on each side, and over which they are
        blended.
    outputs : "logits" or "probabilities"
        Whether a sigmoid or softmax is part of the network.
    base_channels : int
        Channels of its maps at full size, for estimates of memory.
    settings : tuple of (str, value)
        What rebuilds the network, apart from its tensors; see `option`.

    Raises
    ------
    BadModel
        If the values do not describe a network.
    """

    kind: Kind
    in_channels: int
    num_classes: int
    ndim: int = 2
    alignment: int = 1
    minimum: int = 1
    fixed_shape: tuple[int, ...] | None = None
    shrink: int = 0
    halo: int = 0
    outputs: Outputs = "logits"
    base_channels: int = 64
    settings: Settings = ()

    def __post_init__(self) -> None:
        for name, least, most in (
            ("in_channels", 1, 4096),
            ("num_classes", 1, 4096),
            ("ndim", 2, 3),
            ("alignment", 1, 1024),
            ("minimum", 1, 4096),
            ("shrink", 0, 4096),
            ("halo", 0, 1024),
            ("base_channels", 1, 4096),
        ):
            value = getattr(self, name)
            self._check(type(value) is int and least <= value <= most, name)
        self._check(self.kind in get_args(Kind), "kind")
        self._check(self.outputs in get_args(Outputs), "outputs")
        fixed = self.fixed_shape
        if fixed is None:
            self._check(self.shrink == 0, "shrink")
        else:
            fits = isinstance(fixed, tuple) and len(fixed) == self.ndim
            sides = all(type(n) is int and 2 * self.shrink < n <= 65536 for n in fixed)
            self._check(fits and sides, "fixed_shape")

    def _check(self, holds: bool, name: str) -> None:
        if not holds:
            value = repr(getattr(self, name))[:80]
            raise BadModel(f"A network cannot have {name}={value}. Get the file again.")

    def option(self, name: str, default: Any = None) -> Any:
        """Return one of the settings; lists are tuples."""
        return dict(self.settings).get(name, default)

    @property
    def title(self) -> str:
        """What it is, with its article."""
        if self.kind == "onnx":
            return "an ONNX network"
        return "a network of segmentation_models_pytorch"

    @property
    def inexact_reason(self) -> str:
        """Why its tiles do not agree with the whole image, as a clause."""
        return f"it is {self.title}, and how much context its tiles need is not known"

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Sides of the output of a network of one shape."""
        return tuple(side - 2 * self.shrink for side in self.fixed_shape or ())

    @property
    def _contexts(self) -> tuple[int, ...]:
        """What a network of one shape spares of its output on each side."""
        grid = self.alignment
        halo = -(-self.halo // grid) * grid
        return tuple(min(halo, side // 8 // grid * grid) for side in self.output_shape)

    @property
    def overlaps(self) -> tuple[int, ...]:
        """By how much the tiles of a network of one shape are extended on each side.

        As much as their context, but a step of the grid also where that is none.
        """
        least = self.alignment if self.halo else 0
        return tuple(
            max(context, least if side >= 4 * least else 0)
            for context, side in zip(self._contexts, self.output_shape, strict=True)
        )

    def tile_shape(
        self, region: Sequence[slice], image: Sequence[int]
    ) -> tuple[int, ...]:
        """Return the tiles of a network of one shape, for a part of an image.

        Parameters
        ----------
        region : sequence of slice
            Start and stop along each axis.
        image : sequence of int
            Sides of the whole image.

        Returns
        -------
        tuple of int
            All that it gives where that is enough for the whole image, or for the
            part with its context; else multiples of the alignment, such that overlap
            and context fit.
        """
        tiles, grid = [], self.alignment
        for part, size, side, overlap, context in zip(
            region, image, self.output_shape, self.overlaps, self._contexts, strict=True
        ):
            first = part.start // grid * grid
            is_all = part.start == 0 and part.stop == size
            is_one = part.stop - first + (0 if is_all else 2 * context) <= side
            rest = (side - 2 * overlap - 2 * context) // grid * grid
            tiles.append(side if is_one else max(rest, 1))
        return tuple(tiles)

    def check_turned(self, is_turned: bool) -> None:
        """Raise `BadInput` if tiles would be turned that have to lie as they are."""
        if is_turned and self.fixed_shape and len({*self.fixed_shape[-2:]}) > 1:
            height, width = self.fixed_shape[-2:]
            raise BadInput(
                f"The model takes images of {height} x {width} pixels only, which "
                "cannot be turned: switch the averaging of turned images off."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data."""
        return asdict(self) | {"settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a configuration; raise `BadModel` on what it cannot be."""
        settings = values.get("settings", {})
        if not isinstance(settings, dict):
            raise BadModel("The settings of its network are damaged. Get it again.")
        return cls(**field_values(cls, values) | {"settings": settings_of(settings)})


def settings_of(values: dict[str, Any]) -> Settings:
    """Return settings in the form in which a `ProgramConfig` keeps them."""
    return tuple((name, _frozen(value)) for name, value in values.items())


def field_values(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration is rebuilt from.

    Parameters
    ----------
    kind : type
        The dataclass of the configuration.
    values : dict
        Its fields from JSON; lists become tuples.

    Raises
    ------
    BadModel
        On keys that are none of its fields.
    """
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise BadModel(
            f"The network configuration has unknown entries {sorted(unknown)}; "
            "the file was probably written by a newer napari-unet. Update it."
        )
    return {name: _frozen(value) for name, value in values.items()}


def _frozen(value: Any) -> Any:
    """Make tuples of lists, also in lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
