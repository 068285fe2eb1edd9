"""ONNX files: checked, measured, made our model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from napari_unet.errors import BadModel, Cancelled
from napari_unet.models.heads import NOT_EXCLUSIVE, classes_named, joint_classes
from napari_unet.models.model import Model
from napari_unet.models.onnx_graph import follow, read_graph
from napari_unet.network.combined import MOST
from napari_unet.network.onnx import OnnxProgram, open_session
from napari_unet.network.program_config import ProgramConfig, settings_of

LARGEST_HALO = 128  # pixels; what lies farther away hardly counts, and costs much
TRIAL_SECONDS = 10.0
_TRIAL_MEMORY = 2 << 30  # bytes
_TRIAL_SIDE = {2: 64, 3: 32}
_OPEN_SIDE = {2: 256, 3: 64}  # where only some sides of the input are fixed
_ALIGNMENTS = (16, 32, 64)  # tried where that of the layers turns out too small
_ACTIVATIONS = ("Sigmoid", "HardSigmoid", "Softmax")  # that make probabilities
_ADVICE = "Export it again, or ask for its PyTorch weights."


def import_onnx(
    data: bytes, name: str, *, halo: int | None = None, combine: bool = True
) -> Model:
    """Make a model of an ONNX network, which then runs as it is.

    What is not known of its inputs is tried with a small image.

    Parameters
    ----------
    data : bytes
        The content of the file, which may come from anyone.
    name : str
        Of the model.
    halo : int, optional
        Pixels of context that its tiles need, if that is known; by default followed
        through its layers.
    combine : bool
        Whether outputs with a sigmoid of their own become classes that exclude each
        other.

    Returns
    -------
    Model
        Its description says what is not known about it.

    Raises
    ------
    BadModel
        If onnxruntime is missing, or the file is damaged, dangerous or no network
        from one image to one image.
    """
    graph = read_graph(data)
    session = open_session(data)
    image = _image(session)
    result, others = _result(session, image)
    taken = replace(graph, outputs=[result.name])
    geometry = follow(taken, image.name)
    is_active = taken.last in _ACTIVATIONS
    config = ProgramConfig(
        kind="onnx",
        in_channels=image.channels,
        num_classes=result.channels or 1,
        ndim=len(image.sides),
        alignment=geometry.alignment,
        halo=min(geometry.reach, LARGEST_HALO) if halo is None else halo,
        outputs="probabilities" if is_active else "logits",
        base_channels=geometry.width,
        settings=settings_of({"output": result.name}),
    )
    weights = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if any(side is not None for side in image.sides):
        config = _with_fixed_shape(config, weights, image, result)
    else:
        config = _with_legal_sides(config, weights)
    model = Model(OnnxProgram(config, weights).eval())
    said = _description(config, others, taken.last)
    each = is_active and "Sigmoid" in taken.last
    if combine and each and 1 < config.num_classes <= MOST:
        names = [f"output {n + 1}" for n in range(config.num_classes)]
        model, names, note = joint_classes(model, names)
        classes = classes_named(model.passport.classes, names)
        said, update = f"{said} {note}", {"classes": classes}
    else:
        update = {}
    known = update | {"name": name, "description": said}
    return Model(model.network, model.passport.model_copy(update=known))


class _TooMuch(BadModel):
    """It takes more time or memory than a network can need."""


@dataclass(frozen=True)
class _Tensor:
    """What goes in or out; None where a graph leaves it open."""

    name: str
    channels: int | None
    sides: tuple[int | None, ...]

    @classmethod
    def of(cls, value: Any) -> _Tensor:
        known = [n if isinstance(n, int) and n > 0 else None for n in value.shape]
        return cls(value.name, known[1], tuple(known[2:]))


@dataclass(frozen=True)
class _Image(_Tensor):
    channels: int


def _image(session: Any) -> _Image:
    """Return what the network takes, if that is one image."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise BadModel(
            f"Its ONNX network takes {len(inputs)} inputs ("
            f"{', '.join(one.name for one in inputs)[:80]}), not one image. {_ADVICE}"
        )
    (one,) = inputs
    if one.type != "tensor(float)" or len(one.shape) not in (4, 5):
        raise BadModel(
            f"Its ONNX network takes {one.type} of {len(one.shape)} axes, not float32 "
            "images with batch, channel and two or three axes of space (NCHW, "
            f"NCDHW). {_ADVICE}"
        )
    if one.shape[-1] in (1, 2, 3, 4):
        raise BadModel(
            "Its ONNX network has the channels last, as Keras and TensorFlow do. "
            "Export it again with the channels first (NCHW)."
        )
    batch, found = one.shape[0], _Tensor.of(one)
    if isinstance(batch, int) and batch != 1:
        raise BadModel(
            f"Its ONNX network takes {batch} images at once. Export it again with a "
            "batch of 1."
        )
    if found.channels is None:
        raise BadModel(
            "Its ONNX network does not say how many channels its image has. Export it "
            "again with a fixed number of channels."
        )
    return _Image(found.name, found.channels, found.sides)


