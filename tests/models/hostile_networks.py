"""Plain weights of networks that cannot be: wrong, endless, huge or empty."""

import torch
from originals import Milesial


def conv(outputs, inputs, side=3) -> torch.Tensor:
    return torch.zeros(outputs, inputs, side, side)


def hostile_networks():
    """Yield (name, state dict); none is a network that can be made."""
    good = dict(Milesial(1, 2, width=2).state_dict())
    head = {"outc.conv.weight": conv(10**6, 2, 1), "outc.conv.bias": torch.zeros(10**6)}
    yield "a million classes", good | head
    yield "a million channels", good | {"inc.double_conv.0.weight": conv(2, 10**6)}
    for name, shape in {
        "no outputs": (0, 2**40, 3, 3),
        "no inputs": (2**40, 0, 3, 3),
        "no kernel": (2**30, 2**20, 0, 0),
        "a kernel of 99": (1, 1, 99, 99),
    }.items():
        some = torch.zeros(shape)
        yield name, {n: some if t.ndim == 4 else t for n, t in good.items()}
    for count in (1997, 1999):  # could be arranged in several ways
        convs = {f"layer{n}.weight": conv(1, 1) for n in range(count)}
        yield f"{count} layers", convs | {"z.weight": conv(1, 1, 1)}
    names = [".".join(f"{n >> bit & 1}" for bit in range(10)) for n in range(1900)]
    yield "deep names", {f"{name}.c{name}.weight": conv(1, 1) for name in names}
    deeper = ".".join("m" * 60)
    wrapped = [f"{deeper}.encoder{n}.enc1conv1.weight" for n in range(1900)]
    yield "deep wrappers", dict.fromkeys(wrapped, conv(1, 1))
    long = "9" * 200
    endless = f"encoder{long}.enc{long}conv1.weight"
    yield "long numbers", good | {endless: conv(1, 1)}
    levels = [f"down{n}.maxpool_conv.1.double_conv." for n in range(5, 400)]
    blocks = {f"{n}{i}.weight": conv(32, 32, 1) for n in levels for i in (0, 3)}
    yield "400 levels", good | blocks
    deep = {"bottleneck.0.weight": conv(1, 1), "head.weight": conv(1, 1, 1)}
    for n in range(300):
        deep[f"encoder.{n}.0.weight"] = conv(1, 1)
        deep[f"decoder.{n}.0.weight"] = conv(1, 2)
        deep[f"up.{n}.conv.weight"] = conv(1, 1, 2)
    yield "300 levels that fit", deep
    yield "half of a network", {n: t for n, t in good.items() if "up" not in n}
    volume = {n: t[..., None] if t.ndim == 4 else t for n, t in good.items()}
    yield "a volume's kernels of side one", volume
    yield "whole numbers", {n: t.int() for n, t in good.items()}
