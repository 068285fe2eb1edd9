"""Networks in other numbers: the same function."""

import pytest
import torch
from torch import nn

from napari_unet.network.folding import fold, join_upsampling, joining_saves
from napari_unet.network.unet import UNet


def layers(ndim: int, padding: int, *, skip=3, before=8, between=4, after=5):
    """An upsampling and the convolution after it, with uneven weights."""
    torch.manual_seed(ndim)
    transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)[ndim - 2]
    convolution = (nn.Conv2d, nn.Conv3d)[ndim - 2]
    up = transposed(before, between, 2, 2)
    return up, convolution(skip + between, after, 3, padding=padding)


def in_one(up, conv, x, skip):
    """What `join_upsampling` makes of them, put together as it says."""
    transposed, of_skip, bias = join_upsampling(up, conv)
    is_2d = x.ndim == 4
    deconvolve, convolve = (
        (nn.functional.conv_transpose2d, nn.functional.conv2d)
        if is_2d
        else (nn.functional.conv_transpose3d, nn.functional.conv3d)
    )
    upsampled = deconvolve(x, transposed, stride=2, padding=2 - conv.padding[0])
    return upsampled + convolve(skip, of_skip, bias, padding=conv.padding)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@torch.inference_mode()
def test_an_upsampling_and_the_next_layer_are_one(ndim, padding):
    up, conv = layers(ndim, padding)
    sides = [4, 6, 5][:ndim]
    x = torch.randn(2, 8, *sides)
    skip = torch.randn(2, 3, *[2 * side for side in sides])
    expected = conv(torch.cat([skip, up(x)], dim=1))
    found = in_one(up, conv, x, skip)
    assert found.shape == expected.shape
    inner = (..., *[slice(padding, side - padding) for side in expected.shape[2:]])
    torch.testing.assert_close(found[inner], expected[inner], atol=1e-5, rtol=1e-5)
    if padding:
        assert (found - expected).abs().max() > 1e-3  # as documented, at the edge
        nn.init.zeros_(up.bias)
        torch.testing.assert_close(
            in_one(up, conv, x, skip),
            conv(torch.cat([skip, up(x)], dim=1)),
            atol=1e-5,
            rtol=1e-5,
        )


def test_layers_without_bias_are_joined():
    up, conv = layers(2, 1)
    up.bias = conv.bias = None
    x, skip = torch.randn(1, 8, 4, 4), torch.randn(1, 3, 8, 8)
    expected = conv(torch.cat([skip, up(x)], dim=1))
    torch.testing.assert_close(in_one(up, conv, x, skip), expected)


def test_only_what_saves_multiplications_is_joined():
    up, conv = layers(2, 1, before=16, between=8, after=8)
    assert joining_saves(up, conv)
    narrow, conv = layers(2, 1, before=16, between=2, after=8)
    assert not joining_saves(narrow, conv)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
@torch.inference_mode()
def test_repeating_and_convolving_are_one(ndim, padding):
    """Also at the far edge, where the convolution looks at nothing."""
    torch.manual_seed(0)
    network = UNet(
        *(1, 2),
        depth=1,
        base_channels=3,
        upsampling="nearest",
        padding=padding,
        ndim=ndim,
    )
    network.eval()
    random = torch.get_rng_state()
    folded = fold(network)
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(folded.up[0].conv, nn.ConvTranspose2d | nn.ConvTranspose3d)
    assert isinstance(network.up[0].conv, nn.Conv2d | nn.Conv3d)
    image = torch.randn(2, 1, *[20, 24, 22][:ndim])
    torch.testing.assert_close(folded(image), network(image), atol=1e-5, rtol=1e-5)
