"""From annotated images to what is learnt from and what is scored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from napari_unet.inference.resample import Resampling
from napari_unet.inference.source import open_source
from napari_unet.training.adapt import adapted_copy
from napari_unet.training.annotations import derive_truths
from napari_unet.training.patches import training_image
from napari_unet.training.plan import PatchPlan, choose_plan
from napari_unet.training.regions import box_of
from napari_unet.training.settings import TrainingStep
from napari_unet.training.split import AnnotatedUnit, hold_out
from napari_unet.training.validation import HeldOut, held_out_part

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import torch
    from numpy.typing import NDArray

    from napari_unet.models.model import Model, Passport
    from napari_unet.models.normalize import Scaling
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.patches import TrainingImage
    from napari_unet.training.settings import AugmentationSettings, TrainingSettings

__all__ = ["TrainingData", "prepare_steps"]

_SAMPLE = 1 << 18  # raw pixels of a plane or volume for the intensity range


@dataclass(eq=False)
class TrainingData:
    """What a training works on.

    Parameters
    ----------
    model : Model
        The copy that is trained.
    notes : list of str
        What the user should know.
    plan : PatchPlan
    images : list of TrainingImage
    held_out : list of HeldOut
    sha256 : str
        Hash over the raw pixels and what is known of them.
    intensity_range : tuple of float
        1st and 99.8th percentile of the raw images.
    diameters : list of float
        Of circles or balls as large as the objects, in pixels of the model's grid.
    smallest_object : int
        Half of what nearly all objects exceed, in pixels of their images: 95 %,
        because the edge of the known part cuts some off.
    """

    model: Model
    notes: list[str]
    plan: PatchPlan
    images: list[TrainingImage] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    sha256: str = ""
    intensity_range: tuple[float, float] = (0.0, 1.0)
    diameters: list[float] = field(default_factory=list)
    smallest_object: int = 0


def prepare_steps(
    model: Model,
    annotations: Sequence[Annotation],
    settings: TrainingSettings,
    device: torch.device,
) -> Generator[TrainingStep, None, TrainingData]:
    """Derive, once for each image, all that the training needs.

    Parameters
    ----------
    model : Model
        Left as it is.
    annotations : sequence of Annotation
        Checked.
    settings : TrainingSettings
        How to train it.
    device : torch.device
        On which patches must fit.

    Yields
    ------
    TrainingStep
        Heartbeats.

    Returns
    -------
    TrainingData
    """
    units: list[AnnotatedUnit] = []
    ndim: Literal[2, 3] = 2 if model.ndim == 2 else 3
    for number, annotation in enumerate(annotations):
        regions = bool(len(annotation.regions))
        for place, truth in derive_truths(annotation, ndim):
            yield _heartbeat(settings, "reading the annotations")
            units.append(AnnotatedUnit(number, place, truth, regions))
    highest = max(int(unit.truth.target.max()) for unit in units)
    adapted, notes = adapted_copy(model, annotations, highest, settings)
    adapted.passport = _with_pixel_size(adapted.passport, annotations, adapted.ndim)
    opened = [_Opened(annotation, adapted) for annotation in annotations]
    notes += list(dict.fromkeys(note for one in opened for note in one.notes))
    sides = np.max([[axis.target for axis in one.grid] for one in opened], axis=0)
    plan = choose_plan(
        adapted.unet.config,
        sides.tolist(),
        settings,
        _augmentation(settings, adapted.passport.pixel_size),
        device,
    )
    data = TrainingData(adapted, notes, plan)
    margin = [side // 2 + 1 for side in plan.source_shape]
    facts = _Facts()
    held = hold_out(units, settings.held_out, settings.seed)
    for number, (unit, mask) in enumerate(zip(units, held, strict=True), start=1):
        yield _heartbeat(settings, f"preparing image {number} of {len(units)}")
        one, truth = opened[unit.annotation], unit.truth
        facts.add(one, unit)
        if mask.any():
            objects = one.painted(unit)
            part = held_out_part(
                one.annotation, unit.place, mask, truth.target, objects
            )
            data.held_out.append(part)
        image = training_image(
            one.source,
            one.scaling(unit.place),
            unit.place,
            replace(truth, known=truth.known & ~mask),
            one.grid,
            settings.border_weights,
            margin,
            device,
        )
        if image is not None:
            data.images.append(image)
    data.sha256 = facts.digest.hexdigest()
    data.intensity_range = facts.intensity_range
    data.diameters = facts.diameters
    if facts.sizes:
        data.smallest_object = int(np.percentile(facts.sizes, 5) / 2)
    return data


class _Opened:
    """An annotated image as a model sees it."""

    def __init__(self, annotation: Annotation, model: Model):
        self.annotation = annotation
        self.source, self.notes = open_source(
            annotation.image, model, annotation.image_axes
        )
        self._how = model.passport.normalization
        self._scaling: Scaling | None = None
        # As the engine lays its grid.
        factors = model.rescaling(dict(annotation.pixel_size)) or (1.0,) * model.ndim
        self.grid = [
            Resampling(side, max(1, round(side * factor)))
            for side, factor in zip(self.source.spatial_shape, factors, strict=True)
        ]

    def scaling(self, place: dict[str, int]) -> Scaling:
        """Fit the normalisation as the engine does."""
        source = self.source.in_memory(place)
        if self._how.scope == "plane":
            return source.scaling(self._how, place)
        if self._scaling is None:
            whole = source is not self.source and not self.source.loop
            self._scaling = (source if whole else self.source).scaling(self._how, None)
        return self._scaling

    def painted(self, unit: AnnotatedUnit) -> NDArray:
        """Return the objects of a unit without the gaps that were cut between them."""
        if self.annotation.labels_are == "classes":
            return unit.truth.objects
        axes = self.annotation.label_axes
        index = tuple(unit.place.get(axis, slice(None)) for axis in axes)
        labels = np.asarray(self.annotation.labels)[index]
        left = [axis for axis in axes if axis not in unit.place]
        labels = labels.transpose([left.index(axis) for axis in self.source.spatial])
        first = 1 if self.annotation.are_scribbles else 0
        painted: NDArray = np.where(labels > first, labels, 0)
        return painted


class _Facts:
    """What is gathered about all images on the way."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.diameters: list[float] = []
        self.sizes: list[int] = []
        self._raw: list[NDArray] = []

    def add(self, one: _Opened, unit: AnnotatedUnit) -> None:
        """Look at the box of what is known in a unit."""
        truth = unit.truth
        box = box_of(truth.known)
        start, stop = [side.start for side in box], [side.stop for side in box]
        raw = one.source.read(unit.place, start, stop)
        where = f"{unit.annotation} {sorted(unit.place.items())} {start} {raw.shape}"
        self.digest.update(f"{where} {raw.dtype.str}".encode())
        for array in (raw, truth.target[box], truth.objects[box], truth.known[box]):
            self.digest.update(np.ascontiguousarray(array).tobytes())
        # A view would keep the whole image.
        self._raw.append(raw.ravel()[:: max(1, raw.size // _SAMPLE)].copy())
        ratio = np.prod([axis.target / axis.source for axis in one.grid])
        sizes = np.bincount(truth.objects.ravel())[1:]
        sizes = sizes[sizes > 0]
        self.sizes += sizes.tolist()
        sizes = sizes * ratio
        round_ = np.sqrt(4 / np.pi * sizes)
        if truth.known.ndim == 3:
            round_ = np.cbrt(6 / np.pi * sizes)
        self.diameters += round_.tolist()

    @property
    def intensity_range(self) -> tuple[float, float]:
        """1st and 99.8th percentile."""
        raw = np.concatenate([values.astype(np.float64) for values in self._raw])
        raw = raw[np.isfinite(raw)]
        if not len(raw):
            return 0.0, 0.0
        low, high = np.percentile(raw, [1, 99.8])
        return float(low), float(high)


def _with_pixel_size(
    passport: Passport, annotations: Sequence[Annotation], ndim: int
) -> Passport:
    """Give a model that was never trained the typical pixel size of the images."""
    axes = "ZYX"[-ndim:]
    known = all(set(axes) <= annotation.pixel_size.keys() for annotation in annotations)
    if passport.pixel_size or passport.history or not known:
        return passport
    sizes = [[one.pixel_size[axis] for axis in axes] for one in annotations]
    middle = tuple(float(size) for size in np.median(sizes, axis=0))
    return passport.model_copy(update={"pixel_size": middle})


def _augmentation(
    settings: TrainingSettings, pixel_size: tuple[float, ...] | None
) -> AugmentationSettings:
    """Say how far apart the planes of volumes are, if the settings do not."""
    chosen = settings.augmentation
    if chosen.anisotropy != 1 or pixel_size is None or len(pixel_size) < 3:
        return chosen
    ratio = pixel_size[0] / pixel_size[-1]
    return chosen.model_copy(update={"anisotropy": ratio})


def _heartbeat(settings: TrainingSettings, message: str) -> TrainingStep:
    return TrainingStep(0, settings.steps, message)
