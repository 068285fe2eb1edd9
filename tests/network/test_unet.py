"""The network: the paper's shapes, every size, every variant, its initialisation."""

import dataclasses
import itertools
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from napari_unet.errors import BadInput, BadModel
from napari_unet.network.config import NAMED_CONFIGS, UNetConfig
from napari_unet.network.receptive_field import receptive_field
from napari_unet.network.unet import UNet

UPSAMPLINGS = ("transposed", "nearest", "bilinear", "unpool", "pixel_shuffle")
NORMS = ("batch", "group", "instance", None)


def tiny(**options) -> UNet:
    return UNet(**({"base_channels": 2, "depth": 2} | options))


@pytest.fixture(scope="module")
def paper() -> UNet:
    return UNet.from_config(NAMED_CONFIGS["paper-batchnorm"]).eval()


def test_activations_of_the_paper(paper):
    seen = []

    def note(module, inputs, result):
        pooled = inputs[0]
        if module in paper.encoder[1:] or module is paper.bottleneck:
            seen.append((pooled.shape[-1], pooled.shape[1]))
        seen.append((result.shape[-1], result.shape[1]))

    blocks = [*paper.encoder, paper.bottleneck, *paper.decoder]
    hooks = [block.register_forward_hook(note) for block in blocks]
    with torch.inference_mode():
        logits = paper(torch.zeros(1, 1, 572, 572))
    for hook in hooks:
        hook.remove()
    assert seen == [
        (568, 64),
        (284, 64),
        (280, 128),
        (140, 128),
        (136, 256),
        (68, 256),
        (64, 512),
        (32, 512),
        (28, 1024),
        (52, 512),
        (100, 256),
        (196, 128),
        (388, 64),
    ]
    assert logits.shape == (1, 2, 388, 388)


def count_weights(network: UNet) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameters_of_the_paper(paper):
    assert count_weights(paper) == paper.config.weights == 31_036_546


def test_concatenation_puts_the_skip_in_front(paper):
    # Figure 1 of the paper: 1024 channels go into the first decoder block.
    assert paper.decoder[0][0].in_channels == 1024
    assert paper.decoder[0][0].out_channels == 512


def test_an_illegal_side_is_refused_with_a_legal_one(paper):
    with pytest.raises(BadInput, match=r"576 pixels.* use 588 \(always 12 more .* 16"):
        paper(torch.zeros(1, 1, 572, 576))


@pytest.mark.parametrize("side", [1, 187, 189])
def test_a_valid_network_names_its_smallest_side(paper, side):
    legal = 188 if side < 188 else 204
    with pytest.raises(BadInput, match=f"use {legal}"):
        paper(torch.zeros(1, 1, side, 188))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("upsampling", ["transposed", "nearest", "bilinear"])
@pytest.mark.parametrize(("depth", "convs"), [(1, 1), (2, 2), (3, 1)])
def test_every_legal_side_works_and_no_other(ndim, upsampling, depth, convs):
    network = tiny(
        depth=depth,
        convs_per_level=convs,
        padding="valid",
        upsampling=upsampling,
        ndim=ndim,
        norm=None,
    ).eval()
    field = receptive_field(network.config)
    smallest = field.input_size(1)
    fixed = [smallest] * (ndim - 1)
    for side in range(1, smallest + 2 * field.alignment + 1):
        image = torch.zeros(1, 1, *fixed, side)
        if side >= smallest and (side - smallest) % field.alignment == 0:
            assert network(image).shape[-1] == side - 2 * field.shrink
        else:
            with pytest.raises(BadInput, match=f"use {field.input_size(side)} "):
                network(image)


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_any_size_with_same_padding(data):
    ndim = data.draw(st.sampled_from([2, 3]), "ndim")
    largest = 40 if ndim == 2 else 12
    shape = data.draw(st.tuples(*[st.integers(1, largest)] * ndim), "shape")
    network = tiny(
        depth=data.draw(st.integers(1, 3), "depth"),
        upsampling=data.draw(st.sampled_from(UPSAMPLINGS), "upsampling"),
        norm=data.draw(st.sampled_from(NORMS), "norm"),
        align_corners=data.draw(st.booleans(), "align_corners"),
        ndim=ndim,
    ).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, 1, *shape))
    assert logits.shape == (2, 2, *shape)
    assert torch.isfinite(logits).all()