def _result(session: Any, image: _Image) -> tuple[_Tensor, int]:
    """Return what is taken of the outputs, and the number of the others."""
    outputs = session.get_outputs()
    rank = 2 + len(image.sides)
    for one in outputs:
        # The rank may be open, too.
        if one.type == "tensor(float)" and len(one.shape) == rank:
            return _Tensor.of(one), len(outputs) - 1
    found = ", ".join(f"{one.type} of {len(one.shape)} axes" for one in outputs)[:100]
    raise BadModel(
        f"Its ONNX network gives {found}, not an image of float32 with as many axes as "
        f"the one it takes ({rank}). {_ADVICE}"
    )


def _with_fixed_shape(
    config: ProgramConfig, weights: torch.Tensor, image: _Image, result: _Tensor
) -> ProgramConfig:
    """Complete the config of a network that takes one shape only."""
    open_side = -(-_OPEN_SIDE[config.ndim] // config.alignment) * config.alignment
    shape = tuple(side or open_side for side in image.sides)
    given = result.sides
    channels = result.channels
    if channels is None or any(side is None for side in given):
        channels, given = _try(replace(config, fixed_shape=shape), weights, shape)
    missing = {n - (m or 0) for n, m in zip(shape, given, strict=True)}
    shrink = missing.pop()
    if missing or shrink < 0 or shrink % 2 or 2 * shrink >= min(shape):
        raise _other_size(shape, given)
    return replace(
        config,
        num_classes=channels,
        fixed_shape=shape,
        shrink=shrink // 2,
    )


def _with_legal_sides(config: ProgramConfig, weights: torch.Tensor) -> ProgramConfig:
    """Find out which sides the network takes; a small image of such sides is tried."""
    first = config.alignment
    problem: BadModel | None = None
    for alignment in (first, *(n for n in _ALIGNMENTS if n > first)):
        side = -(-_TRIAL_SIDE[config.ndim] // alignment) * alignment
        # Two sides, that both are legal.
        shape = (side, *[side + alignment] * (config.ndim - 1))
        try:
            channels, given = _try(config, weights, shape)
        except _TooMuch:
            raise
        except BadModel as error:
            problem = problem or error
            continue
        if given == shape:
            return replace(config, num_classes=channels, alignment=alignment)
        problem = problem or _other_size(shape, given)
    assert problem is not None
    raise problem


def _other_size(shape: tuple[int, ...], given: tuple[int | None, ...]) -> BadModel:
    have, get = (" x ".join(map(str, sides)) for sides in (shape, given))
    return BadModel(
        f"Its ONNX network makes {get} pixels of {have}, and segmentation needs as "
        "many as the image has. If its convolutions are not padded, export it with a "
        "fixed input size."
    )


def _try(
    config: ProgramConfig, weights: torch.Tensor, shape: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Run the network once; return the channels and the sides that it gives."""
    program = OnnxProgram(config, weights, memory=_TRIAL_MEMORY)
    timer = threading.Timer(TRIAL_SECONDS, program.stop)
    timer.daemon = True
    timer.start()
    try:
        given = program.compute(np.zeros((1, config.in_channels, *shape), np.float32))
    except MemoryError as error:
        raise _TooMuch(
            f"Its ONNX network needs more than {_TRIAL_MEMORY >> 30} GB for a small "
            f"image. {_ADVICE}"
        ) from error
    except Cancelled as error:
        raise _TooMuch(
            f"Its ONNX network needs more than {TRIAL_SECONDS:.0f} seconds for a small "
            f"image. {_ADVICE}"
        ) from error
    finally:
        timer.cancel()
    if given.ndim != 2 + len(shape) or given.dtype != np.float32:
        raise BadModel(
            f"Its ONNX network gives {given.dtype} of {given.ndim} axes, not an image "
            f"of float32. {_ADVICE}"
        )
    return given.shape[1], given.shape[2:]


def _description(config: ProgramConfig, others: int, last: str) -> str:
    """Say what was recognised on what grounds, and what is not known."""
    ins, outs = config.in_channels, config.num_classes
    sentences = [
        f"Imported: an ONNX network, {config.ndim}D, {ins} channel{'s' * (ins > 1)} "
        f"in, {outs} output{'s' * (outs > 1)}. It runs as it is and cannot be "
        "fine-tuned."
    ]
    if others:
        sentences.append(f"{others} other outputs of it are not used.")
    if config.outputs == "probabilities":
        sentences.append("Its outputs are probabilities already.")
        if outs > MOST and "Sigmoid" in last:
            sentences.append(NOT_EXCLUSIVE)
    else:
        kind = "sigmoid" if outs == 1 else "softmax"
        sentences.append(f"A {kind} makes probabilities of its outputs.")
    sentences.append(
        "Not known: pixel size, names of the classes, normalisation of the images "
        "(percentiles are taken)."
    )
    return " ".join(sentences)
