"""U-Nets of segmentation_models_pytorch: their settings found, made our model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from napari_unet.errors import BadModel
from napari_unet.models.heads import (
    NOT_EXCLUSIVE,
    classes_named,
    combined_names,
    note_of_combinations,
)
from napari_unet.models.model import Model, default_passport
from napari_unet.network.combined import MOST, combinations
from napari_unet.network.program import build_program
from napari_unet.network.program_config import ProgramConfig
from napari_unet.network.smp import SETTINGS, import_smp

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_HEAD, _FIRST = "segmentation_head.0.weight", "decoder.blocks.0.conv1.0.weight"
HALO = 64  # pixels; in theory most encoders look farther
_MOST_CONFIG = 100_000  # bytes
_OUTPUTS = {
    None: "logits",
    "identity": "logits",
    "logsoftmax": "logits",
    "sigmoid": "probabilities",
    "softmax2d": "probabilities",
}
# Encoders by the name of their first convolution.
_ENCODERS = {
    "conv1.weight": (
        *(f"resnet{n}" for n in (18, 34, 50, 101, 152)),
        "resnext50_32x4d",
        *(f"resnext101_32x{n}d" for n in (4, 8, 16, 32, 48)),
    ),
    "_conv_stem.weight": tuple(f"efficientnet-b{n}" for n in range(8)),
    "features.0.0.weight": ("mobilenet_v2",),
    "features.0.weight": tuple(
        f"vgg{n}{norm}" for norm in ("_bn", "") for n in (11, 13, 16, 19)
    ),
    "features.conv0.weight": tuple(f"densenet{n}" for n in (121, 161, 169, 201)),
    "layer0.conv1.weight": (
        *(f"se_resnet{n}" for n in (50, 101, 152)),
        "se_resnext50_32x4d",
        "se_resnext101_32x4d",
    ),
}
_ASK = (
    "Put the config.json that save_pretrained writes beside the file, or save the "
    "model again with model.save_pretrained(folder)."
)


def prefix_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what comes before the names of such a U-Net, None if it is none."""
    for name in tensors:
        if name.endswith(_HEAD):
            prefix = name.removesuffix(_HEAD)
            if f"{prefix}{_FIRST}" in tensors:
                return prefix
    return None


def import_unet(
    tensors: Mapping[str, Tensor],
    prefix: str,
    beside: Path,
    tree: Any,
) -> Model:
    """Make a model of a ``Unet`` of segmentation_models_pytorch.

    Parameters
    ----------
    tensors : mapping
        What the file holds.
    prefix : str
        As `prefix_of` gives it.
    beside : path
        Where the ``config.json`` of ``save_pretrained`` would be.
    tree : dict
        All that the file holds: of hyperparameters "encoder_name" is looked at.

    Returns
    -------
    Model
        Its description says on what grounds its settings were found.

    Raises
    ------
    BadModel
        If the library is missing, or the settings are not known.
    """
    state = {
        name.removeprefix(prefix): tensor.float()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
        if name.startswith((f"{prefix}encoder.", f"{prefix}decoder.", f"{prefix}segm"))
    }
    import_smp()
    told = _read_config(beside)
    found = _settings_of_shapes(state)
    stem, grounds = _stem(state), "its config.json"
    if told is not None:
        settings = _told_settings(told)
    else:
        encoder = _encoder(state, stem, found, _hint(tree))
        settings, grounds = {"encoder_name": encoder, **found}, "names and shapes"
    channels = told.get("in_channels") if told else state[f"encoder.{stem}"].shape[1]
    depth = settings.get("encoder_depth", 5)
    if type(depth) is not int or not 1 <= depth <= 8:
        raise BadModel(f"Its encoder_depth={str(depth)[:40]} cannot be. {_ASK}")
    activation = settings.get("activation")
    if not isinstance(activation, str | None) or activation not in _OUTPUTS:
        raise BadModel(
            f"Its activation {str(activation)[:40]!r} does not give probabilities of "
            "classes. Save it again with activation=None."
        )
    names, note = [f"output {n + 1}" for n in range(len(state[_HEAD]))], ""
    if activation == "sigmoid" and len(names) > 1:
        state, settings, note = _exclusive(state, settings, names)
        activation = settings["activation"]
    config = ProgramConfig.from_dict(
        {
            "kind": "smp",
            "in_channels": channels,
            "num_classes": len(state[_HEAD]),
            "alignment": 2**depth,
            "halo": HALO,
            "outputs": _OUTPUTS[activation],
            "settings": settings,
        }
    )
    network = build_program(config, _complete(state))
    description = f"{_description(config, grounds, told is None)} {note}".strip()
    passport = default_passport(network)
    classes = passport.classes
    if len(classes) == 1 << len(names) and note:
        classes = classes_named(classes, combined_names(names))
    update = {"description": description, "classes": classes}
    return Model(network, passport.model_copy(update=update))


