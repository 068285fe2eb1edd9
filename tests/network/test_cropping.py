"""Cropping the expanding path: the same numbers, less work."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.network.config import UNetConfig
from napari_unet.network.cropping import can_crop, cropping
from napari_unet.network.folding import fold
from napari_unet.network.unet import UNet


def trained(config: UNetConfig) -> UNet:
    """A network whose norms have seen something."""
    torch.manual_seed(0)
    network = UNet.from_config(config)
    with torch.no_grad():
        network.train()
        sides = [2 * config.smallest_side] * config.ndim
        for _ in range(3):
            network(2 * torch.randn(2, config.in_channels, *sides) + 1)
    return network.eval()


CONFIGS = st.builds(
    UNetConfig,
    in_channels=st.integers(1, 2),
    depth=st.integers(1, 3),
    base_channels=st.just(4),
    convs_per_level=st.integers(1, 3),
    upsampling=st.sampled_from(
        ["transposed", "transposed_3x3", "nearest", "bilinear", "pixel_shuffle"]
    ),
    norm=st.sampled_from(["batch", None]),
    norm_place=st.sampled_from(
        ["before_activation", "after_activation", "before_convolution"]
    ),
    skip_connections=st.booleans(),
    negative_slope=st.sampled_from([0.0, 0.1]),
    ndim=st.sampled_from([2, 2, 3]),
)


@given(config=CONFIGS, data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_cropped_network_computes_the_wanted_part_of_the_whole(config, data):
    network = trained(config).double()
    unit = 2**config.depth
    sides = [unit * data.draw(st.integers(2, 5)) for _ in range(config.ndim)]
    keep = []
    for side in sides:
        start = data.draw(st.integers(0, side - 1))
        keep.append((start, data.draw(st.integers(start + 1, side))))
    image = torch.randn(1, config.in_channels, *sides, dtype=torch.float64)
    with torch.inference_mode():
        whole = network(image)
        part = network(image, cropping(config, keep, sides))
    for axis, (start, stop) in enumerate(keep, start=2):
        whole = whole.narrow(axis, start, stop - start)
    torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


def test_added_skips_are_cropped_too():
    blocks = ((4,), (4,), (4,), (4,), (4,))
    config = UNetConfig(
        depth=2, base_channels=4, convs_per_level=1, skips="add", blocks=blocks,
        ups=(4, 0), upsampling="nearest",
    )  # fmt: skip
    network = trained(config).double()
    image = torch.randn(1, 1, 32, 48, dtype=torch.float64)
    with torch.inference_mode():
        whole = network(image)[..., 9:12, 17:40]
        part = network(image, cropping(config, [(9, 12), (17, 40)], [32, 48]))
    torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


def test_the_finest_level_is_computed_only_where_it_is_wanted():
    config = UNetConfig(depth=4, base_channels=4)
    crop = cropping(config, [(96, 160), (96, 160)], [256, 256])
    assert crop.skip[-1] == ((94, 162), (94, 162))  # two 3x3 convolutions
    below = crop.below[-1][0]
    assert below[1] - below[0] == 34


@pytest.mark.parametrize(
    "change",
    [
        {"padding": "valid"},
        {"upsampling": "unpool"},
        {"norm": "group"},
        {"norm": "instance"},
        {"upsampling": "bilinear", "align_corners": True},
    ],
)
def test_networks_that_need_all_of_a_map_are_not_cropped(change):
    assert can_crop(UNetConfig())
    assert not can_crop(replace(UNetConfig(), **change))


@given(config=CONFIGS)
@settings(deadline=None, max_examples=40)
def test_folding_batch_norms_changes_nothing(config):
    network = trained(config)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold(network)
    image = torch.randn(1, config.in_channels, *[4 << config.depth] * config.ndim)
    with torch.inference_mode():
        expected = network(image)
        torch.testing.assert_close(folded(image), expected, rtol=1e-4, atol=1e-4)
    norms = [m for m in folded.modules() if "BatchNorm" in type(m).__name__]
    assert bool(norms) == (
        config.norm is not None and config.norm_place != "before_activation"
    )
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
