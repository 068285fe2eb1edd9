"""Other people's checkpoints: found in the file, recognised, made our model."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from napari_unet.errors import BadModel
from napari_unet.models import smp
from napari_unet.models.containers import ONNX
from napari_unet.models.foreign_names import FAMILIES, OTHERS, Family, Role
from napari_unet.models.foreign_shapes import SHAPE_ONLY, arrangements
from napari_unet.models.layout import (
    Convolution,
    Layer,
    Layout,
    build_network,
    infer_config,
)
from napari_unet.models.model import Model, default_passport
from napari_unet.models.normalize import Normalization
from napari_unet.models.onnx import import_onnx

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from napari_unet.models.safety import CheckedFile
    from napari_unet.network.config import NormPlace, UNetConfig

_FEWEST = 4  # convolutions of the smallest U-Net: three blocks of one and the head
_MOST = 2000  # layers of a file; the largest U-Net has about 300
_NO_LAYER = re.compile(r"(^|\.)(loss|criterion|metric)", re.IGNORECASE)
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|avg|shadow|swa)([._]|$)", re.IGNORECASE)


def import_checked(path: Path, checked: CheckedFile) -> Model:
    """Make a model of a checkpoint that another program wrote.

    Its network is recognised by the names of its layers, else by their shapes alone.

    Parameters
    ----------
    path : Path
        Gives the model its name.
    checked : CheckedFile
        What the file holds.

    Returns
    -------
    Model
        Its description says how it was recognised and what is not known about it.

    Raises
    ------
    BadModel
        If the file holds no U-Net that is known.
    """
    try:
        if checked.container == ONNX:
            data = checked.tensors["graph"].numpy().tobytes()
            model = import_onnx(data, path.stem)
        elif (prefix := smp.prefix_of(checked.tensors)) is not None:
            beside = path.with_name("config.json")
            model = smp.import_unet(checked.tensors, prefix, beside, checked.tree)
        else:
            model = recognise(checked.tensors)
            model = _with_mask_values(model, checked.tree)
    except BadModel as error:
        raise BadModel(f"{path.name} cannot be imported. {error}") from error
    passport = model.passport.model_copy(update={"name": path.stem})
    return Model(model.network, passport)


def _with_mask_values(model: Model, tree: Any) -> Model:
    """Name the classes by the values that they had in the masks, if the file has them.

    milesial/Pytorch-UNet keeps these as "mask_values" among the weights: the grey
    value or the colour of each class.
    """
    values: Any = None
    for place in (tree, *tree.values()):
        if isinstance(place, dict):
            values = place.get("mask_values", values)
    names = []
    for value in values if isinstance(values, list | tuple) else ():
        parts = value if isinstance(value, list | tuple) else [value]
        if parts and all(isinstance(p, int | float) and abs(p) < 1e6 for p in parts):
            names.append("value " + ", ".join(f"{part:g}" for part in parts[:4]))
    passport = model.passport
    if len(names) != len(passport.classes):
        return model
    background, *others = passport.classes
    found = [
        info.model_copy(update={"name": name})
        for info, name in zip(others, names[1:], strict=True)
    ]
    description = (
        f"{passport.description} Its classes are called by what they were in the "
        f"masks; {names[0]} is background."
    )
    update = {"classes": (background, *found), "description": description}
    return Model(model.network, passport.model_copy(update=update))


def recognise(tensors: Mapping[str, Tensor]) -> Model:
    """Make a model of somebody else's tensors.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        By name, as in a state dict; what wraps the network's own names ("state_dict.",
        "module.", …) is found out. Of an averaged copy and the last state the
        average is taken.

    Returns
    -------
    Model
        On the CPU, in evaluation mode.

    Raises
    ------
    BadModel
        If no U-Net is recognised: what comes closest, and the first differences.
    """
    copies = _networks(tensors)
    closest: _Attempt | None = None
    for prefix, layers in copies:
        for attempt in _attempts_by_name(layers):
            if attempt.config is not None:
                return _model(attempt, prefix, _count_others(layers, copies))
            if closest is None or attempt.matched > closest.matched:
                closest = attempt
    for prefix, layers in copies:
        if _count_others(layers, copies):
            continue  # a part of something larger may have the shape of a U-Net, too
        for layout in arrangements(layers):
            config = infer_config(layout, SHAPE_ONLY)
            if config is not None:
                attempt = _Attempt(SHAPE_ONLY, layout, config, len(layers))
                return _model(attempt, prefix, 0)
    raise _not_recognised(closest, tensors)


@dataclass
class _Attempt:
    """What came of reading some layers as those of a family."""

    family: Family
    layout: Layout | None
    config: UNetConfig | None = None
    matched: int = 0
    differences: list[str] = field(default_factory=list)


def _networks(tensors: Mapping[str, Tensor]) -> list[tuple[str, dict[str, Layer]]]:
    """Return the layers under every prefix that may be a network, the likely first.

    Averaged copies come first, then what is wrapped least.
    """
    layers: dict[str, Layer] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        # Optimisers, counters and losses hold tensors, too.
        if _NO_LAYER.search(layer):
            continue
        if kind == "num_batches_tracked":
            layers[layer][kind] = tensor
        elif kind.startswith(("weight", "bias", "running_")):
            if tensor.is_floating_point():
                layers[layer][kind] = tensor.float()
    if len(layers) > _MOST:
        raise BadModel(
            f"It has {len(layers)} layers, which no U-Net has. Choose the checkpoint "
            "of a U-Net."
        )
    prefixes = [""]
    for prefix in prefixes:  # grows on the way
        counts: dict[str, int] = defaultdict(int)
        for name, tensors_of in layers.items():
            part, dot, _ = name.removeprefix(prefix).partition(".")
            if dot and name.startswith(prefix) and _is_convolution(tensors_of):
                counts[f"{prefix}{part}."] += 1
        prefixes += [inner for inner, count in counts.items() if count >= _FEWEST]
        if len(prefixes) > 64:
            break
    prefixes.sort(key=lambda p: (_AVERAGED.search(p) is None, p.count(".")))
    found = {
        prefix: {
            name.removeprefix(prefix): layer
            for name, layer in layers.items()
            if name.startswith(prefix)
        }
        for prefix in prefixes
    }
    # What wraps another one and nothing else has no layers of its own.
    return [
        (prefix, inside)
        for prefix, inside in found.items()
        if not any(
            other != prefix and other.startswith(prefix) and len(it) == len(inside)
            for other, it in found.items()
        )
    ]


def _count_others(
    layers: dict[str, Layer], copies: list[tuple[str, dict[str, Layer]]]
) -> int:
    """Count the layers of the file that belong to no copy of this network."""
    everything = max(len(inside) for _, inside in copies)
    same = sum(inside.keys() == layers.keys() for _, inside in copies)
    return everything - same * len(layers)


def _is_convolution(layer: Layer) -> bool:
    return "weight" in layer and layer["weight"].ndim in (4, 5)


def _attempts_by_name(layers: dict[str, Layer]) -> Iterable[_Attempt]:
    for family in FAMILIES:
        attempt = _arrange(layers, family)
        if attempt.layout is not None:
            attempt.config = infer_config(attempt.layout, family)
            attempt.differences += attempt.layout.problems
        yield attempt


_Place = tuple[int, str]  # in a block, and the name of the layer


def _arrange(layers: dict[str, Layer], family: Family) -> _Attempt:
    """Put layers into their places by their names."""
    found: dict[Role, dict[int, list[_Place]]] = defaultdict(lambda: defaultdict(list))
    attempt = _Attempt(family, None)
    for name in layers:
        matches = ((role, pattern.fullmatch(name)) for role, pattern in family.layers)
        role, match = next(((r, m) for r, m in matches if m), (None, None))
        if role is None or match is None:
            attempt.differences.append(f"unexpected {name}")
            continue
        attempt.matched += 1
        groups = match.groupdict()
        place = int(groups.get("i") or 0), name
        found[role][int(groups.get("l") or 0)].append(place)
        if role in ("head", "up", "bridge") and not _is_convolution(layers[name]):
            attempt.differences.append(f"no convolution {name}")
    missing = [role for role in ("encoder", "decoder", "head") if not found[role]]
    attempt.differences = [f"no {role}" for role in missing] + attempt.differences
    if not attempt.differences:
        blocks = _Blocks(layers, family)
        read = {
            role: {n: blocks.read(places) for n, places in found[role].items()}
            for role in ("encoder", "bottleneck", "decoder")
        }
        attempt.differences = blocks.differences
        if not attempt.differences:
            attempt.layout = _layout(attempt, found, read, blocks)
    return attempt


def _layout(
    attempt: _Attempt,
    found: dict[Role, dict[int, list[_Place]]],
    read: dict[str, dict[int, list[Convolution]]],
    blocks: _Blocks,
) -> Layout | None:
    """Bring the blocks into the order in which they run."""
    family = attempt.family
    encoder = [read["encoder"][n] for n in sorted(read["encoder"])]
    bottom = list(read["bottleneck"].values())
    steps = sorted(read["decoder"])
    inputs = [blocks.inputs(read["decoder"][n]) for n in steps]
    if inputs[0] < inputs[-1]:  # counted from the finest level
        steps = steps[::-1]
    decoder = [read["decoder"][n] for n in steps]
    ups = [found["up"][n][0][1] if n in found["up"] else None for n in steps]
    if family.decodes_before_up:
        bottom, decoder = decoder[:1], [*decoder[1:], []]
    elif not bottom:
        bottom = [encoder.pop()]
    is_u = len(bottom) == 1 and len(encoder) == len(decoder)
    if not is_u or not encoder or found["up"].keys() - set(steps):
        attempt.differences = [
            f"a U of {len(encoder)} encoder levels, {len(bottom)} bottlenecks, "
            f"{len(found['up'])} upsamplings and {len(decoder)} decoder levels"
        ]
        return None
    bridges = [name for places in found["bridge"].values() for _, name in places]
    return Layout(
        layers=blocks.layers,
        encoder=encoder,
        bottleneck=bottom[0],
        ups=ups,
        decoder=decoder,
        head=found["head"][0][0][1],
        bridge=bridges[0] if bridges else None,
        norm_place=blocks.norm_place,
        silent_norm=blocks.has_silent_norm,
    )


class _Blocks:
    """Tells convolutions and norms apart and where the norms run."""

    def __init__(self, layers: dict[str, Layer], family: Family):
        self.layers, self.family = layers, family
        self.norm_place: NormPlace = family.norm_place
        self.has_silent_norm = False
        self.differences: list[str] = []
        self._offsets: set[int] = set()

    def inputs(self, block: list[Convolution]) -> int:
        """Return the channels that a block takes."""
        return self.layers[block[0].name]["weight"].shape[1]

    def read(self, places: list[_Place]) -> list[Convolution]:
        """Return the convolutions of a block in their order, with their norms."""
        places = sorted(places)
        convs = [p for p in places if _is_convolution(self.layers[p[1]])]
        norms = [p for p in places if p not in convs]
        if not convs or (norms and len(norms) != len(convs)):
            self.differences.append(
                f"a block of {len(convs)} convolutions and {len(norms)} norms at "
                f"{places[0][1]}"
            )
            return []
        if norms:
            offsets = {n - c for (n, _), (c, _) in zip(norms, convs, strict=True)}
            self._tell_place(offsets, norms[0][1])
        elif self.family.silent_norm and convs[0][0] == 1:
            self.has_silent_norm, self.norm_place = True, "before_convolution"
        return [
            Convolution(name, norm[1] if norm else None)
            for (_, name), norm in zip_longest(convs, norms)
        ]

    def _tell_place(self, offsets: set[int], name: str) -> None:
        """Tell by its number where a norm runs; 0 if names have no numbers."""
        self._offsets |= offsets
        if len(self._offsets) > 1:
            self.differences.append(f"a norm in another place than others, {name}")
        offset = max(offsets)
        if offset < 0:
            self.norm_place = "before_convolution"
        elif offset:
            self.norm_place = "before_activation" if offset == 1 else "after_activation"


def _model(attempt: _Attempt, prefix: str, others: int) -> Model:
    family, config = attempt.family, attempt.config
    assert attempt.layout is not None
    assert config is not None
    network = build_network(attempt.layout, family, config)
    passport = default_passport(network).model_copy(
        update={
            "normalization": family.normalization,
            "description": _description(attempt, config, prefix, others),
        }
    )
    return Model(network, passport)


def _description(
    attempt: _Attempt, config: UNetConfig, prefix: str, others: int
) -> str:
    """Say what was recognised on what grounds, and what is not known."""
    family = attempt.family
    sentences = [f"Imported: {family.title}, {_summary(config)}."]
    if family.known:
        sentences.append(f"By its definition, {family.known}.")
    if _AVERAGED.search(prefix):
        sentences.append(f"The averaged copy of the weights, {prefix[:-1]}, is used.")
    if others:
        sentences.append(f"{others} other layers in the file are not used.")
    unknown = ["pixel size", "names of the classes"]
    if family.normalization == Normalization():
        unknown.append("normalisation of the images (percentiles are taken)")
    sentences.append(f"Not known: {', '.join(unknown)}.")
    if family.unknown:
        sentences.append(f"The file does not say {family.unknown}.")
    if config.ndim == 3:
        sentences.append("Pooling by 2 along all axes is taken for granted.")
    return " ".join(sentences)


def _summary(config: UNetConfig) -> str:
    outputs = config.num_classes
    return (
        f"{config.ndim}D, {config.in_channels} channel{'s' * (config.in_channels > 1)} "
        f"in, {outputs} output{'s' * (outputs > 1)}, {config.depth} poolings"
    )


def _not_recognised(
    closest: _Attempt | None, tensors: Mapping[str, Tensor]
) -> BadModel:
    advice = (
        "Import a U-Net of a supported family (docs/checkpoints.md), or train a new "
        "model here."
    )
    for part, program in OTHERS.items():
        if any(part in name for name in tensors):
            return BadModel(f"It is a network of {program}, no plain U-Net. {advice}")
    if closest is None or not closest.matched:
        return BadModel(f"None of its layers is known from a U-Net. {advice}")
    differences = closest.differences
    more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
    return BadModel(
        f"It comes closest to {closest.family.title}: {closest.matched} layers are "
        f"as expected, but not all: {'; '.join(differences[:5])}{more}. {advice}"
    )
