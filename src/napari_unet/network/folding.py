"""Batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from napari_unet.network.unet import UNet

__all__ = ["fold_norms"]

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def fold_norms(network: UNet) -> UNet:
    """Return a copy in which batch norms are part of the convolutions before them.

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
    return folded
