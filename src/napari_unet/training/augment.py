"""Random variation of training patches, on the device that trains.

Geometry moves image, target and weights together. First comes one grid of positions,
composed of rotation, scale, shift and elastic deformation, at which the patch is
sampled once: the image linearly, target and weights at the nearest pixel, the same for
both; then exact mirrorings of what is left of it. So every pixel of the result has the
target and the weight of one pixel of the patch, no label is made up, and unknown stays
unknown.

Beyond the edge the patch is continued by mirroring, image, target and weights alike,
as the U-Net paper continues images: what is known there is as true as inside. To see
real pixels instead, give patches as large as `source_shape` says.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unet.training.settings import AugmentationSettings

__all__ = ["augment", "source_shape"]


@torch.no_grad()
def augment(
    image: Tensor,
    target: Tensor,
    weights: Tensor,
    settings: AugmentationSettings,
    generator: torch.Generator,
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vary patches at random, each of the batch differently.

    Parameters
    ----------
    image : float32 Tensor of shape (batch, channel, *spatial)
        Normalised, on any device.
    target : Tensor of shape (batch, *spatial)
        Classes, of any type.
    weights : Tensor of shape (batch, *spatial)
        0 where nothing is known; of any type, also bool.
    settings : AugmentationSettings
        What varies, and how much.
    generator : torch.Generator
        Of the CPU. The same state gives the same result: bit by bit on the CPU.
    shape : sequence of int, optional
        Spatial shape of the result, centred in the patches; by default all of them.

    Returns
    -------
    image, target, weights : Tensor
        Of the same types. Tensors that nothing changes are returned themselves.

    Raises
    ------
    ValueError
        If the tensors do not belong together, the image is not float32, or the
        generator is not of the CPU.

    References
    ----------
    Ronneberger, Fischer & Brox (2015), https://arxiv.org/abs/1505.04597, section 3.1.
    """
    shape = _check(image, target, weights, generator, shape)
    labels = [target, weights]
    if settings.warps:
        positions = _positions(image, shape, settings, generator)
        image, labels = _sample(image, labels, positions)
    elif shape != image.shape[2:]:
        image, *labels = (_crop(t, shape) for t in (image, *labels))
    if settings.flips:
        image, *labels = _flip([image, *labels], generator)
    return _vary_grey(image, settings, generator), labels[0], labels[1]


def source_shape(
    shape: Sequence[int], settings: AugmentationSettings
) -> tuple[int, ...]:
    """Return how large patches must be so that hardly any of it is mirrored.

    Parameters
    ----------
    shape : sequence of int
        Spatial shape of the result, (Y, X) or (Z, Y, X).
    settings : AugmentationSettings
        What varies, and how much.

    Returns
    -------
    tuple of int
        For `augment` with `shape`. Only displacements beyond 3 standard deviations
        reach out of it.
    """
    if not settings.warps:
        return tuple(shape)
    half = [(side - 1) / 2 for side in shape]
    height, width = half[-2:]
    limit = math.radians(settings.rotation)
    reach = list(half)
    for axis, own, other in ((-2, height, width), (-1, width, height)):
        angle = min(limit, math.atan2(other, own))
        reach[axis] = own * math.cos(angle) + other * math.sin(angle)
    _, sigmas = _elastic_nodes(shape, settings)
    return tuple(
        side + 2 * math.ceil(far * settings.scale - mid + shift + 3 * sigma)
        for side, far, mid, shift, sigma in zip(
            shape, reach, half, _shifts(shape, settings), sigmas, strict=True
        )
    )


