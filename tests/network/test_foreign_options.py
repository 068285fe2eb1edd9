"""The options that only other people's networks use: shapes, context, exactness."""

import json

import pytest
import torch

from napari_unet.errors import BadModel
from napari_unet.network.config import UNetConfig
from napari_unet.network.receptive_field import (
    measured_receptive_field,
    receptive_field,
)
from napari_unet.network.unet import UNet

UNEVEN = {
    "base_channels": 3,
    "convs_per_level": 3,
    "blocks": ((3,), (2, 4), (5, 4, 6), (4,), (3, 1)),
}
OPTIONS = {
    "widths": {**UNEVEN, "ups": (2, 3)},
    "sums": {
        "base_channels": 2,
        "convs_per_level": 2,
        "skips": "add",
        "blocks": ((2, 2), (4, 4), (8, 4), (4, 2), ()),
        "ups": (4, 2),
        "upsampling": "transposed_3x3",
        "bridge": 8,
    },
    "bare-bilinear": {**UNEVEN, "ups": (0, 0), "upsampling": "bilinear"},
    "bare-nearest": {**UNEVEN, "ups": (0, 2), "upsampling": "nearest"},
    "leaky": {"base_channels": 2, "convs_per_level": 1, "negative_slope": 0.1},
    "3x3": {"base_channels": 1, "convs_per_level": 2, "upsampling": "transposed_3x3"},
}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("name", OPTIONS)
def test_context_and_shapes(name, padding, ndim):
    torch.manual_seed(0)
    depth = 2 if ndim == 2 else 1
    options = {"depth": depth, "norm": None, "padding": padding, "ndim": ndim}
    options |= OPTIONS[name]
    if ndim == 3:  # one level less
        if "blocks" in options:
            blocks = options["blocks"]
            options["blocks"] = (blocks[0], (*blocks[2][:-1], 4), blocks[-1])
            options["ups"] = options["ups"][-1:]
            options["convs_per_level"] = max(map(len, options["blocks"]))
    config = UNetConfig(**options)
    field = receptive_field(config)
    assert field == measured_receptive_field(config)
    side = field.input_size(30)
    network = UNet.from_config(config).eval()
    assert config.weights == sum(p.numel() for p in network.parameters())
    logits = network(torch.zeros(1, 1, *[side] * ndim))
    assert logits.shape == (1, 2, *[side - 2 * field.shrink] * ndim)


@pytest.mark.parametrize("place", ["after_activation", "before_convolution"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_the_norm_runs_anywhere(norm, place):
    network = UNet(2, 1, base_channels=2, depth=1, norm=norm, norm_place=place)
    kinds = [type(layer).__name__.rstrip("23d") for layer in network.encoder[0]]
    conv, act = kinds.index("Conv"), kinds.index("ReLU")
    place_of_norm = next(i for i, kind in enumerate(kinds) if "Norm" in kind)
    if place == "after_activation":
        assert conv < act < place_of_norm
    else:
        assert place_of_norm < conv < act
    assert network.encoder[0][conv].bias is not None
    assert network.config.weights == sum(p.numel() for p in network.parameters())
    network(torch.randn(2, 2, 9, 8)).sum().backward()


@pytest.mark.parametrize("name", OPTIONS)
def test_the_configuration_survives_json(name):
    config = UNetConfig(depth=2, **OPTIONS[name])
    again = UNetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert UNet.from_config(again).config == config


def test_own_networks_say_nothing_of_foreign_options():
    said = set(UNetConfig(upsampling="bilinear", norm=None).to_dict())
    assert said.isdisjoint({"skips", "norm_place", "negative_slope", "blocks", "ups"})
    assert "align_corners" in said


@pytest.mark.parametrize(
    "wrong",
    [
        {"skips": "multiply"},
        {"norm_place": "nowhere"},
        {"negative_slope": -0.1},
        {"negative_slope": 1.5},
        {"bridge": -1},
        {"bridge": 10**9},
        {"blocks": ()},
        {"blocks": ((1,), (2,))},
        {"blocks": ((4,), (8,), "12")},
        {"blocks": ((4,), (), (4,))},
        {"blocks": ((4,), (0,), (4,))},
        {"blocks": ((4,), (10**9,), (4,))},
        {"blocks": ((4,), (8,) * 9, (4,))},
        {"blocks": ((8,), (8,), (8,))},
        {"blocks": ((4, 4), (8,), (4,))},
        {"ups": (1, 2)},
        {"ups": (0,)},
        {"ups": ("4",)},
    ],
    ids=str,
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(BadModel, match=f"{next(iter(wrong))}=|base_ch|convs_per"):
        UNetConfig(depth=1, base_channels=4, convs_per_level=1, **wrong)


def test_sums_need_equal_channels():
    with pytest.raises(BadModel, match="has 4 channels and is added to 3"):
        UNetConfig(depth=1, base_channels=4, skips="add", ups=(3,))
