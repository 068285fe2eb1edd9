"""Other people's outputs as our classes.

Ours exclude each other, and the first one is the background.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING

import torch

from napari_unet.errors import BadModel
from napari_unet.models.checkpoint import build_unet
from napari_unet.models.model import ClassInfo, Model
from napari_unet.network.combined import MOST, combinations
from napari_unet.network.onnx import OnnxProgram
from napari_unet.network.unet import UNet

if TYPE_CHECKING:
    from torch import Tensor

_BACKGROUND = re.compile(r"\b(background|bg|bkg)\b", re.IGNORECASE)
_BORDER = re.compile(
    r"bound|border|edge|membrane|outline|contour|affinit", re.IGNORECASE
)
NOT_EXCLUSIVE = (
    "They do not exclude each other; the first one is taken for the background."
)
_NUMBERED = re.compile(r"(channel|output|probability|class)[ _]?\d*", re.IGNORECASE)


def joint_classes(model: Model, names: list[str]) -> tuple[Model, list[str], str]:
    """Make exclusive classes of outputs that each have a sigmoid of their own.

    Parameters
    ----------
    model : Model
        With two outputs or more.
    names : list of str
        Of the outputs.

    Returns
    -------
    model : Model
        With a class for every combination, as `napari_unet.network.combined` says.
    names : list of str
        Of the classes, the background first.
    note : str
        What was done, as a sentence.

    Raises
    ------
    BadModel
        If there are more outputs, or the network is one that cannot be rearranged.
    """
    network = model.network
    if not isinstance(network, UNet | OnnxProgram) or len(names) > MOST:
        raise BadModel(
            f"Its {len(names)} outputs ({', '.join(names)[:100]}) do not exclude each "
            "other, as the classes of napari-unet do. Use the package in its own "
            "program, or choose another model."
        )
    changed: UNet | OnnxProgram
    if isinstance(network, UNet):
        changed = _with_head(network, combinations(len(names)))
    else:
        changed = network.with_combinations()
    return Model(changed), combined_names(names), note_of_combinations(names)


def combined_names(names: list[str]) -> list[str]:
    """Return the names of all combinations of outputs."""
    rows = combinations(len(names)).bool().tolist()
    return ["background", *(" and ".join(compress(names, row)) for row in rows[1:])]


def note_of_combinations(names: list[str]) -> str:
    """Say what was done with outputs of these names, as a sentence."""
    return (
        f"Its {len(names)} outputs ({', '.join(names)}) may hold in the same pixel; "
        "here each combination of them is a class of its own."
    )


def with_background_first(
    model: Model, names: list[str]
) -> tuple[Model, list[str], str]:
    """Bring the class that is named background to the front.

    Parameters
    ----------
    model : Model
        With two or more classes.
    names : list of str
        Of the classes.

    Returns
    -------
    model, names
        In their new order.
    note : str
        What is taken for granted if none is named background, as a sentence.

    Raises
    ------
    BadModel
        If the network runs as it is, so that its outputs cannot be rearranged.
    """
    place = next((i for i, name in enumerate(names) if _BACKGROUND.search(name)), None)
    if place is None:
        return model, names, f"Its first class, {names[0]}, is taken as background."
    if place == 0:
        return model, names, ""
    if not isinstance(model.network, UNet):
        raise BadModel(
            "Its background is not its first class, and its outputs cannot be "
            "rearranged. Choose another model."
        )
    order = [place, *(i for i in range(len(names)) if i != place)]
    network = _with_head(model.network, torch.eye(len(names))[order])
    return Model(network), [names[i] for i in order], ""


def _with_head(network: UNet, matrix: Tensor) -> UNet:
    """Return a network whose logits are the matrix times those of another one."""
    weights = dict(network.state_dict())
    for name in ("head.weight", "head.bias"):
        flat = weights[name].flatten(1) if weights[name].ndim > 1 else weights[name]
        mixed = matrix.double() @ flat.double()
        weights[name] = mixed.float().reshape(len(matrix), *weights[name].shape[1:])
    config = replace(network.config, num_classes=len(matrix))
    return build_unet(config, weights, "the package")


def classes_named(
    classes: tuple[ClassInfo, ...], names: list[str]
) -> tuple[ClassInfo, ...]:
    """Give the classes of a passport the names of a package's outputs.

    Parameters
    ----------
    classes : tuple of ClassInfo
        Those of a network of which nothing else is known, the background first.
    names : list of str
        One for each class, or one alone for what a sigmoid finds.

    Returns
    -------
    tuple of ClassInfo
        Borders, and what is on a border, are background: they separate objects. If
        one class is left, it is of objects.
    """
    background, *others = classes
    if len(names) == len(classes):
        background = background.model_copy(update={"name": names[0]})
        names = names[1:]
    named = []
    for info, name in zip(others, names, strict=True):
        alone = len(others) == 1
        known = {} if alone and _NUMBERED.fullmatch(name.strip()) else {"name": name}
        border = bool(_BORDER.search(name)) and not alone
        kind = "background" if border else info.kind
        named.append(info.model_copy(update={**known, "kind": kind}))
    found = [info for info in named if info.kind != "background"]
    if len(found) == 1:
        place = named.index(found[0])
        named[place] = found[0].model_copy(update={"kind": "objects"})
    return (background, *named)
