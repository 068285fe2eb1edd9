"""Training patches: where they are drawn, and what is in them.

Half of the patches are centred on any known pixel, the other half on a pixel of one of
the groups objects (each class its own) and borders (where the class changes), each
group equally often. Among the images, one with four times as many such pixels is
chosen twice as often. What is in a patch depends only on the seed and on the numbers
of the step and the patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from scipy.ndimage import maximum_filter, minimum_filter

from napari_unet.errors import BadInput
from napari_unet.inference.resample import Resampling, resample
from napari_unet.inference.tiling import mirror_indices
from napari_unet.training.augment import augment
from napari_unet.training.weight_map import border_weight_map, cut_gaps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unet.inference.source import Source
    from napari_unet.models.model import BorderWeights
    from napari_unet.models.normalize import Scaling
    from napari_unet.training.annotations import Truth
    from napari_unet.training.plan import PatchPlan

__all__ = ["Batch", "Patches", "TrainingImage", "training_image"]

_KEPT_CENTRES = 1 << 18  # of a group in an image; more would only take memory


@dataclass(frozen=True, eq=False)
class TrainingImage:
    """What is learnt from a plane or volume, on the model's grid.

    Parameters
    ----------
    pixels : float32 array of shape (channel, *spatial)
        Normalised.
    target : uint8 array of shape spatial
    weights : float32 array of shape spatial
        0 where nothing is known, or not to be learnt.
    """

    pixels: NDArray[np.float32]
    target: NDArray[np.uint8]
    weights: NDArray[np.float32]


def training_image(
    source: Source,
    scaling: Scaling,
    place: Mapping[str, int],
    truth: Truth,
    grid: Sequence[Resampling],
    border_weights: BorderWeights | None,
    margin: Sequence[int],
    device: torch.device,
) -> TrainingImage | None:
    """Cut out what can be learnt from, with context.

    Parameters
    ----------
    source : Source
        The image.
    scaling : Scaling
        Its normalisation.
    place : mapping of str to int
        Which plane or volume.
    truth : Truth
        What is known and to be learnt; its sizes are those of the image.
    grid : sequence of Resampling
        From the image's pixels to the model's.
    border_weights : BorderWeights or None
        None weights known pixels alike.
    margin : sequence of int
        Pixels of context.
    device : torch.device
        A GPU may compute the border weights.

    Returns
    -------
    TrainingImage or None
        None if nothing is left of the known pixels on a coarser grid.
    """
    start, stop, index = [], [], []
    for axis, along in enumerate(grid):  # the box of the known pixels
        others = tuple(n for n in range(truth.known.ndim) if n != axis)
        centres = (np.arange(along.target) + 0.5) * (along.source / along.target)
        nearest = centres.astype(np.intp)
        used = np.flatnonzero(np.any(truth.known, axis=others)[nearest])
        if not len(used):
            return None
        start.append(int(used[0]))
        stop.append(int(used[-1]) + 1)
        index.append(nearest[start[-1] : stop[-1]])
    box = np.ix_(*index)
    known, target, objects = truth.known[box], truth.target[box], truth.objects[box]
    if not known.any():
        return None
    rescaled = any(along.source != along.target for along in grid)
    if rescaled:
        target, objects = _cut_again(target, objects)
    weights = _weights(objects, known, border_weights, device)
    low = [max(a - m, 0) for a, m in zip(start, margin, strict=True)]
    high = [
        min(b + m, along.target) for b, m, along in zip(stop, margin, grid, strict=True)
    ]
    if rescaled:
        reach = [g.reach(a, b) for g, a, b in zip(grid, low, high, strict=True)]
        pixels = source.read(place, [a for a, _ in reach], [b for _, b in reach])
        pixels = resample(scaling.apply(pixels), grid, low, high)
    else:
        pixels = scaling.apply(source.read(place, low, high))
    around = [(a - x, y - b) for x, a, b, y in zip(low, start, stop, high, strict=True)]
    return TrainingImage(
        np.ascontiguousarray(pixels), np.pad(target, around), np.pad(weights, around)
    )


def _cut_again(
    target: NDArray[np.uint8], objects: NDArray[np.int32]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Cut the gaps that were lost on a coarser grid."""
    cut = np.zeros_like(objects)
    for number in np.unique(target[objects > 0]):
        cut += cut_gaps(np.where(target == number, objects, 0))
    return np.where(cut > 0, target, 0).astype(np.uint8), cut


def _weights(
    objects: NDArray[np.int32],
    known: NDArray[np.bool_],
    border: BorderWeights | None,
    device: torch.device,
) -> NDArray[np.float32]:
    if border is None:
        return known.astype(np.float32)
    return border_weight_map(
        objects,
        border.w0,
        border.sigma,
        preset=border.preset,
        known=known,
        device=str(device) if device.type == "cuda" else None,
    )


Batch: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