COMBINATIONS = [
    combination
    for combination in itertools.product(
        [2, 3], ("same", "valid"), UPSAMPLINGS, NORMS, (True, False), (1, 2)
    )
    if combination[1:3] != ("valid", "unpool")
]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_all_combinations_run_forwards_and_backwards(ndim, padding):
    count = 0
    for combination in COMBINATIONS:
        if combination[:2] != (ndim, padding):
            continue
        _, _, upsampling, norm, skips, convs = combination
        network = UNet(
            2,
            3,
            base_channels=2,
            depth=1 if ndim == 3 else 2,
            padding=padding,
            upsampling=upsampling,
            norm=norm,
            skip_connections=skips,
            convs_per_level=convs,
            dropout=0.1,
            ndim=ndim,
        )
        assert count_weights(network) == network.config.weights, combination
        field = receptive_field(network.config)
        side = field.input_size(2 * field.shrink + 8)
        image = torch.randn(2, 2, *[side] * ndim)
        logits = network(image)
        assert logits.shape == (2, 3, *[side - 2 * field.shrink] * ndim), combination
        logits.square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, (combination, name)
            assert torch.isfinite(parameter.grad).all(), (combination, name)
        count += 1
    assert count == (80 if padding == "same" else 64)


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_upsampling_keeps_things_in_place(upsampling, ndim):
    """A decoder that passes a bright block on must not move, mirror or swap it."""
    network = tiny(
        depth=1,
        base_channels=1,
        convs_per_level=1,
        upsampling=upsampling,
        skip_connections=False,
        norm=None,
        ndim=ndim,
        num_classes=1,
    ).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
                module.weight.zero_()
                if module.kernel_size[0] == 3:
                    module.weight[(..., *[1] * ndim)] = 1  # the identity
                elif module.kernel_size[0] == 2 and upsampling == "nearest":
                    module.weight[(..., *[0] * ndim)] = 1
                else:
                    module.weight.fill_(1)
            if isinstance(module, nn.ConvTranspose3d):
                module.weight.fill_(1)
    image = torch.zeros(1, 1, *[12, 10, 8][:ndim])
    block = (slice(4, 6), slice(2, 4), slice(4, 6))[:ndim]
    image[(0, 0, *block)] = 1
    with torch.inference_mode():
        result = network(image)[0, 0]
    place = torch.nonzero(result == result.max()).tolist()
    inside = list(itertools.product(*[range(s.start, s.stop) for s in block]))
    if upsampling == "unpool":  # all four are equal maxima; one place is kept
        assert len(place) == 1
        assert tuple(place[0]) in inside
    else:
        assert [tuple(p) for p in place] == inside


def test_pixel_shuffle_equals_torchs_own_in_2d():
    from napari_unet.network.blocks import _pixel_shuffle

    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(_pixel_shuffle(x), nn.functional.pixel_shuffle(x, 2))


def test_pixel_shuffle_in_3d_interleaves_every_axis():
    from napari_unet.network.blocks import _pixel_shuffle

    x = torch.arange(16 * 2 * 3 * 4).reshape(1, 16, 2, 3, 4)
    shuffled = _pixel_shuffle(x)
    assert shuffled.shape == (1, 2, 4, 6, 8)
    for c, z, y, x_ in itertools.product(range(2), range(4), range(6), range(8)):
        channel = c * 8 + (z % 2) * 4 + (y % 2) * 2 + x_ % 2
        assert shuffled[0, c, z, y, x_] == x[0, channel, z // 2, y // 2, x_ // 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 0),
        ("in_channels", -1),
        ("in_channels", 1.0),
        ("in_channels", "1"),
        ("in_channels", True),
        ("num_classes", 0),
        ("num_classes", 10**9),
        ("depth", 0),
        ("depth", 9),
        ("depth", None),
        ("base_channels", 0),
        ("base_channels", 10**6),
        ("convs_per_level", 0),
        ("convs_per_level", 9),
        ("convs_per_level", 2.0),
        ("padding", "full"),
        ("padding", None),
        ("upsampling", "bicubic"),
        ("upsampling", ["nearest"]),
        ("norm", "layer"),
        ("norm", ""),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", math.nan),
        ("dropout", "0.5"),
        ("ndim", 1),
        ("ndim", 4),
        ("ndim", 2.0),
        ("skip_connections", "no"),
        ("align_corners", None),
    ],
)
def test_a_wrong_option_is_named(name, value):
    with pytest.raises(BadModel, match=f"{name}="):
        UNetConfig(**{name: value})


def test_unpool_with_valid_padding_is_refused():
    with pytest.raises(BadModel, match="needs padding='same'"):
        UNetConfig(padding="valid", upsampling="unpool")