def _exclusive(
    state: dict[str, Tensor], settings: dict[str, Any], names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Make exclusive classes of outputs that each have a sigmoid, if they are few.

    The last convolution then gives their logits; a note says what was done.
    """
    if len(names) > MOST:
        return state, settings, NOT_EXCLUSIVE
    matrix = combinations(len(names))
    head = {
        name: torch.tensordot(matrix, state[name], dims=1)
        for name in (_HEAD, _HEAD.replace("weight", "bias"))
        if name in state
    }
    changed = settings | {"activation": None}
    return state | head, changed, note_of_combinations(names)


def _hint(tree: Any) -> Any:
    """Return the encoder that Lightning's hyperparameters name, None if they do not."""
    told = tree.get("hyper_parameters") if isinstance(tree, dict) else None
    return told.get("encoder_name") if isinstance(told, dict) else None


def _complete(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring names into the form of ours; add counters that old versions lack."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in state
        if name.endswith(".running_mean")
    }
    return {f"network.{name}": tensor for name, tensor in (counters | state).items()}


def _read_config(path: Path) -> dict[str, Any] | None:
    """Read what ``save_pretrained`` wrote beside the weights, None without it."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_CONFIG:
            return None
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or "encoder_name" not in told:
        return None
    kind = told.get("_model_class", told.get("model_class", "Unet"))
    if kind != "Unet":
        raise BadModel(
            f"Its config.json says that it is a {str(kind)[:40]}; of "
            "segmentation_models_pytorch only Unet can be used. Train a new model here."
        )
    return told


def _told_settings(told: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json, also of an older version."""
    settings = {name: told[name] for name in SETTINGS if name in told}
    if "decoder_use_batchnorm" in told and "decoder_use_norm" not in told:
        uses = told["decoder_use_batchnorm"]
        settings["decoder_use_norm"] = "batchnorm" if uses is True else uses
    return settings


def _settings_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the settings of the decoder off its names and shapes."""
    widths: list[int] = []
    while (
        weight := state.get(f"decoder.blocks.{len(widths)}.conv1.0.weight")
    ) is not None:
        widths.append(len(weight))
    norm = "decoder.blocks.0.conv1.1."
    if f"{norm}weight" in state and f"{norm}running_mean" not in state:
        raise BadModel(
            "The file does not say which norm its decoder has, as it has no running "
            f"statistics. {_ASK}"
        )
    has_attention = any(".attention1.attention.cSE." in name for name in state)
    return {
        "encoder_depth": len(widths),
        "decoder_channels": widths,
        "decoder_use_norm": "batchnorm" if f"{norm}weight" in state else False,
        "decoder_attention_type": "scse" if has_attention else None,
    }


def _stem(state: Mapping[str, Tensor]) -> str:
    """Return the name of the encoder's first convolution, "" if it is not known."""
    stems = (stem for stem in _ENCODERS if f"encoder.{stem}" in state)
    return next(stems, "")


def _encoder(
    state: Mapping[str, Tensor], stem: str, found: dict[str, Any], hint: Any
) -> str:
    """Return the encoder whose layers have just these names and shapes."""
    have = {
        name.removeprefix("encoder."): tuple(tensor.shape)
        for name, tensor in state.items()
        if name.startswith("encoder.") and not name.endswith("num_batches_tracked")
    }
    candidates = _ENCODERS.get(stem, ())
    if isinstance(hint, str) and hint in candidates:
        candidates = (hint, *candidates)
    get_encoder = import_smp().encoders.get_encoder
    for name in candidates:
        with torch.device("meta"):  # without memory
            encoder = get_encoder(
                name,
                in_channels=have[stem][1],
                depth=found["encoder_depth"],
                weights=None,
            )
        wanted = {
            layer: tuple(tensor.shape)
            for layer, tensor in encoder.state_dict().items()
            if not layer.endswith("num_batches_tracked")
        }
        if wanted == have:
            return name
    layers = ", ".join(sorted(have)[:3])
    raise BadModel(
        "It is a Unet of segmentation_models_pytorch, but which encoder it has cannot "
        f"be told from its layers ({layers[:120]}, …). {_ASK}"
    )


def _description(config: ProgramConfig, grounds: str, is_guessed: bool) -> str:
    ins, outs = config.in_channels, config.num_classes
    encoder = config.option("encoder_name")
    sentences = [
        f"Imported: a Unet of segmentation_models_pytorch with the encoder {encoder}, "
        f"{ins} channel{'s' * (ins > 1)} in, {outs} output{'s' * (outs > 1)}; its "
        f"settings were found by {grounds}. It runs as it is and cannot be fine-tuned."
    ]
    if is_guessed:
        sentences.append(
            "Taken for granted: nearest-neighbour upsampling, and no activation at "
            "the end."
        )
    sentences.append(
        "Not known: pixel size, names of the classes, normalisation of the images "
        "(percentiles are taken; pretrained encoders often had the mean and standard "
        "deviation of ImageNet)."
    )
    return " ".join(sentences)
