"""A network made ready to run fast: the same function, in other numbers."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from napari_unet.network.unet import UNet

__all__ = [
    "fold",
    "join_upsampling",
    "joining_saves",
    "split_first",
    "split_values",
]

Convolution = nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose2d | nn.ConvTranspose3d

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def fold(network: UNet) -> UNet:
    """Return a copy that computes the same in fewer steps.

    Batch norms become part of the convolutions before them, and where values are
    repeated and convolved a transposed convolution does both.

    Parameters
    ----------
    network : UNet
        Left as it is. A norm that does not directly follow a convolution stays: the
        zeros around the map lie between them.

    Returns
    -------
    UNet
        In evaluation mode, without gradients; equal to the network but for rounding.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for block in [*folded.encoder, folded.bottleneck, *folded.decoder]:
        layers: list[nn.Module] = []
        for layer in block:
            before = layers[-1] if layers else None
            if isinstance(before, _CONVOLUTIONS) and isinstance(layer, _BATCH_NORMS):
                layers[-1] = fuse_conv_bn_eval(before, layer)
            else:
                layers.append(layer)
        del block[:]
        block.extend(layers)
    up: Any
    for up in folded.up:
        if up.kind == "nearest" and isinstance(up.conv, _CONVOLUTIONS):
            up.kind, up.conv = "transposed_3x3", _repeat_and_convolve(up.conv)
    return folded


def _repeat_and_convolve(conv: Convolution) -> Transposed:
    """Make one layer of repeating every value and a convolution that looks ahead."""
    ndim = conv.weight.ndim - 2
    taps = conv.weight.movedim((1, 0), (-2, -1))
    weight = taps.new_zeros(*[3] * ndim, conv.in_channels, conv.out_channels)
    for tap in itertools.product(range(2), repeat=ndim):
        # What is repeated meets each tap at two places along every axis.
        places = tuple(slice(1 - t, 3 - t) for t in tap)
        weight[places] += taps[tap]
    kind = nn.ConvTranspose2d if ndim == 2 else nn.ConvTranspose3d
    # Without weights of its own, which would be drawn.
    both = kind(conv.in_channels, conv.out_channels, 3, 2, 1, 1, device="meta")
    both.weight = nn.Parameter(weight.movedim((-2, -1), (0, 1)), requires_grad=False)
    both.bias = conv.bias
    return both


def joining_saves(up: Transposed, conv: Convolution) -> bool:
    """Tell whether `join_upsampling` saves multiplications.

    Parameters
    ----------
    up : ConvTranspose2d or ConvTranspose3d
        Of kernel and stride 2.
    conv : Conv2d or Conv3d
        Of kernel 3; its last input channels are those of the upsampled map.
    """
    (before, between), after = up.weight.shape[:2], conv.out_channels
    corners, taps = up.weight[0, 0].numel(), conv.weight[0, 0].numel()
    return corners * before * after < before * between + taps * between * after


def join_upsampling(up: Transposed, conv: Convolution) -> tuple[Tensor, Tensor, Tensor]:
    """Make one transposed convolution of an upsampling and the layer after it.

    Nothing lies between the two but that the upsampled map is joined to a skip
    connection: ``conv(cat([skip, up(x)]))`` is the sum of a convolution of the skip
    and a transposed convolution of x, which needs fewer multiplications.

    Parameters
    ----------
    up : ConvTranspose2d or ConvTranspose3d
        Of kernel and stride 2.
    conv : Conv2d or Conv3d
        Of kernel 3; its last input channels are those of the upsampled map.

    Returns
    -------
    transposed : float32 Tensor of shape (before, after, 4, 4) or (..., 4, 4, 4)
        Kernel of stride 2. Cut ``2 - conv.padding`` from every side of what it gives.
    of_skip : float32 Tensor of shape (after, skip, 3, 3) or (..., 3, 3, 3)
        Kernel of the convolution of the skip.
    bias : float32 Tensor of shape (after,)
        Of the sum. In the row of pixels at the edge of a map it is right only
        if ``conv`` does not pad, or ``up`` has no bias.
    """
    ndim, skip = up.weight.ndim - 2, conv.in_channels - up.out_channels
    of_skip, of_up = conv.weight[:, :skip], conv.weight[:, skip:]
    # One matrix for each place, without gaps between its numbers.
    corners = up.weight.movedim((0, 1), (-2, -1)).contiguous()
    taps = of_up.movedim((1, 0), (-2, -1)).contiguous()
    transposed = taps.new_zeros(*[4] * ndim, up.in_channels, conv.out_channels)
    for corner in itertools.product(range(2), repeat=ndim):
        for tap in itertools.product(range(3), repeat=ndim):
            place = [2 + c - t for c, t in zip(corner, tap, strict=True)]
            transposed[tuple(place)] += corners[corner] @ taps[tap]
    bias = transposed.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    if up.bias is not None:
        bias = bias + of_up.flatten(2).sum(2) @ up.bias
    return transposed.movedim((-2, -1), (0, 1)), of_skip, bias


def split_first(network: UNet, dtype: torch.dtype) -> bool:
    """Let the first convolution take every channel in two parts of 16 bits.

    Nearly all of what 16 bits cost in accuracy is lost where they hold the grey
    values of the image and the weights that meet them; this layer is also the one
    where more bits cost next to nothing.

    Parameters
    ----------
    network : UNet
        Changed in place: it then takes what `split_values` gives.
    dtype : torch.dtype
        Of 16 bits; the weights stay float32, but their values are of this type.

    Returns
    -------
    bool
        Whether that was done: not where the first layer is a norm.
    """
    block = cast("nn.Sequential", network.encoder[0])
    first = block[0]
    if not isinstance(first, _CONVOLUTIONS):
        return False
    high, low = _parts(first.weight, dtype)
    # High times high, low times high, high times low; low times low is nothing.
    weight = torch.cat([high, high, low], dim=1)
    wider = copy.deepcopy(first)
    wider.in_channels = weight.shape[1]
    wider.weight = nn.Parameter(weight, requires_grad=False)
    block[0] = wider
    return True


def split_values(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a network after `split_first` takes.

    Parameters
    ----------
    image : float32 Tensor of shape (batch, channel, *spatial)
        Normalised.
    dtype : torch.dtype
        As for `split_first`.

    Returns
    -------
    float32 Tensor of shape (batch, 3 * channel, *spatial)
        Of values that the type holds.
    """
    high, low = _parts(image, dtype)
    return torch.cat([high, low, high], dim=1)


def _parts(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split into what a type holds and what it holds of the rest."""
    high = values.to(dtype).float()
    return high, (values - high).to(dtype).float()