def test_an_unknown_option_in_a_file_is_named():
    with pytest.raises(BadModel, match=r"\['attention'\].*newer napari-unet"):
        UNetConfig.from_dict({"attention": True})


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_a_config_survives_json(name):
    config = NAMED_CONFIGS[name]
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_named_configurations_are_what_they_say():
    named = NAMED_CONFIGS
    assert set(named) >= {
        "default",
        "paper",
        "paper-batchnorm",
        "padded-bilinear",
        "small",
        "repeat-conv",
    }
    paper = named["paper"]
    assert (paper.padding, paper.upsampling, paper.norm) == (
        "valid",
        "transposed",
        None,
    )
    assert (paper.dropout, paper.base_channels, paper.depth) == (0.5, 64, 4)
    assert named["paper-batchnorm"] == dataclasses.replace(
        paper, norm="batch", dropout=0.0
    )
    bilinear = named["padded-bilinear"]
    assert (bilinear.depth, bilinear.padding, bilinear.upsampling) == (
        3,
        "same",
        "bilinear",
    )
    small = named["small"]
    assert (small.convs_per_level, small.base_channels, small.depth) == (1, 16, 3)
    assert small.num_classes == 1
    assert named["repeat-conv"].upsampling == "nearest"


def test_convolutions_before_a_norm_have_no_bias():
    for norm in NORMS:
        for block in (tiny(norm=norm).encoder[0], tiny(norm=norm, ndim=3).decoder[0]):
            assert (block[0].bias is None) == (norm is not None)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_he_initialisation(ndim, upsampling):
    """std is sqrt(2 / N), N the incoming nodes of one neuron (section 3)."""
    torch.manual_seed(0)
    network = UNet(
        3, 2, depth=2, base_channels=24, upsampling=upsampling, norm=None, ndim=ndim
    )
    checked = 0
    for name, module in network.named_modules():
        if not hasattr(module, "weight"):
            continue
        transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
        # Kernel and stride of a transposed one are 2: one place per input channel.
        kernel = 1 if transposed else math.prod(module.kernel_size)
        wanted = math.sqrt(2 / (module.in_channels * kernel))
        weight = module.weight.detach()
        error = 5 / math.sqrt(2 * weight.numel())  # five standard errors
        assert abs(float(weight.std()) / wanted - 1) < error, name
        assert abs(float(weight.mean())) < 5 * wanted / math.sqrt(weight.numel()), name
        assert not module.bias.any(), name
        checked += 1
    assert checked == 13


def test_activations_neither_vanish_nor_explode_at_the_start():
    torch.manual_seed(0)
    network = UNet(1, 2, depth=4, base_channels=16, norm=None)
    spread = []
    for block in [*network.encoder, network.bottleneck, *network.decoder]:
        block.register_forward_hook(lambda m, i, out: spread.append(out.std().item()))
    with torch.inference_mode():
        network(torch.randn(1, 1, 64, 64))
    assert 0.05 < min(spread)
    assert max(spread) < 20


def test_dropout_only_while_training():
    torch.manual_seed(0)
    network = tiny(dropout=0.5, norm=None)
    image = torch.randn(1, 1, 32, 32)
    network.eval()
    assert torch.equal(network(image), network(image))
    network.train()
    assert not torch.equal(network(image), network(image))
    assert tiny(dropout=0.0, norm=None).train().dropout.p == 0


def test_dropout_sits_at_the_end_of_the_contracting_path():
    network = tiny(dropout=0.5, depth=3)
    seen = []
    network.dropout.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    network(torch.randn(2, 1, 32, 32))
    assert seen == [8, 16]


def test_skip_connections_carry_the_fine_detail():
    """Without skips the finest level sees nothing finer than the bottom allows."""
    image = torch.randn(1, 1, 16, 16)
    for skips in (True, False):
        network = tiny(skip_connections=skips, norm=None).eval()
        with torch.no_grad():
            network.bottleneck[0].weight.zero_()
            constant = torch.equal(network(image), network(image + 1))
        assert constant != skips


def test_compiles_in_one_graph():
    torch.manual_seed(0)
    network = UNet(1, 2, base_channels=4).eval()
    image = torch.randn(1, 1, 48, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(image), network(image))


def test_exports():
    torch.manual_seed(0)
    network = UNet(1, 2, base_channels=4).eval()
    image = torch.randn(1, 1, 48, 32)
    with warnings.catch_warnings():
        # Of torch's own export.
        warnings.simplefilter("ignore", DeprecationWarning)
        exported = torch.export.export(network, (image,))
    with torch.inference_mode():
        other = torch.randn(1, 1, 48, 32)
        torch.testing.assert_close(exported.module()(other), network(other))
