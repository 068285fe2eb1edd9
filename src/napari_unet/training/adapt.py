"""A copy of a model that has the inputs and outputs which the annotations need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from napari_unet.errors import BadInput
from napari_unet.models.model import ClassInfo, Model, Passport, default_passport
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet
from napari_unet.training.annotations import check_annotations, derive_truths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from napari_unet.training.annotations import Annotation
    from napari_unet.training.settings import TrainingSettings

__all__ = ["adapted_copy", "count_channels", "untrained_model"]

_PAPER_DROPOUT = 0.5


def adapted_copy(
    model: Model,
    annotations: Sequence[Annotation],
    highest_class: int,
    settings: TrainingSettings,
) -> tuple[Model, list[str]]:
    """Copy a model; replace its first or last layer where they do not fit.

    - If the images have other channels, the kernels of each become the mean of the
      old ones, scaled so that the sum over the channels stays.
    - If a class beyond the model's is painted, or objects are painted for a model of
      several classes, the last layer keeps the outputs of the classes that remain.

    Parameters
    ----------
    model : Model
        Left as it is.
    annotations : sequence of Annotation
        All that it is to be trained on.
    highest_class : int
        1 for objects.
    settings : TrainingSettings
        Its seed draws what is new; the paper's preset needs dropout.

    Returns
    -------
    model : Model
        On the CPU, with a passport that describes it.
    notes : list of str
        What was replaced, in words.
    """
    old = model.unet.config
    channels = count_channels(annotations, old.in_channels)
    outputs = _count_outputs(annotations, old.num_classes, highest_class)
    dropout = old.dropout
    if settings.preset == "paper":
        dropout = dropout or _PAPER_DROPOUT
    config = replace(old, in_channels=channels, num_classes=outputs, dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = UNet.from_config(config)
    state = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in model.network.state_dict().items()
    }
    passport, notes = model.passport, []
    if channels != old.in_channels:
        if settings.freeze_encoder:
            raise BadInput(
                f"The images have {channels} channels and the model {old.in_channels}, "
                "so that its encoder must learn, too: do not freeze it."
            )
        _replace_first(network, state)
        names = default_passport(network).channels
        passport = passport.model_copy(update={"channels": names})
        notes.append(
            f"The model's first layer was replaced: it had {_count(old.in_channels)}, "
            f"the images have {channels}."
        )
    if outputs != old.num_classes:
        _replace_last(network, state)
        classes = _classes(passport, network)
        notes.append(
            f"The model's last layer was replaced: it knew {len(passport.classes)} "
            f"classes, background included; now there are {len(classes)}."
        )
        passport = passport.model_copy(update={"classes": classes})
    network.load_state_dict(state)
    return Model(network, passport), notes


def untrained_model(
    annotations: Sequence[Annotation], *, ndim: Literal[2, 3] = 2, seed: int = 0
) -> Model:
    """Make a model that fits annotations, to be trained from scratch.

    Parameters
    ----------
    annotations : sequence of Annotation
        Say how many channels and classes there are.
    ndim : int, optional
        2 for a network of planes, 3 for one of volumes.
    seed : int, optional
        Draws the weights.

    Returns
    -------
    Model
        Of 32 channels at first and 4 poolings; for volumes 16 and 3. Colours keep
        their proportions.
    """
    check_annotations(annotations)
    truths = (truth for one in annotations for _, truth in derive_truths(one, ndim))
    outputs = 1 + max(int(truth.target.max()) for truth in truths)
    channels = count_channels(annotations, expected=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width, depth = (32, 4) if ndim == 2 else (16, 3)
        network = UNet(channels, outputs, base_channels=width, depth=depth, ndim=ndim)
    are_colours = all("S" in annotation.image_axes for annotation in annotations)
    passport = default_passport(network).model_copy(
        update={"normalization": Normalization(joint_channels=are_colours)}
    )
    return Model(network, passport)


def count_channels(annotations: Sequence[Annotation], expected: int) -> int:
    """Return how many channels of the images a network gets.

    Colours become gray for a network with one channel and lose their alpha channel,
    as when it is used.

    Parameters
    ----------
    annotations : sequence of Annotation
        All images.
    expected : int
        Channels of the network.

    Raises
    ------
    BadInput
        If the images do not agree.
    """
    counts = set()
    for annotation in annotations:
        axes = annotation.image_axes
        letter = next((axis for axis in axes if axis in "CS"), None)
        count = np.shape(annotation.image)[axes.index(letter)] if letter else 1
        if letter == "S":
            count = 1 if expected == 1 and count >= 3 else min(count, 3)
        counts.add(int(count))
    if len(counts) != 1:
        raise BadInput(
            f"The images have {' and '.join(map(str, sorted(counts)))} channels; train "
            "on images with the same channels."
        )
    return counts.pop()


def _count_outputs(
    annotations: Sequence[Annotation], outputs: int, highest_class: int
) -> int:
    """Keep the network's outputs if they can tell apart what is painted."""
    if all(annotation.labels_are == "objects" for annotation in annotations):
        return min(outputs, 2)
    return outputs if highest_class < max(outputs, 2) else highest_class + 1


def _count(channels: int) -> str:
    return f"{channels} channel{'s' * (channels != 1)}"


def _replace_first(network: UNet, state: dict[str, Tensor]) -> None:
    config, channels = network.config, network.config.in_channels
    # A norm may come before the first convolution.
    first = int(config.norm is not None and config.norm_place == "before_convolution")
    for name, old in state.items():
        if name == f"encoder.0.{first}.weight":
            kernel = old.mean(1, keepdim=True) * (old.shape[1] / channels)
            state[name] = kernel.repeat(1, channels, *[1] * (old.ndim - 2))
        elif first and name.startswith("encoder.0.0.") and old.ndim:
            state[name] = old.mean().repeat(channels)


def _replace_last(network: UNet, state: dict[str, Tensor]) -> None:
    """Keep the logits of the classes that remain; a sigmoid is a softmax with 0."""
    for name in ("head.weight", "head.bias"):
        old, new = state[name], network.state_dict()[name].clone()
        if len(old) == 1:
            old = torch.cat([torch.zeros_like(old), old])
        kept = min(len(old), len(new))
        new[:kept] = old[:kept]
        state[name] = new


def _classes(passport: Passport, network: UNet) -> tuple[ClassInfo, ...]:
    """Keep the classes that remain and name the new ones."""
    names = default_passport(network).classes
    return (passport.classes + names[len(passport.classes) :])[: len(names)]
