"""What an ONNX file asks for, read before onnxruntime sees it.

ONNX is data, but a hostile file may name other files to be read, bring operators or
functions of its own, or loop. Only what plain networks of images are made of passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from napari_unet.errors import BadModel

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NODES = 10_000
MAX_FIELDS = 400_000
_DAMAGED = "It is damaged or no ONNX network. Get the file again."
_ADVICE = "Export it again as one plain graph, or ask for its PyTorch weights."
_FLOAT = 1  # of ONNX's types

# Operators of the standard domain without a file, a loop, text or chance in them.
_OPERATORS = frozenset(
    """
    Abs Add And ArgMax AveragePool BatchNormalization Cast CastLike Ceil Clip Concat
    Constant ConstantOfShape Conv ConvTranspose DepthToSpace DequantizeLinear Div
    Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul
    Max MaxPool MaxUnpool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow
    QuantizeLinear Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterND Selu Shape Sigmoid
    Sign Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where
    """.split()
)
_LOOPS = frozenset(("If", "Loop", "Scan", "SequenceMap"))
# What these give are values that they take.
_KEEPING = frozenset(
    """
    Cast Clip Identity Reshape Resize Slice Squeeze Transpose Unsqueeze Upsample
    """.split()
)
# What these give has no pixels any more.
_NO_PIXELS = frozenset(("Constant", "ConstantOfShape", "Range", "Shape", "Size"))


@dataclass
class Node:
    """An operator of a graph."""

    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Graph:
    """What is read of a graph.

    Parameters
    ----------
    nodes : list of Node
        In the order in which they run.
    shapes : dict
        Of the stored weights, by name.
    outputs : list of str
        Names.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The operator that makes the values of the output.

        What only moves, cuts or repeats them is left aside; a softmax may be written
        as its formula.
        """
        made_by = {name: node for node in self.nodes for name in node.outputs}
        node = made_by.get(self.outputs[0]) if self.outputs else None
        for _ in self.nodes:  # no more than there are, should it run in a circle
            if node is None or node.kind not in _KEEPING or not node.inputs:
                break
            node = made_by.get(node.inputs[0])
        if node is None:
            return ""
        above = made_by.get(node.inputs[0]) if node.inputs else None
        is_formula = node.kind == "Div" and above is not None and above.kind == "Exp"
        return "Softmax" if is_formula else node.kind


def read_graph(data: bytes | bytearray) -> Graph:
    """Check an ONNX file and read what it is made of.

    Parameters
    ----------
    data : bytes
        The content of the file.

    Returns
    -------
    Graph

    Raises
    ------
    BadModel
        If it is damaged, refers to other files, brings code of its own, has parts
        that networks of images do not need, or weights that are not finite.
    """
    reader = _Reader()
    for number, value in reader.fields(memoryview(data)):
        if number == 7:
            reader.read_graph(value)
        elif number in (20, 25):
            what = "functions of its own" if number == 25 else "training steps"
            raise BadModel(f"Its ONNX graph has {what}. {_ADVICE}")
    if not reader.graph.nodes:
        raise BadModel(_DAMAGED)
    return reader.graph


class _Reader:
    """Reads the parts of ONNX's protobuf messages that matter, all repetitions."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._left = MAX_FIELDS

    def fields(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield the number and the content of each field of a message."""
        place, end = 0, len(data)
        while place < end:
            self._left -= 1
            if self._left < 0:
                raise BadModel(f"Its ONNX graph has too many parts. {_ADVICE}")
            key, place = _varint(data, place)
            if not 8 <= key < 1 << 32:  # whose upper bits another reader may not see
                raise BadModel(_DAMAGED)
            start = place
            kind = key & 7
            if kind == 0:
                _, place = _varint(data, place)
            elif kind == 1:
                place += 8
            elif kind == 2:
                length, start = _varint(data, place)
                place = start + length
            elif kind == 5:
                place += 4
            else:
                raise BadModel(_DAMAGED)
            if place > end:
                raise BadModel(_DAMAGED)
            yield key >> 3, data[start:place]

    def read_graph(self, data: memoryview) -> None:
        graph = self.graph
        for number, value in self.fields(data):
            if number == 1:
                graph.nodes.append(self._node(value))
                if len(graph.nodes) > MAX_NODES:
                    raise BadModel(f"Its ONNX graph has too many parts. {_ADVICE}")
            elif number == 5:
                name, shape = self._tensor(value)
                graph.shapes[name] = shape
            elif number == 12:
                names = [_text(v) for n, v in self.fields(value) if n == 1]
                graph.outputs += names[-1:]
            elif number == 15:
                raise BadModel(f"Its ONNX graph has sparse weights. {_ADVICE}")

    def _node(self, data: memoryview) -> Node:
        node = Node()
        for number, value in self.fields(data):
            if number == 1:
                node.inputs.append(_text(value))
            elif number == 2:
                node.outputs.append(_text(value))
            elif number == 4:
                node.kind = _text(value)
                _check_operator(node.kind)
            elif number == 5:
                self._attribute(value, node)
            elif number == 7 and _text(value) not in ("", "ai.onnx"):
                raise BadModel(
                    f"Its ONNX graph needs operators of {_text(value)[:40]!r}, which "
                    f"are not of the ONNX standard. {_ADVICE}"
                )
        _check_operator(node.kind)
        return node

    def _attribute(self, data: memoryview, node: Node) -> None:
        name, sizes = "", []
        for number, value in self.fields(data):
            if number == 1:
                name = _text(value)
            elif number in (3, 8):
                sizes += _integers(value)
            elif number in (5, 10):
                self._tensor(value)
            elif number in (6, 11):
                raise BadModel(_looping(node.kind))
            elif number in (14, 15, 22, 23):
                raise BadModel(
                    f"Its operator {node.kind[:40]!r} is of an unknown kind. {_ADVICE}"
                )
        node.sizes[name] = sizes

    def _tensor(self, data: memoryview) -> tuple[str, list[int]]:
        """Check stored weights; return their name and shape."""
        name, shape, kind = "", list[int](), 0
        raw, floats = memoryview(b""), memoryview(b"")
        for number, value in self.fields(data):
            if number == 1:
                shape += _integers(value)
            elif number == 2:
                kind = _integers(value)[-1]
            elif number == 4 and len(value) > 4:
                floats = value
            elif number == 8:
                name = _text(value)
            elif number == 9:
                raw = value
            elif number == 13 or (number == 14 and any(value)):
                raise BadModel(
                    "Its weights are in another file, which is not read. Export it "
                    "again as one file (in torch.onnx.export, external_data=False)."
                )
        if any(side < 0 or side >= 1 << 31 for side in shape) or len(shape) > 16:
            raise BadModel(_DAMAGED)
        values = raw if len(raw) else floats
        if kind == _FLOAT and shape and len(values) % 4 == 0:
            _check_finite(name, np.frombuffer(values, "<f4"))
        return name, shape


def _check_operator(kind: str) -> None:
    if kind in _LOOPS:
        raise BadModel(_looping(kind))
    if kind not in _OPERATORS:
        raise BadModel(
            f"Its ONNX graph uses the operator {kind[:40]!r}, which networks of images "
            f"do not need. {_ADVICE}"
        )


def _looping(kind: str) -> str:
    return (
        f"Its ONNX graph decides while it runs what it does ({kind[:40]!r}), so that "
        "it cannot be checked. Export it again with a fixed input size."
    )


def _check_finite(name: str, values: np.ndarray) -> None:
    if len(values) and not np.isfinite([values.min(), values.max()]).all():
        count = int((~np.isfinite(values)).sum())
        raise BadModel(
            f"It has {count} non-finite values in {name[:80]!r}; its training failed. "
            "Use an earlier one."
        )


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return a number and where the next one begins."""
    value = 0
    for index, byte in enumerate(data[place : place + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise BadModel(_DAMAGED)


def _integers(data: memoryview) -> list[int]:
    """Return the integers of a field, which may hold several."""
    found, place = list[int](), 0
    while place < len(data):
        value, place = _varint(data, place)
        found.append(value - (1 << 64) if value >> 63 else value)
        if len(found) > 64:  # none of what is looked at has more
            break
    return found


def _text(data: memoryview) -> str:
    return bytes(data[:1000]).decode(errors="replace")


# --- what its layers reach ----------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """What the layers of a graph tell about its tiles.

    Parameters
    ----------
    alignment : int
        By how much the smallest map is smaller than the image.
    reach : int
        Pixels on each side that an output depends on.
    width : int
        Channels of the widest map at full size.
    """

    alignment: int
    reach: int
    width: int


def follow(graph: Graph, image: str) -> Geometry:
    """Follow an image through the layers of a graph.

    An estimate: what takes all pixels together (a global average) is left out, and
    an enlargement of unknown factor counts as one by 2.

    Parameters
    ----------
    graph : Graph
        As `read_graph` gives it.
    image : str
        The name of its input.
    """
    # Pixels of the image between two of a map, and how far one looks.
    maps = {image: (1.0, 0.0)}
    smallest, width = 1.0, 1
    for node in graph.nodes:
        seen = [maps[name] for name in node.inputs if name in maps]
        if not seen or node.kind in _NO_PIXELS:
            continue
        jump, reach = min(j for j, _ in seen), max(r for _, r in seen)
        weights = graph.shapes.get(node.inputs[1], []) if len(node.inputs) > 1 else []
        kernel = max(node.sizes.get("kernel_shape") or weights[2:] or [1])
        stride = max([*node.sizes.get("strides", []), 1])
        spread = (kernel - 1) * max([*node.sizes.get("dilations", []), 1]) / 2
        if node.kind in ("Conv", "MaxPool", "AveragePool"):
            reach, jump = reach + spread * jump, jump * stride
        elif node.kind in ("ConvTranspose", "MaxUnpool"):
            jump = jump / stride
            reach += spread * jump
        elif node.kind in ("Resize", "Upsample"):
            reach, jump = reach + jump, jump / 2
        elif node.kind == "SpaceToDepth":
            jump *= max([*node.sizes.get("blocksize", []), 1])
        elif node.kind == "DepthToSpace":
            jump /= max([*node.sizes.get("blocksize", []), 1])
        if node.kind == "Conv" and jump <= 1 and weights:
            width = max(width, weights[0])
        smallest = max(smallest, jump)
        jump, reach = max(jump, 1.0), min(reach, 1e6)
        maps |= dict.fromkeys(node.outputs, (jump, reach))
    looked = [maps[name][1] for name in graph.outputs[:1] if name in maps]
    return Geometry(
        min(math.ceil(smallest), 1024), math.ceil(max([*looked, 0])), min(width, 4096)
    )
