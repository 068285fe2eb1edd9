"""The context of a network: computed against measured, and the known numbers."""

import itertools

import pytest
import torch

from napari_unet.network.config import UNetConfig
from napari_unet.network.receptive_field import (
    measured_receptive_field,
    receptive_field,
)
from napari_unet.network.unet import UNet

VARIANTS = [
    UNetConfig(
        depth=depth,
        base_channels=1,
        convs_per_level=convs,
        padding=padding,
        upsampling=upsampling,
        skip_connections=skips,
        norm=None,
        ndim=ndim,
    )
    for ndim, depth, convs, padding, upsampling, skips in itertools.product(
        (2, 3),
        (1, 2, 3),
        (1, 2),
        ("same", "valid"),
        ("transposed", "nearest", "bilinear", "unpool", "pixel_shuffle"),
        (True, False),
    )
    if (padding, upsampling) != ("valid", "unpool")
    and (ndim == 2 or (depth <= 2 and convs == 1 and skips))
]


def name(config: UNetConfig) -> str:
    skips = "" if config.skip_connections else "-noskips"
    return (
        f"{config.ndim}d-depth{config.depth}-convs{config.convs_per_level}-"
        f"{config.padding}-{config.upsampling}{skips}"
    )


@pytest.mark.parametrize("config", VARIANTS, ids=name)
def test_computed_equals_measured(config):
    torch.manual_seed(0)
    assert receptive_field(config) == measured_receptive_field(config)


@pytest.mark.parametrize(
    ("upsampling", "halo"),
    [("transposed", 94), ("pixel_shuffle", 94), ("bilinear", 110), ("nearest", 110)],
)
def test_padded_network_of_depth_4(upsampling, halo):
    config = UNetConfig(upsampling=upsampling, base_channels=1, norm=None)
    field = receptive_field(config)
    assert max(field.before, field.after) == halo
    assert field.alignment == 16
    assert field.shrink == 0
    assert field.halo[0] % 16 == 0
    assert field.halo[0] >= field.before
    assert field.halo[1] >= field.after


def test_depth_4_measured():
    torch.manual_seed(0)
    config = UNetConfig(base_channels=1, norm=None)
    assert measured_receptive_field(config) == receptive_field(config)


def test_only_the_far_side_of_nearest_is_larger():
    nearest = receptive_field(UNetConfig(upsampling="nearest"))
    assert (nearest.before, nearest.after) == (94, 110)


def test_the_paper():
    field = receptive_field(UNetConfig(padding="valid"))
    assert field.shrink == 92
    assert field.remainder == 12
    assert field.input_size(572) == 572
    assert field.input_size(573) == 588
    assert field.input_size(1) == 188
    assert field.halo[0] % 16 == 92 % 16


@pytest.mark.parametrize("config", VARIANTS[::7], ids=name)
def test_input_sizes_are_legal_and_the_smallest(config):
    field = receptive_field(config)
    network = UNet.from_config(config).eval()
    for at_least in (1, field.input_size(1) + 1, field.input_size(1) + 5):
        side = field.input_size(at_least)
        assert at_least <= side
        result = network(torch.zeros(1, 1, *[side] * config.ndim))
        assert result.shape[-1] == side - 2 * field.shrink
        assert field.input_size(side) == side


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"norm": "instance"}, "instance"),
        ({"norm": "group"}, "group"),
        ({"upsampling": "bilinear", "align_corners": True}, "aligned corners"),
    ],
)
def test_what_cannot_be_exact_says_why(options, word):
    assert word in UNetConfig(depth=1, base_channels=2, **options).inexact_reason


def test_what_is_exact_says_nothing():
    for config in VARIANTS[::5]:
        assert config.inexact_reason is None
    # Aligned corners matter for interpolation only.
    assert UNetConfig(align_corners=True).inexact_reason is None