def _flip(tensors: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    batch, ndim = len(tensors[0]), tensors[0].ndim - 2
    square = tensors[0].shape[-2] == tensors[0].shape[-1]
    chosen = (torch.rand(batch, ndim + 1, generator=generator) < 0.5).tolist()
    flipped = []
    for tensor in tensors:
        patches = []
        for patch, (diagonal, *axes) in zip(tensor, chosen, strict=True):
            dims = [axis - ndim for axis, mirrored in enumerate(axes) if mirrored]
            turned = patch.transpose(-2, -1) if diagonal and square else patch
            patches.append(turned.flip(dims))
        flipped.append(torch.stack(patches))
    return flipped


def _crop(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, side in zip(range(-len(shape), 0), shape, strict=True):
        tensor = tensor.narrow(axis, (tensor.shape[axis] - side) // 2, side)
    return tensor


def _positions(
    image: Tensor,
    shape: tuple[int, ...],
    settings: AugmentationSettings,
    generator: torch.Generator,
) -> Tensor:
    """Say where in its patch every pixel comes from: (batch, axis, *shape)."""
    batch, ndim, device = len(image), len(shape), image.device
    factor = _log_uniform(settings.scale, generator, batch)
    angle = math.radians(settings.rotation) * _uniform(generator, batch)
    matrix = torch.eye(ndim).repeat(batch, 1, 1) * factor.view(-1, 1, 1)
    matrix[:, -2, -2] = matrix[:, -1, -1] = factor * angle.cos()
    matrix[:, -1, -2] = factor * angle.sin()
    matrix[:, -2, -1] = -matrix[:, -1, -2]
    centre = torch.tensor([(side - 1) / 2 for side in image.shape[2:]])
    shift = torch.tensor(_shifts(shape, settings)) * _uniform(generator, batch, ndim)
    positions = (centre + shift).to(device).view(batch, ndim, *[1] * ndim)
    for axis, side in enumerate(shape):
        along = [1] * ndim
        along[axis] = side
        steps = torch.arange(side, device=device) - (side - 1) / 2
        column = matrix[:, :, axis].to(device).reshape(batch, ndim, *[1] * ndim)
        positions = positions + column * steps.view(along)
    if settings.elastic_sigma:
        counts, sigmas = _elastic_nodes(shape, settings)
        nodes = torch.randn(batch, ndim, *counts, generator=generator)
        nodes *= torch.tensor(sigmas).view(-1, *[1] * ndim)
        positions += _interpolate(nodes.to(device), shape)
    return positions


def _interpolate(field: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Interpolate nodes bicubically: axis by axis, which also serves for volumes."""
    for axis, side in enumerate(shape, start=2):
        count = field.shape[axis]
        curves = functional.interpolate(
            torch.eye(count).view(count, 1, count, 1),
            size=(side, 1),
            mode="bicubic",
            align_corners=True,
        ).view(count, side)
        field = (field.movedim(axis, -1) @ curves.to(field.device)).movedim(-1, axis)
    return field


def _shifts(shape: Sequence[int], settings: AugmentationSettings) -> list[float]:
    """Return the largest shift by axis, in pixels."""
    units = _units(len(shape), settings)
    return [
        min(settings.shift / unit, (side - 1) / 4)
        for side, unit in zip(shape, units, strict=True)
    ]


def _elastic_nodes(
    shape: Sequence[int], settings: AugmentationSettings
) -> tuple[list[int], list[float]]:
    """Return the number of nodes and the standard deviation, in pixels, by axis."""
    units = _units(len(shape), settings)
    extents = [(side - 1) * unit for side, unit in zip(shape, units, strict=True)]
    distance = max(max(extents) / (settings.elastic_grid - 1), 1.0)
    counts = [1 + round(extent / distance) for extent in extents]
    sigmas = [
        # Of a flat volume few planes may be pushed out along Z.
        min(settings.elastic_sigma, distance / 6, extent / 12) / unit
        for extent, unit in zip(extents, units, strict=True)
    ]
    return counts, sigmas


def _sample(
    image: Tensor, labels: list[Tensor], positions: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Sample the image linearly and labels at the nearest pixel."""
    sides = image.shape[2:]
    index = torch.zeros_like(positions[:, 0], dtype=torch.int64)
    normalised = []
    for axis, side in enumerate(sides):
        place = _mirror(positions[:, axis], side)
        index = index * side + (place + 0.5).long().clamp_(max=side - 1)
        normalised.append(place * (2 / max(side - 1, 1)) - 1)
    image = functional.grid_sample(
        image,
        torch.stack(normalised[::-1], dim=-1),
        mode="bilinear",
        padding_mode="border",  # for rounding errors only
        align_corners=True,
    )
    flat = index.flatten(1)
    return image, [t.flatten(1).gather(1, flat).view(index.shape) for t in labels]


def _mirror(place: Tensor, side: int) -> Tensor:
    """Fold positions into the patch without repeating its edge."""
    last = side - 1
    if not last:
        return torch.zeros_like(place)
    return last - (place.remainder(2 * last) - last).abs()


def _vary_grey(
    image: Tensor, settings: AugmentationSettings, generator: torch.Generator
) -> Tensor:
    """Blur, bend the grey scale of every channel, and add noise, as a camera does."""
    patches, channels, ones = len(image), image.shape[:2], [1] * (image.ndim - 2)
    if settings.blur:
        sigma = settings.blur * torch.rand(patches, generator=generator)
        image = _blur(image, sigma, _units(len(ones), settings))
    if settings.gamma > 1:
        gamma = _log_uniform(settings.gamma, generator, *channels, *ones)
        image = _bend(image, gamma.to(image.device))
    if settings.gain > 1 or settings.offset:
        gain = _log_uniform(settings.gain, generator, *channels, *ones)
        offset = settings.offset * _uniform(generator, *channels, *ones)
        image = image * gain.to(image.device) + offset.to(image.device)
    if settings.noise:
        sigma = settings.noise * torch.rand(patches, 1, *ones, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        there = torch.Generator(image.device).manual_seed(seed)
        noise = torch.randn(image.shape, generator=there, device=image.device)
        image = noise.mul_(sigma.to(image.device)).add_(image)
    return image


def _bend(image: Tensor, gamma: Tensor) -> Tensor:
    """Raise values to a power; beyond 1, where it could overflow, go on linearly."""
    size = image.abs()
    inside = size.clamp(max=1)
    beyond = size - inside
    return torch.copysign(inside.pow(gamma).addcmul_(beyond, gamma), image)


def _blur(image: Tensor, sigma: Tensor, units: tuple[float, ...]) -> Tensor:
    """Blur every patch with its own sigma, repeating the edge."""
    for axis, unit in enumerate(units, start=2):
        radius = math.ceil(3 * float(sigma.max()) / unit)
        side = image.shape[axis]
        if not radius or side == 1:
            continue
        steps = torch.arange(-radius, radius + 1)
        width = (sigma / unit).clamp(min=1e-3).view(-1, 1)
        kernels = torch.exp(-((steps / width) ** 2) / 2)
        kernels = (kernels / kernels.sum(1, keepdim=True)).to(image.device)
        reached = torch.arange(-radius, side + radius, device=image.device)
        padded = image.index_select(axis, reached.clamp_(0, side - 1))
        image = torch.zeros_like(image)
        for step in range(2 * radius + 1):
            weight = kernels[:, step].view(-1, *[1] * (image.ndim - 1))
            image.addcmul_(padded.narrow(axis, step, side), weight)
    return image


def _units(ndim: int, settings: AugmentationSettings) -> tuple[float, ...]:
    """Return the pixel sizes by axis, in pixels along Y and X."""
    return (settings.anisotropy, 1.0, 1.0)[-ndim:]


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


def _log_uniform(limit: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Draw from 1 / limit to limit."""
    return (math.log(limit) * _uniform(generator, *shape)).exp()


def _check(
    image: Tensor,
    target: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    shape: Sequence[int] | None,
) -> tuple[int, ...]:
    """Return the spatial shape of the result; raise `ValueError` where nonsense."""
    if image.dtype != torch.float32 or image.ndim not in (4, 5):
        raise ValueError(
            "the image must be float32 of shape (batch, channel, *spatial), not "
            f"{image.dtype} of shape {tuple(image.shape)}"
        )
    wanted = (image.shape[0], *image.shape[2:])
    for name, tensor in (("target", target), ("weights", weights)):
        if tensor.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {wanted}")
    if generator.device.type != "cpu":
        raise ValueError("the generator must be of the CPU, so that it can be saved")
    shape = tuple(image.shape[2:] if shape is None else shape)
    fits = [0 < side <= full for side, full in zip(shape, wanted[1:], strict=False)]
    if len(shape) != len(wanted) - 1 or not all(fits):
        raise ValueError(f"{shape} is no part of patches of shape {wanted[1:]}")
    return shape