class Patches:
    """Batches of patches; each depends only on the seed and its number.

    Several threads may make batches at once.

    Parameters
    ----------
    images : sequence of TrainingImage
        All that is learnt from.
    seed : int
        Of all draws.

    Raises
    ------
    BadInput
        If nothing is known of any image.
    """

    def __init__(self, images: Sequence[TrainingImage], seed: int):
        self._images = images
        self._seed = seed
        groups: dict[Any, dict[int, NDArray[np.int64]]] = {}
        for number, image in enumerate(images):
            for name, mask in _groups(image):
                found = np.flatnonzero(mask)
                if len(found) > _KEPT_CENTRES:
                    random = np.random.default_rng((seed, number))
                    found = random.choice(found, _KEPT_CENTRES, replace=False)
                if len(found):
                    groups.setdefault(name, {})[number] = found
        if not groups:
            raise BadInput(
                "At the model's pixel size nothing is left of what is painted. Correct "
                "the pixel size of the images, or paint larger parts."
            )
        self._known = _Group(groups.pop(_KNOWN))
        self._favoured = [_Group(groups[name]) for name in sorted(groups)]

    def batch(self, step: int, plan: PatchPlan, device: torch.device) -> Batch:
        """Draw, cut and augment the patches of a step.

        Parameters
        ----------
        step : int
            From 1.
        plan : PatchPlan
            Shape of the batch.
        device : torch.device
            Where they are augmented.

        Returns
        -------
        image : float32 Tensor of shape (batch, channel, *spatial)
        target, weights : Tensor of shape (batch, *spatial)
            Of the shape of the network's output.
        """
        pinned = device.type == "cuda"
        cut = self._cut(step, plan, pinned)
        image, target, weights = (
            tensor.to(device, non_blocking=pinned) for tensor in cut
        )
        random = np.random.default_rng((self._seed, step, plan.batch_size))
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        image, target, weights = augment(
            image, target, weights, plan.augmentation, generator, plan.shape
        )
        for axis, side in enumerate(plan.output_shape, start=1):
            target = target.narrow(axis, plan.shrink, side)
            weights = weights.narrow(axis, plan.shrink, side)
        return image, target, weights

    def _cut(self, step: int, plan: PatchPlan, pinned: bool) -> Batch:
        """Cut out the patches of a step; a GPU copies from pinned memory itself."""
        batch, source = (plan.batch_size,), plan.source_shape
        channels = self._images[0].pixels.shape[:1]
        pixels = torch.empty(batch + channels + source, pin_memory=pinned)
        target = torch.empty(batch + source, dtype=torch.uint8, pin_memory=pinned)
        weights = torch.empty(batch + source, pin_memory=pinned)
        for number in range(plan.batch_size):
            random = np.random.default_rng((self._seed, step, number))
            image, start = self._draw(random, plan)
            for tensor, array in (
                (pixels, image.pixels),
                (target, image.target),
                (weights, image.weights),
            ):
                tensor.numpy()[number] = _cut_out(array, start, source)
        return pixels, target, weights

    def _draw(
        self, random: np.random.Generator, plan: PatchPlan
    ) -> tuple[TrainingImage, list[int]]:
        """Choose an image, and where in it or before its edge a patch begins."""
        group = self._known
        if self._favoured and random.random() < 0.5:
            group = self._favoured[random.integers(len(self._favoured))]
        number, place = group.draw(random)
        image = self._images[number]
        centre = np.unravel_index(place, image.target.shape)
        start = []
        for at, side, inner, outer in zip(
            centre,
            image.target.shape,
            plan.output_shape,
            plan.source_shape,
            strict=True,
        ):
            # No more is mirrored than must be.
            first = min(max(int(at) - inner // 2, 0), max(side - inner, 0))
            if side < inner:
                first = (side - inner) // 2
            start.append(first - (outer - inner) // 2)
        return image, start


def _cut_out(array: NDArray, start: Sequence[int], shape: Sequence[int]) -> NDArray:
    """Cut a box out of the last axes, mirrored beyond the edge and only there."""
    first_axis = array.ndim - len(shape)
    for axis, (first, side) in enumerate(zip(start, shape, strict=True), first_axis):
        stop, size = first + side, array.shape[axis]
        if 0 <= first and stop <= size:
            array = array[(slice(None),) * axis + (slice(first, stop),)]
        else:
            array = array.take(mirror_indices(first, stop, size), axis)
    return array


_KNOWN = -1
_BORDERS = 256


def _groups(image: TrainingImage) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Name the groups of pixels on which patches are centred."""
    known = image.weights > 0
    yield _KNOWN, known
    target = image.target
    yield _BORDERS, known & (maximum_filter(target, 3) != minimum_filter(target, 3))
    for number in np.unique(target[known]).tolist():
        if number:
            yield number, known & (target == number)


class _Group:
    """Places in the images that have something in common."""

    def __init__(self, places: Mapping[int, NDArray[np.int64]]):
        chance = np.sqrt([len(found) for found in places.values()])
        self._chance = chance / chance.sum()
        self._images = list(places)
        self._places = list(places.values())

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        """Return an image and a flat index into it."""
        chosen = int(random.choice(len(self._images), p=self._chance))
        places = self._places[chosen]
        return self._images[chosen], int(places[random.integers(len(places))])
