"""Other people's U-Nets, written anew from their published structure.

Only what their state dicts and outputs depend on: the names of the layers, the order
of the operations, how maps are padded and joined.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


def _dims(ndim):
    if ndim == 2:
        return nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d
    return nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.MaxPool3d


class Wrap(nn.Module):
    """A module that holds others under given names and calls the first."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return next(iter(self.children()))(x)


def pad_like(x, skip):
    gaps = [(b - a) for a, b in zip(x.shape[2:], skip.shape[2:], strict=True)]
    return functional.pad(
        x, [n for gap in reversed(gaps) for n in (gap // 2, gap - gap // 2)]
    )


def crop_like(skip, x):
    starts = [(a - b) // 2 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True)]
    inside = [slice(s, s + n) for s, n in zip(starts, x.shape[2:], strict=True)]
    return skip[(..., *inside)]


class Milesial(nn.Module):
    """milesial/Pytorch-UNet: DoubleConv, Down, Up, OutConv."""

    def __init__(self, n_channels, n_classes, bilinear=False, width=4, bias=False):
        super().__init__()
        self.bilinear = bilinear

        def double(start, end, middle=None):
            middle = middle or end
            return Wrap(
                double_conv=nn.Sequential(
                    nn.Conv2d(start, middle, 3, padding=1, bias=bias),
                    nn.BatchNorm2d(middle),
                    nn.ReLU(),
                    nn.Conv2d(middle, end, 3, padding=1, bias=bias),
                    nn.BatchNorm2d(end),
                    nn.ReLU(),
                )
            )

        factor = 2 if bilinear else 1
        widths = [width << level for level in range(5)]
        widths[-1] //= factor
        self.inc = double(n_channels, width)
        for step, (start, end) in enumerate(pairwise(widths), start=1):
            pooled = nn.Sequential(nn.MaxPool2d(2), double(start, end))
            self.add_module(f"down{step}", Wrap(maxpool_conv=pooled))
        for step in range(1, 5):
            start = width << (5 - step)
            end = start // 2 // (factor if step < 4 else 1)
            if bilinear:
                up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                conv = double(start, end, start // 2)
            else:
                up = nn.ConvTranspose2d(start, start // 2, 2, stride=2)
                conv = double(start, end)
            self.add_module(f"up{step}", Wrap(up=up, conv=conv))
        self.outc = Wrap(conv=nn.Conv2d(width, n_classes, 1))

    def forward(self, x):
        maps = [self.inc(x)]
        for step in range(1, 5):
            maps.append(getattr(self, f"down{step}")(maps[-1]))
        x = maps.pop()
        for step in range(1, 5):
            up = getattr(self, f"up{step}")
            skip = maps.pop()
            x = up.conv(torch.cat([skip, pad_like(up.up(x), skip)], dim=1))
        return self.outc(x)


class OldMilesial(nn.Module):
    """milesial/Pytorch-UNet before 2019: other names, half the channels upsampled."""

    def __init__(self, n_channels, n_classes, bilinear=True, width=4):
        super().__init__()

        def double(start, end):
            return Wrap(
                conv=nn.Sequential(
                    nn.Conv2d(start, end, 3, padding=1),
                    nn.BatchNorm2d(end),
                    nn.ReLU(),
                    nn.Conv2d(end, end, 3, padding=1),
                    nn.BatchNorm2d(end),
                    nn.ReLU(),
                )
            )

        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.inc = Wrap(conv=double(n_channels, width))
        for step, (start, end) in enumerate(pairwise(widths), start=1):
            pooled = nn.Sequential(nn.MaxPool2d(2), double(start, end))
            self.add_module(f"down{step}", Wrap(mpconv=pooled))
        for step, end in enumerate([*widths[-3::-1], width], start=1):
            half = widths[4 - step]
            if bilinear:
                up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            else:
                up = nn.ConvTranspose2d(half, half, 2, stride=2)
            self.add_module(f"up{step}", Wrap(up=up, conv=double(2 * half, end)))
        self.outc = Wrap(conv=nn.Conv2d(width, n_classes, 1))

    forward = Milesial.forward


class PathUNet(nn.Module):
    """jvanvugt/pytorch-unet: ReLU before the norm, the upsampled map first."""

    def __init__(self, inputs=1, outputs=2, depth=4, wf=2, norm=True, mode="upconv"):
        super().__init__()

        def block(start, end):
            layers = []
            for first in (start, end):
                layers += [nn.Conv2d(first, end, 3, padding=1), nn.ReLU()]
                layers += [nn.BatchNorm2d(end)] if norm else []
            return Wrap(block=nn.Sequential(*layers))

        widths = [inputs, *(2 ** (wf + level) for level in range(depth))]
        self.down_path = nn.ModuleList(block(*pair) for pair in pairwise(widths))
        self.up_path = nn.ModuleList()
        for start, end in pairwise(widths[:0:-1]):
            if mode == "upconv":
                up = nn.ConvTranspose2d(start, end, 2, stride=2)
            else:
                grow = nn.Upsample(mode="bilinear", scale_factor=2)
                up = nn.Sequential(grow, nn.Conv2d(start, end, 1))
            self.up_path.append(Wrap(up=up, conv_block=block(start, end)))
        self.last = nn.Conv2d(widths[1], outputs, 1)

    def forward(self, x):
        maps = []
        for down in self.down_path:
            x = down(functional.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        maps.pop()
        for part in self.up_path:
            x = part.conv_block(torch.cat([part.up(x), maps.pop()], 1))
        return self.last(x)


class Buda(nn.Module):
    """mateuszbuda/brain-segmentation-pytorch; ends in a sigmoid."""

    def __init__(self, in_channels=3, out_channels=1, features=4):
        super().__init__()
        widths = [in_channels, *(features << level for level in range(5))]
        for level in range(1, 5):
            block = self._block(widths[level - 1], widths[level], f"enc{level}")
            self.add_module(f"encoder{level}", block)
        self.bottleneck = self._block(widths[4], widths[5], "bottleneck")
        for level in (4, 3, 2, 1):
            up = nn.ConvTranspose2d(widths[level + 1], widths[level], 2, 2)
            self.add_module(f"upconv{level}", up)
            block = self._block(2 * widths[level], widths[level], f"dec{level}")
            self.add_module(f"decoder{level}", block)
        self.conv = nn.Conv2d(features, out_channels, 1)

    @staticmethod
    def _block(start, end, name):
        parts = OrderedDict()
        for n in (1, 2):
            conv = nn.Conv2d(start if n == 1 else end, end, 3, padding=1, bias=False)
            parts[f"{name}conv{n}"] = conv
            parts[f"{name}norm{n}"] = nn.BatchNorm2d(end)
            parts[f"{name}relu{n}"] = nn.ReLU()
        return nn.Sequential(parts)

    def forward(self, x):
        maps = []
        for level in range(1, 5):
            maps.append(getattr(self, f"encoder{level}")(x))
            x = functional.max_pool2d(maps[-1], 2)
        x = self.bottleneck(x)
        for level in (4, 3, 2, 1):
            x = torch.cat((getattr(self, f"upconv{level}")(x), maps.pop()), dim=1)
            x = getattr(self, f"decoder{level}")(x)
        return torch.sigmoid(self.conv(x))


class Segmentify(nn.Module):
    """segmentify: norm after the ReLU, decoder blocks before upsampling, sums."""

    def __init__(self, dims=1, num_kernel=4):
        super().__init__()
        widths = [dims, *(num_kernel << level for level in range(5))]
        for level in range(1, 5):
            conv = self._conv(widths[level - 1], widths[level])
            self.add_module(f"encode_{level}", Wrap(conv=conv))
        self.bridge = nn.Conv2d(widths[4], widths[5], 3, padding=1)
        for level in (4, 3, 2, 1):
            width = widths[level]
            conv_t = nn.ConvTranspose2d(width, width, 3, 2, 1, output_padding=1)
            conv = self._conv(widths[level + 1], width)
            self.add_module(f"decode_{level}", Wrap(conv=conv, conv_t=conv_t))
        self.segment = nn.Conv2d(num_kernel, 1, 1)

    @staticmethod
    def _conv(start, end):
        layers = []
        for first in (start, end):
            layers += [nn.Conv2d(first, end, 3, padding=1), nn.ReLU()]
            layers.append(nn.BatchNorm2d(end))
        return Wrap(conv_block=nn.Sequential(*layers))

    def forward(self, x):
        maps = []
        for level in range(1, 5):
            maps.append(getattr(self, f"encode_{level}").conv(x))
            x = functional.max_pool2d(maps[-1], 2)
        x = self.bridge(x)
        for level in (4, 3, 2, 1):
            decode = getattr(self, f"decode_{level}")
            x = decode.conv_t(decode.conv(x)) + maps.pop()
        return torch.sigmoid(self.segment(x))


class Classic(nn.Module):
    """down_convolution_1 … up_convolution_4, out: no norm, the upsampled map first."""

    def __init__(self, in_channels=1, num_classes=3, width=4):
        super().__init__()

        def double(start, end):
            return Wrap(
                conv_op=nn.Sequential(
                    nn.Conv2d(start, end, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(end, end, 3, padding=1),
                    nn.ReLU(),
                )
            )

        widths = [in_channels, *(width << level for level in range(5))]
        for level in range(1, 5):
            conv = double(widths[level - 1], widths[level])
            self.add_module(f"down_convolution_{level}", Wrap(conv=conv))
        self.bottle_neck = double(widths[4], widths[5])
        for step in range(1, 5):
            start, end = widths[6 - step], widths[5 - step]
            up = nn.ConvTranspose2d(start, start // 2, 2, 2)
            part = Wrap(up=up, conv=double(start, end))
            self.add_module(f"up_convolution_{step}", part)
        self.out = nn.Conv2d(width, num_classes, 1)

    def forward(self, x):
        maps = []
        for level in range(1, 5):
            maps.append(getattr(self, f"down_convolution_{level}")(x))
            x = functional.max_pool2d(maps[-1], 2)
        x = self.bottle_neck(x)
        for step in range(1, 5):
            part = getattr(self, f"up_convolution_{step}")
            x = part.conv(torch.cat([part.up(x), maps.pop()], 1))
        return self.out(x)


class TorchEM(nn.Module):
    """torch-em / bioimage.io: the norm first, bilinear interpolation, 1x1."""

    def __init__(self, ndim, norm, in_channels=1, outputs=2, depth=3, features=4):
        super().__init__()
        conv = _dims(ndim)[0]
        self.mode = "bilinear" if ndim == 2 else "trilinear"
        norms = {
            "InstanceNorm": nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d,
            "BatchNorm": nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d,
        }

        def block(start, end):
            layers = []
            for first in (start, end):
                layers += [norms[norm](first)] if norm else []
                layers += [conv(first, end, 3, padding=1), nn.ReLU()]
            return Wrap(block=nn.Sequential(*layers))

        widths = [features << level for level in range(depth + 1)]
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.blocks = nn.ModuleList(
            block(*pair) for pair in pairwise([in_channels, *widths[:-1]])
        )
        self.base = block(*widths[-2:])
        up = list(pairwise(widths[::-1]))
        self.decoder.blocks = nn.ModuleList(block(*pair) for pair in up)
        self.decoder.samplers = nn.ModuleList(Wrap(conv=conv(*p, 1)) for p in up)
        self.out_conv = conv(widths[0], outputs, 1)
        self.pool = functional.max_pool2d if ndim == 2 else functional.max_pool3d

    def forward(self, x):
        maps = []
        for block in self.encoder.blocks:
            maps.append(block(x))
            x = self.pool(maps[-1], 2)
        x = self.base(x)
        parts = zip(self.decoder.samplers, self.decoder.blocks, strict=True)
        for sampler, block in parts:
            x = functional.interpolate(
                x, scale_factor=2, mode=self.mode, align_corners=False
            )
            x = block(torch.cat([sampler(x), maps.pop()], dim=1))
        return self.out_conv(x)


class Monai(nn.Module):
    """MONAI BasicUNet: convolution, norm, LeakyReLU(0.1); six feature numbers."""

    def __init__(self, ndim, norm, inputs=1, outputs=2, features=(4, 4, 8, 8, 16, 6)):
        super().__init__()
        conv, transposed = _dims(ndim)[:2]
        instance = nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d
        batch = _dims(ndim)[2]

        def one(start, end):
            kind = instance(end, affine=True) if norm == "instance" else batch(end)
            adn = nn.Sequential(OrderedDict(N=kind, A=nn.LeakyReLU(0.1)))
            layers = OrderedDict(conv=conv(start, end, 3, padding=1), adn=adn)
            return nn.Sequential(layers)

        def two(start, end):
            return nn.Sequential(
                OrderedDict(conv_0=one(start, end), conv_1=one(end, end))
            )

        self.pool = _dims(ndim)[3](2)
        self.conv_0 = two(inputs, features[0])
        for level in range(1, 5):
            part = Wrap(convs=two(features[level - 1], features[level]))
            self.add_module(f"down_{level}", part)
        start = features[4]
        for level in (4, 3, 2, 1):
            skip = features[level - 1]
            end = skip if level > 1 else features[5]
            half = start if level == 1 else start // 2
            upsample = nn.Sequential(OrderedDict(deconv=transposed(start, half, 2, 2)))
            convs = two(skip + half, end)
            self.add_module(f"upcat_{level}", Wrap(upsample=upsample, convs=convs))
            start = end
        self.final_conv = conv(features[5], outputs, 1)

    def forward(self, x):
        maps = [self.conv_0(x)]
        for level in range(1, 5):
            maps.append(getattr(self, f"down_{level}").convs(self.pool(maps[-1])))
        x = maps.pop()
        for level in (4, 3, 2, 1):
            part = getattr(self, f"upcat_{level}")
            x = part.convs(torch.cat([maps.pop(), part.upsample(x)], dim=1))
        return self.final_conv(x)


class Walkthrough(nn.Module):
    """downsample_0 … upsample_3, output: valid convolutions and batch norm."""

    def __init__(self, inputs=1, outputs=2, width=4):
        super().__init__()

        def double(start, end):
            parts = OrderedDict()
            for n, first in enumerate((start, end)):
                parts[f"conv_{n}"] = nn.Conv2d(first, end, 3)
                parts[f"bn_{n}"] = nn.BatchNorm2d(end)
                parts[f"relu_{n}"] = nn.ReLU()
            return nn.Sequential(parts)

        widths = [inputs, *(width << level for level in range(5))]
        for level in range(4):
            part = Wrap(double_conv=double(widths[level], widths[level + 1]))
            self.add_module(f"downsample_{level}", part)
        self.bottleneck = Wrap(double_conv=double(widths[4], widths[5]))
        for step in range(4):
            start, end = widths[5 - step], widths[4 - step]
            up = nn.ConvTranspose2d(start, end, 2, 2)
            part = Wrap(upsample=up, double_conv=double(start, end))
            self.add_module(f"upsample_{step}", part)
        self.output = nn.Conv2d(width, outputs, 1)

    def forward(self, x):
        maps = []
        for level in range(4):
            maps.append(getattr(self, f"downsample_{level}")(x))
            x = functional.max_pool2d(maps[-1], 2)
        x = self.bottleneck(x)
        for step in range(4):
            part = getattr(self, f"upsample_{step}")
            x = part.upsample(x)
            x = part.double_conv(torch.cat([crop_like(maps.pop(), x), x], dim=1))
        return self.output(x)


class DownConv(nn.Module):
    """down_conv_1 … up_conv_4: valid, no norm, the upsampled map first.

    With ``saved=False`` the transposed convolutions are made when they are used, as in
    one walkthrough, and so are not part of the state.
    """

    def __init__(self, inputs=1, outputs=2, width=4, saved=True):
        super().__init__()

        def double(start, end):
            return nn.Sequential(
                nn.Conv2d(start, end, 3), nn.ReLU(), nn.Conv2d(end, end, 3), nn.ReLU()
            )

        widths = [inputs, *(width << level for level in range(5))]
        for level in range(1, 6):
            part = double(widths[level - 1], widths[level])
            self.add_module(f"down_conv_{level}", part)
        for step in range(1, 5):
            start, end = widths[6 - step], widths[5 - step]
            if saved:
                up = nn.ConvTranspose2d(start, end, 2, 2)
                self.add_module(f"up_trans_{step}", up)
            self.add_module(f"up_conv_{step}", double(start, end))
        head = nn.Conv2d(width, outputs, 1)
        self.add_module("out" if saved else "final_layer", head)

    def forward(self, x):
        maps = [self.down_conv_1(x)]
        for level in range(2, 6):
            pooled = functional.max_pool2d(maps[-1], 2)
            maps.append(getattr(self, f"down_conv_{level}")(pooled))
        x = maps.pop()
        for step in range(1, 5):
            x = getattr(self, f"up_trans_{step}")(x)
            x = torch.cat([x, crop_like(maps.pop(), x)], 1)
            x = getattr(self, f"up_conv_{step}")(x)
        return self.out(x)


class OneConvolution(nn.Module):
    """encoder.0.conv, decoder.0.conv1, fc, logits: one convolution a level."""

    def __init__(self, inputs=1, width=4, depth=3, up="transposed"):
        super().__init__()
        self.kind = up
        widths = [inputs, *(width << level for level in range(depth + 1))]
        pairs = list(pairwise(widths))
        self.encoder = nn.ModuleList(
            Wrap(conv=nn.Conv2d(*pair, 3, padding=1)) for pair in pairs[:-1]
        )
        self.fc = nn.Conv2d(*pairs[-1], 3, padding=1)
        self.decoder = nn.ModuleList()
        for end, start in pairs[:0:-1]:
            if up == "transposed":
                conv1 = nn.ConvTranspose2d(start, end, 2, 2)
                conv2 = nn.Conv2d(2 * end, end, 3, padding=1)
            elif up == "repeat":
                conv1 = nn.Conv2d(start, end, 2)
                conv2 = nn.Conv2d(2 * end, end, 3, padding=1)
            else:
                conv1 = nn.Conv2d(start + end, end, 3, padding=1)
                conv2 = nn.Conv2d(end, end, 3, padding=1)
            self.decoder.append(Wrap(conv1=conv1, conv2=conv2))
        self.logits = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        maps = []
        for part in self.encoder:
            maps.append(functional.relu(part.conv(x)))
            x = functional.max_pool2d(maps[-1], 2)
        x = functional.relu(self.fc(x))
        for part in self.decoder:
            skip = maps.pop()
            if self.kind != "transposed":
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
            if self.kind == "repeat":
                x = functional.pad(x, [0, 1, 0, 1])
            if self.kind != "bare":
                x = part.conv1(x)
            x = torch.cat([skip, x], dim=1)
            if self.kind == "bare":
                x = functional.relu(part.conv1(x))
            x = functional.relu(part.conv2(x))
        return self.logits(x)
