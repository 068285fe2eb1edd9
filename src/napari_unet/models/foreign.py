"""Other people's checkpoints: found in the file, recognised, made our model."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from napari_unet.errors import BadModel
from napari_unet.models.foreign_names import FAMILIES, Family, Role
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from napari_unet.models.safety import CheckedFile
    from napari_unet.network.unet import NormPlace, UNetConfig

_FEWEST = 4  # convolutions of the smallest U-Net: three blocks of one and the head
_NO_LAYER = re.compile(r"(^|\.)(loss|criterion|metric)", re.IGNORECASE)
_AVERAGED = re.compile(r"ema|average|shadow|swa", re.IGNORECASE)


def import_model(path: Path, checked: CheckedFile) -> Model:
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
        model = recognise(checked.tensors)
    except BadModel as error:
        raise BadModel(f"{path.name} cannot be imported. {error}") from error
    passport = model.passport.model_copy(update={"name": path.stem})
    return Model(model.network, passport)


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
    raise _not_recognised(closest)


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
        if kind.startswith(("weight", "bias", "running_", "num_b")):
            if not _NO_LAYER.search(layer):
                floats = tensor.is_floating_point()
                layers[layer][kind] = tensor.float() if floats else tensor
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
    return [
        (
            prefix,
            {
                name.removeprefix(prefix): layer
                for name, layer in layers.items()
                if name.startswith(prefix)
            },
        )
        for prefix in prefixes
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
    unknown = []
    for name in layers:
        matches = ((role, pattern.fullmatch(name)) for role, pattern in family.layers)
        role, match = next(((r, m) for r, m in matches if m), (None, None))
        if role is None or match is None:
            unknown.append(name)
            continue
        groups = match.groupdict()
        place = int(groups.get("i") or 0), name
        found[role][int(groups.get("l") or 0)].append(place)
    attempt = _Attempt(family, None, matched=len(layers) - len(unknown))
    missing = [
        f"no {role}" for role in ("encoder", "decoder", "head") if not found[role]
    ]
    attempt.differences = missing + [f"unexpected {name}" for name in unknown]
    if attempt.differences:
        return attempt
    blocks = _Blocks(layers, family)
    encoder = [blocks.read(found["encoder"][n]) for n in sorted(found["encoder"])]
    steps = sorted(found["decoder"])
    decoder = [blocks.read(found["decoder"][n]) for n in steps]
    bottom = [blocks.read(one) for one in found["bottleneck"].values()]
    if blocks.differences or not all([*encoder, *decoder, *bottom]):
        attempt.differences = blocks.differences or ["blocks without convolutions"]
        return attempt
    inputs = [layers[block[0].name]["weight"].shape[1] for block in decoder]
    if inputs[0] < inputs[-1]:  # counted from the finest level
        steps, decoder = steps[::-1], decoder[::-1]
    ups = [found["up"][n][0][1] if n in found["up"] else None for n in steps]
    if family.decodes_before_up:
        bottom, decoder = decoder[:1], [*decoder[1:], []]
    elif not bottom:
        bottom = [encoder.pop()]
    if (
        len(bottom) != 1
        or len(encoder) != len(decoder)
        or set(found["up"]) - set(steps)
    ):
        attempt.differences = [
            f"{len(encoder)} encoder levels, but {len(decoder)} decoder levels, "
            f"{len(found['up'])} upsamplings and {len(bottom)} bottlenecks"
        ]
        return attempt
    bridges = [name for place in found["bridge"].values() for _, name in place]
    attempt.layout = Layout(
        layers=layers,
        encoder=encoder,
        bottleneck=bottom[0],
        ups=ups,
        decoder=decoder,
        head=next(iter(found["head"].values()))[0][1],
        bridge=bridges[0] if bridges else None,
        norm_place=blocks.norm_place,
        silent_norm=blocks.has_silent_norm,
    )
    return attempt


class _Blocks:
    """Tells convolutions and norms apart and where the norms run."""

    def __init__(self, layers: dict[str, Layer], family: Family):
        self.layers, self.family = layers, family
        self.norm_place: NormPlace = family.norm_place
        self.has_silent_norm = False
        self.differences: list[str] = []

    def read(self, places: list[_Place]) -> list[Convolution]:
        """Return the convolutions of a block in their order, with their norms."""
        places = sorted(places)
        convs = [p for p in places if _is_convolution(self.layers[p[1]])]
        norms = [p for p in places if p not in convs]
        if norms and len(norms) != len(convs):
            first = norms[0][1]
            self.differences.append(f"{len(norms)} norms like {first} in a block")
            return []
        if not norms:
            if self.family.silent_norm and convs and convs[0][0] == 1:
                self.has_silent_norm, self.norm_place = True, "before_convolution"
            return [Convolution(name) for _, name in convs]
        offset = norms[0][0] - convs[0][0]
        if offset < 0:
            self.norm_place = "before_convolution"
        elif offset > 1:
            self.norm_place = "after_activation"
        elif offset == 1:
            self.norm_place = "before_activation"
        return [
            Convolution(conv, norm)
            for (_, conv), (_, norm) in zip(convs, norms, strict=True)
        ]


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
        sentences.append(f"Of several copies the averaged one, {prefix[:-1]}, is used.")
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


def _not_recognised(closest: _Attempt | None) -> BadModel:
    advice = (
        "Import a U-Net of a supported family (docs/checkpoints.md), or train a new "
        "model here."
    )
    if closest is None or not closest.matched:
        return BadModel(f"None of its layers is known from a U-Net. {advice}")
    differences = closest.differences
    more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
    return BadModel(
        f"It comes closest to {closest.family.title}: {closest.matched} layers are "
        f"as expected, but there is {'; '.join(differences[:5])}{more}. {advice}"
    )
