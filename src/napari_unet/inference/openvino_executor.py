"""A U-Net run by OpenVINO, the fastest way on most CPUs.

The graph is built from our own layers: no tracing, no file, nothing is converted
by another program.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from napari_unet.errors import Cancelled
from napari_unet.network.blocks import narrow
from napari_unet.network.folding import (
    Convolution,
    fold,
    join_upsampling,
    joining_saves,
    split_first,
    split_values,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from napari_unet.network.config import UNetConfig
    from napari_unet.network.cropping import Box, Cropping
    from napari_unet.network.unet import UNet

__all__ = ["OpenVinoExecutor", "can_execute"]

# What `join_upsampling` returns.
Joint = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_KEPT = 4  # compiled graphs: the tiles of one image have four shapes at most
_POLL = 50  # milliseconds between two looks at whether to stop


def can_execute(config: UNetConfig) -> bool:
    """Tell whether the graph of a network can be built here."""
    has_statistics = config.norm in ("group", "instance")
    return config.upsampling != "unpool" and not has_statistics


class OpenVinoExecutor:
    """A network on the CPU, compiled for every shape of tile that comes.

    Parameters
    ----------
    network : UNet
        One that can be executed; see `can_execute`.
    threads : int
        Of the CPU.
    reduced : bool
        bfloat16 where the processor computes with it; else float32.
    """

    tiles_at_once = 1

    def __init__(self, network: UNet, threads: int, reduced: bool):
        import openvino
        from openvino.properties import hint, inference_num_threads

        self._core = openvino.Core()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = "bfloat16" if reduced and "BF16" in able else "float32"
        types = {"bfloat16": openvino.Type.bf16, "float32": openvino.Type.f32}
        self._settings = {
            hint.inference_precision: types[self.precision],
            hint.performance_mode: hint.PerformanceMode.LATENCY,
            inference_num_threads: threads,
        }
        self._network = fold(network)
        self._splits = self.precision == "bfloat16" and split_first(
            self._network, torch.bfloat16
        )
        self._joints = [
            _joint(self._network, step) for step in range(network.config.depth)
        ]
        self._requests: OrderedDict[Any, Any] = OrderedDict()

    def run(
        self,
        image: torch.Tensor,
        cropping: Cropping | None,
        stop: threading.Event,
    ) -> torch.Tensor:
        """See `Executor.run`."""
        if self._splits:
            image = split_values(image, torch.bfloat16)
        request = self._request(tuple(image.shape), cropping)
        request.set_input_tensor(_shared_tensor(image.numpy()))
        request.start_async()
        while not request.wait_for(_POLL):
            if stop.is_set():
                request.cancel()
                with suppress(RuntimeError):  # that it was cancelled
                    request.wait()
                raise Cancelled("The computation was stopped.")
        logits = torch.from_numpy(request.get_output_tensor().data)
        return narrow(logits, cropping.kept) if cropping else logits

    @property
    def title(self) -> str:
        """What runs the network, and how precisely."""
        return f"OpenVINO, {self.precision}"

    @property
    def itemsize(self) -> int:
        """Bytes of one number of its maps."""
        return 2 if self.precision == "bfloat16" else 4

    def release(self) -> None:
        """Give back the memory that only a run needs."""
        for compiled, _ in self._requests.values():
            compiled.release_memory()

    def stop(self) -> None:
        """Do nothing: a run looks at its ``stop`` all the time."""

    def _request(self, shape: tuple[int, ...], cropping: Cropping | None) -> Any:
        key = shape, cropping
        if self._requests and key != next(reversed(self._requests)):
            self.release()  # each shape has memory of its own
        if key not in self._requests:
            while len(self._requests) >= _KEPT:
                self._requests.popitem(last=False)
            graph = _Graph(self._network, self._joints, shape, cropping).build()
            compiled = self._core.compile_model(graph, "CPU", self._settings)
            self._requests[key] = compiled, compiled.create_infer_request()
        self._requests.move_to_end(key)
        return self._requests[key][1]


def _shared_tensor(image: NDArray[np.float32]) -> Any:
    import openvino

    return openvino.Tensor(image, shared_memory=True)


def _joint(network: UNet, step: int) -> Joint | None:
    """Make an upsampling and the convolution after it one, where that saves time."""
    config = network.config
    up: Any = network.up[step]
    first = next(network.decoder[step].children(), None)
    concatenates = config.skip_connections and config.skips == "concat"
    if not (concatenates and up.kind == "transposed" and up.conv is not None):
        return None
    if not (isinstance(first, Convolution) and joining_saves(up.conv, first)):
        return None
    return join_upsampling(up.conv, first)


class _Graph:
    """The graph of a network for one shape of tile, layer by layer."""

    def __init__(
        self,
        network: UNet,
        joints: Sequence[Joint | None],
        shape: tuple[int, ...],
        cropping: Cropping | None,
    ):
        from openvino import opset13

        self._op = opset13
        self._network, self._joints = network, joints
        self._shape, self._cropping = shape, cropping
        self._ndim = network.config.ndim

    def build(self) -> Any:
        """Return an openvino.Model from an image to the logits of the last map."""
        import openvino

        network, op = self._network, self._op
        config = network.config
        image = op.parameter(list(self._shape), openvino.Type.f32)
        x, maps = image, []
        for block in network.encoder:
            x = self._layers(block.children(), x)
            maps.append(x)
            x = self._pool(x)
        if config.bridge:
            x = self._convolution(network.bridge, x)
        x = self._layers(network.bottleneck.children(), x)
        for step in range(config.depth):
            x = self._expand(step, x, maps.pop())
        logits = self._convolution(network.head, x)
        return openvino.Model([op.result(logits)], [image], "unet")

    def _expand(self, step: int, x: Any, skip: Any) -> Any:
        """One step of the expanding path."""
        config, cropping = self._network.config, self._cropping
        layers = list(self._network.decoder[step].children())
        joint = self._joints[step]
        joins = joint is not None and self._is_exact(step, self._sides(skip))
        if cropping:
            x = self._narrow(x, cropping.below[step])
            skip = self._narrow(skip, cropping.skip[step])
        if joint is not None and joins:
            x = self._joined(joint, x, skip, step)
            return self._layers(layers[1:], x)
        x = self._up(self._network.up[step], x)
        if cropping:
            x = self._narrow(x, cropping.upsampled[step])
        if config.skip_connections:
            skip = self._cut_centre(skip, self._sides(x))
            adds = config.skips == "add"
            x = self._op.add(x, skip) if adds else self._op.concat([skip, x], 1)
        return self._layers(layers, x)

    def _is_exact(self, step: int, sides: Sequence[int]) -> bool:
        """Tell whether nothing of a joint that is wrong, at edges, is wanted."""
        if self._network.config.padding == "valid":
            return True
        # What lies around a part of a map is not wanted.
        cropping = self._cropping
        return cropping is not None and all(
            0 < start and stop < side
            for (start, stop), side in zip(cropping.skip[step], sides, strict=True)
        )

    def _joined(self, joint: Joint, x: Any, skip: Any, step: int) -> Any:
        """Upsample and convolve at once, without the map that joins both."""
        weight, of_skip, bias = joint
        padding = 1 if self._network.config.padding == "same" else 0
        sides, margin = self._sides(x), 2 - padding
        spans = [(0, 2 * side) for side in sides]
        if self._cropping:
            spans = list(self._cropping.upsampled[step])
        begins = [margin + start for start, _ in spans]
        ends = [
            margin + 2 * side - stop
            for (_, stop), side in zip(spans, sides, strict=True)
        ]
        x = self._transposed(x, weight, [2] * self._ndim, begins, ends)
        lost = 2 - 2 * padding
        skip = self._cut_centre(skip, [side + lost for side in self._sides(x)])
        skip = self._convolved(skip, of_skip, [padding] * self._ndim)
        return self._op.add(self._op.add(skip, self._per_channel(bias)), x)

    def _layers(self, layers: Iterable[nn.Module], x: Any) -> Any:
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                x = self._op.relu(x)
            elif isinstance(layer, nn.LeakyReLU):
                x = self._op.prelu(x, _constant(torch.tensor([layer.negative_slope])))
            elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
                x = self._batch_norm(layer, x)
            else:
                x = self._convolution(layer, x)
        return x

    def _convolution(self, conv: Any, x: Any) -> Any:
        return self._biased(conv, self._convolved(x, conv.weight, conv.padding))

    def _convolved(self, x: Any, weight: torch.Tensor, padding: Sequence[int]) -> Any:
        ones, pads = [1] * self._ndim, list(padding)
        return self._op.convolution(x, _constant(weight), ones, pads, pads, ones)

    def _biased(self, conv: Any, y: Any) -> Any:
        if conv.bias is None:
            return y
        return self._op.add(y, self._per_channel(conv.bias))

    def _per_channel(self, values: Any) -> Any:
        return _constant(values.reshape(1, -1, *[1] * self._ndim))

    def _batch_norm(self, norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Any) -> Any:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        gain = norm.weight / torch.sqrt(variance + norm.eps)
        shift = norm.bias - gain * mean
        scaled = self._op.multiply(x, self._per_channel(gain))
        return self._op.add(scaled, self._per_channel(shift))

    def _pool(self, x: Any) -> Any:
        from openvino import opset1

        twos, zeros = [2] * self._ndim, [0] * self._ndim
        return opset1.max_pool(x, twos, zeros, zeros, twos)

    def _up(self, up: Any, x: Any) -> Any:
        kind, conv = up.kind, up.conv
        if kind in ("transposed", "transposed_3x3") and conv is not None:
            # What torch adds at the far end is a smaller cut there.
            pads = zip(conv.padding, conv.output_padding, strict=True)
            ends = [n - more for n, more in pads]
            up_map = self._transposed(x, conv.weight, conv.stride, conv.padding, ends)
            return self._biased(conv, up_map)
        if kind == "nearest":  # alone; `fold` makes one layer of it and a convolution
            return self._resize(x, "nearest", "asymmetric")
        if conv is not None:
            x = self._convolution(conv, x)
        if kind == "bilinear":
            # After the convolution of single pixels, of which there are fewer then:
            # what is linear between them stays so.
            return self._resize(x, "linear_onnx", self._corners(up.align_corners))
        return self._shuffle(x) if kind == "pixel_shuffle" else x

    def _transposed(
        self,
        x: Any,
        weight: torch.Tensor,
        stride: Sequence[int],
        begins: Sequence[int],
        ends: Sequence[int],
    ) -> Any:
        return self._op.convolution_backprop_data(
            x,
            _constant(weight),
            strides=list(stride),
            pads_begin=list(begins),
            pads_end=list(ends),
            dilations=[1] * self._ndim,
        )

    @staticmethod
    def _corners(aligned: bool) -> str:
        return "align_corners" if aligned else "half_pixel"

    def _resize(self, x: Any, mode: str, corners: str) -> Any:
        sides = torch.tensor([2 * side for side in self._sides(x)])
        axes = torch.arange(2, 2 + self._ndim)
        return self._op.interpolate(
            x,
            _constant(sides),
            mode,
            "sizes",
            coordinate_transformation_mode=corners,
            nearest_mode="floor",
            axes=_constant(axes),
        )

    def _shuffle(self, x: Any) -> Any:
        return self._op.depth_to_space(x, "depth_first", 2)

    def _sides(self, x: Any) -> list[int]:
        return [int(side) for side in x.get_output_shape(0)][2:]

    def _narrow(self, x: Any, box: Box) -> Any:
        starts, stops = (torch.tensor(side) for side in zip(*box, strict=True))
        steps, axes = torch.ones_like(starts), torch.arange(2, 2 + self._ndim)
        return self._op.slice(x, *map(_constant, (starts, stops, steps, axes)))

    def _cut_centre(self, x: Any, sides: Sequence[int]) -> Any:
        gaps = [have - side for side, have in zip(sides, self._sides(x), strict=True)]
        if not any(gaps):
            return x
        starts = [gap // 2 for gap in gaps]
        return self._narrow(
            x, tuple((a, a + side) for a, side in zip(starts, sides, strict=True))
        )


def _constant(values: torch.Tensor) -> Any:
    from openvino import opset13

    # Shared, because a copy that finds no memory would end the process.
    return opset13.constant(values.detach().contiguous().numpy(), shared_memory=True)
