"""The U-Net: every variant that the package builds, trains and loads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from napari_unet.errors import BadInput
from napari_unet.network.blocks import (
    ConvBlock,
    Up,
    conv_type,
    crop_to,
    narrow,
    pad_to,
    prefer_first,
)
from napari_unet.network.config import UNetConfig

if TYPE_CHECKING:
    from napari_unet.network.cropping import Cropping


class UNet(nn.Module):
    """U-Net (Ronneberger, Fischer & Brox 2015, figure 1) and its common variants.

    Parameters
    ----------
    in_channels, num_classes
        See :class:`UNetConfig`.
    **options
        The further fields of :class:`UNetConfig`.

    Examples
    --------
    >>> network = UNet(1, 2, depth=2, base_channels=4)
    >>> network(torch.zeros(1, 1, 33, 20)).shape
    torch.Size([1, 2, 33, 20])
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 2, **options: Any):
        super().__init__()
        config = UNetConfig(in_channels, num_classes, **options)
        self.config = config
        blocks, channels = config.block_widths, in_channels
        self.encoder = nn.ModuleList()
        for block in blocks[: config.depth]:
            self.encoder.append(ConvBlock(config, channels, block))
            channels = block[-1]
        if config.bridge:
            bare = 1 if config.padding == "same" else 0
            conv = conv_type(config.ndim)
            self.bridge = conv(channels, config.bridge, 3, padding=bare)
            channels = config.bridge
        self.bottleneck = ConvBlock(config, channels, blocks[config.depth])
        # From the bottom up, in the order in which they run.
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for index, (before, after, skip) in enumerate(config.joints):
            convolved = config.ups is None or config.ups[index] > 0
            self.up.append(Up(config, before, after if convolved else 0))
            joined = after + skip if config.skips == "concat" else after
            block = blocks[config.depth + 1 + index]
            self.decoder.append(ConvBlock(config, joined, block))
            channels = (block or (joined,))[-1]
        self.head = conv_type(config.ndim)(channels, num_classes, 1)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    @classmethod
    def from_config(cls, config: UNetConfig) -> UNet:
        """Build an untrained network from its configuration."""
        return cls(**config.to_dict())

    def forward(self, image: Tensor, cropping: Cropping | None = None) -> Tensor:
        """Compute the logits.

        Parameters
        ----------
        image : Tensor of shape (batch, in_channels, *spatial)
            Any size with ``padding="same"``; with ``padding="valid"`` a size
            that can be halved at every level.
        cropping : Cropping, optional
            The part of the output that is wanted, so that less is computed;
            everything by default. Sides must then be multiples of ``2**depth``.

        Returns
        -------
        Tensor of shape (batch, num_classes, *spatial)
            Smaller than the image with ``padding="valid"``.

        Raises
        ------
        BadInput
            If a valid network cannot halve this size, or nothing would be left.
        """
        config = self.config
        wanted = list(image.shape[2:])
        if config.padding == "same":
            x = pad_to(image, [max(side, config.smallest_side) for side in wanted])
        else:
            if not torch.compiler.is_compiling():
                self._check_valid(wanted)
            x = image
        x, maps, places = self._contract(x)
        logits = self._expand(x, maps, places, cropping)
        if config.padding == "same" and cropping is None:
            logits = narrow(logits, [(0, side) for side in wanted])
        return logits

    def _contract(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Run the contracting path; also return the skips and the places of maxima."""
        maps: list[Tensor] = []
        places: list[Tensor | None] = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            if level == self.config.depth - 1:
                x = self.dropout(x)
            maps.append(x)
            x, indices = self._pool(x)
            places.append(indices)
        if self.config.bridge:
            x = self.bridge(x)
        return self.dropout(self.bottleneck(x)), maps, places

    def _expand(
        self,
        x: Tensor,
        maps: list[Tensor],
        places: list[Tensor | None],
        cropping: Cropping | None,
    ) -> Tensor:
        """Run the expanding path, which empties the lists, and the last layer."""
        config = self.config
        for step, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            skip = maps.pop()
            if cropping:
                x = narrow(x, cropping.below[step])
            size = list(skip.shape[2:])
            x = up(x, size, places.pop())
            if cropping:
                x = narrow(x, cropping.upsampled[step])
                skip = narrow(skip, cropping.skip[step])
            elif config.padding == "same":
                x = pad_to(x, size)
            if config.skip_connections:
                skip = crop_to(skip, list(x.shape[2:]))
                x = x + skip if config.skips == "add" else torch.cat([skip, x], dim=1)
            del skip  # its memory, before what the block needs
            x = block(x)
        logits: Tensor = self.head(x)
        # After it, because these maps are few.
        return narrow(logits, cropping.kept) if cropping else logits

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        is_2d = self.config.ndim == 2
        if self.config.upsampling == "unpool":
            ranked = prefer_first(x)
            if is_2d:
                _, indices = functional.max_pool2d_with_indices(ranked, [2, 2])
            else:
                _, indices = functional.max_pool3d_with_indices(ranked, [2, 2, 2])
            return x.flatten(2).gather(2, indices.flatten(2)).view_as(indices), indices
        return (functional.max_pool2d if is_2d else functional.max_pool3d)(x, 2), None

    def _check_valid(self, sides: list[int]) -> None:
        from napari_unet.network.receptive_field import receptive_field

        field = receptive_field(self.config)
        for side in sides:
            legal = field.input_size(side)
            if legal != side:
                raise BadInput(
                    f"A valid U-Net of depth {self.config.depth} cannot halve a side "
                    f"of {side} pixels at every level; use {legal} "
                    f"(always {field.remainder} more than a multiple of "
                    f"{field.alignment})."
                )

    def _initialise(self) -> None:
        """Draw weights as in the paper, section 3: std sqrt(2 / incoming nodes)."""
        if self.head.weight.is_meta:
            return  # to be loaded; and torch imports its compiler to draw nothing
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
                # Kernel equals stride, so a pixel sees each input channel once.
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_channels))
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
