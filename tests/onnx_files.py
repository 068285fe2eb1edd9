"""ONNX files, written field by field: also those that no exporter makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from napari_unet.network.unet import UNet

FLOAT, INT64, DOUBLE = 1, 7, 11
_TYPES = {np.dtype("float32"): FLOAT, np.dtype("int64"): INT64, np.dtype("float64"): 11}


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, *values: int | str | bytes) -> bytes:
    """One field for each value: a number, a text or a message."""
    made = b""
    for value in values:
        if isinstance(value, int):
            made += varint(number << 3) + varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            made += varint(number << 3 | 2) + varint(len(content)) + content
    return made


def tensor(name: str, values: np.ndarray, **extra: bytes) -> bytes:
    made = b"".join(field(1, side) for side in values.shape)
    made += field(2, _TYPES[values.dtype]) + field(8, name)
    return made + extra.get("data", field(9, values.tobytes())) + extra.get("more", b"")


def attribute(name: str, value: int | str | list[int] | float | np.ndarray) -> bytes:
    made = field(1, name)
    if isinstance(value, list):
        return made + field(8, *value) + field(20, 7)
    if isinstance(value, str):
        return made + field(4, value) + field(20, 3)
    if isinstance(value, float):
        number = varint(2 << 3 | 5) + np.float32(value).tobytes()
        return made + number + field(20, 1)
    if isinstance(value, np.ndarray):
        return made + field(5, tensor("", value)) + field(20, 4)
    return made + field(3, value) + field(20, 2)


def node(kind: str, inputs, outputs, domain: str = "", **attributes) -> bytes:
    made = field(1, *inputs) + field(2, *outputs) + field(4, kind)
    made += field(5, *(attribute(k, v) for k, v in attributes.items()))
    return made + (field(7, domain) if domain else b"")


def value_info(name: str, shape, kind: int = FLOAT) -> bytes:
    dims = b"".join(
        field(1, field(2, n) if isinstance(n, str) else field(1, n) if n else b"")
        for n in shape
    )
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))


def onnx_file(nodes, weights, image, result, *, more: bytes = b"", domain="") -> bytes:
    """A whole file of one input, ``image``, and one or several outputs."""
    graph = field(1, *nodes) + field(2, "network")
    graph += field(5, *weights) + field(11, *image) + field(12, *result)
    opset = field(8, field(1, domain) + field(2, 17))
    return field(1, 8) + field(2, "test") + field(7, graph) + opset + more


def unet_file(
    network: UNet, sides=(None, None), *, last: str = "", batch=None, names=("x", "y")
) -> bytes:
    """What an exporter makes of a U-Net with batch norms."""
    writer = _Writer(network, names[0])
    made = writer.write()
    if last:
        made = writer.add(last, [made], **({"axis": 1} if last == "Softmax" else {}))
    writer.nodes.append(node("Identity", [made], [names[1]]))
    config = network.config
    shrink = writer.shrink
    given = [n - shrink if isinstance(n, int) else n for n in sides]
    return onnx_file(
        writer.nodes,
        writer.weights,
        [value_info(names[0], [batch, config.in_channels, *sides])],
        [value_info(names[1], [batch, config.num_classes, *given])],
    )


class _Writer:
    def __init__(self, network: UNet, image: str):
        self.network, self.made = network, image
        self.nodes: list[bytes] = []
        self.weights: list[bytes] = []
        self.ndim = network.config.ndim
        self.shrink = 0

    def add(self, kind: str, inputs, **attributes) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(node(kind, inputs, [name], **attributes))
        return name

    def store(self, values: torch.Tensor) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(tensor(name, values.detach().numpy()))
        return name

    def write(self) -> str:
        maps = []
        for block in self.network.encoder:
            self.block(block)
            maps.append(self.made)
            sides = [2] * self.ndim
            self.made = self.add(
                "MaxPool", [self.made], kernel_shape=sides, strides=sides
            )
        self.block(self.network.bottleneck)
        for up, block in zip(self.network.up, self.network.decoder, strict=True):
            self.convolve(up.conv, "ConvTranspose", strides=[2] * self.ndim)
            self.made = self.add("Concat", [maps.pop(), self.made], axis=1)
            self.block(block)
        self.convolve(self.network.head, "Conv")
        return self.made

    def block(self, block) -> None:
        for layer in block:
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
                self.convolve(layer, "Conv", pads=[*layer.padding] * 2)
            elif isinstance(layer, torch.nn.ReLU):
                self.made = self.add("Relu", [self.made])
            else:
                parts = layer.weight, layer.bias, layer.running_mean, layer.running_var
                stored = [self.store(part) for part in parts]
                self.made = self.add("BatchNormalization", [self.made, *stored])

    def convolve(self, layer, kind: str, **attributes) -> None:
        parts = [layer.weight] + ([] if layer.bias is None else [layer.bias])
        stored = [self.store(part) for part in parts]
        self.made = self.add(kind, [self.made, *stored], **attributes)
