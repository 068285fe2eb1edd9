"""The scores of a model on the part of the annotations that is held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.inference.classify import foreground
from napari_unet.inference.engine import Predictor
from napari_unet.inference.instances import label_classes
from napari_unet.inference.settings import ObjectSettings
from napari_unet.training.regions import box_of
from napari_unet.training.scores import score_images

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.models.model import Model, Passport
    from napari_unet.steps import Progress
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.scores import Scores

__all__ = [
    "FEW_THRESHOLDS",
    "THRESHOLDS",
    "HeldOut",
    "Predicted",
    "held_out_part",
    "predict_held_out_steps",
    "score",
    "tune_steps",
]

_CONTEXT = 32  # pixels around the held-out part in which objects are made, too
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FEW_THRESHOLDS = (0.5, 0.7, 0.9)
_SMALLEST_PROBABILITY = 1e-7


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out part of one plane or volume.

    Parameters
    ----------
    annotation : Annotation
        The image.
    region : dict of str to slice
        The box in the image to which all arrays belong.
    known : bool array
        The held-out pixels.
    target : uint8 array
        Their classes, after the gaps were cut.
    objects : integer array
        As they were painted, without gaps; 0 where not held out.
    """

    annotation: Annotation
    region: dict[str, slice]
    known: NDArray[np.bool_]
    target: NDArray[np.uint8]
    objects: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a network says about a held-out part.

    Parameters
    ----------
    part : HeldOut
        What is true.
    foreground : float32 array of shape (class without background, *spatial)
    loss_sum : float
        Cross-entropy summed over the held-out pixels.
    """

    part: HeldOut
    foreground: NDArray[np.float32]
    loss_sum: float


def held_out_part(
    annotation: Annotation,
    place: Mapping[str, int],
    held: NDArray[np.bool_],
    target: NDArray[np.uint8],
    objects: NDArray[Any],
) -> HeldOut:
    """Cut the box of the held-out pixels, and some context, out of a unit.

    Parameters
    ----------
    annotation : Annotation
        The image.
    place : mapping of str to int
        Which plane or volume of it.
    held : bool array
        Some are true.
    target, objects
        See `HeldOut`; of the shape of the unit.

    Returns
    -------
    HeldOut
    """
    inside = tuple(
        slice(max(used.start - _CONTEXT, 0), min(used.stop + _CONTEXT, side))
        for used, side in zip(box_of(held), held.shape, strict=True)
    )
    region = {axis: slice(at, at + 1) for axis, at in place.items()}
    region |= zip("ZYX"[-held.ndim :], inside, strict=True)
    known = held[inside].copy()
    return HeldOut(
        annotation,
        region,
        known,
        target[inside].copy(),
        np.where(known, objects[inside], 0),
    )


def predict_held_out_steps(
    model: Model, parts: Sequence[HeldOut], device: str, precision: Any
) -> Generator[Progress, None, list[Predicted]]:
    """Predict what is held out, with the tile engine.

    Parameters
    ----------
    model : Model
        Whose network predicts.
    parts : sequence of HeldOut
        What is held out.
    device, precision
        See `Predictor`.

    Yields
    ------
    Progress
        The engine's, as heartbeats.

    Returns
    -------
    list of Predicted
        On the images' grids.
    """
    predicted = []
    for part in parts:
        predictor = Predictor(
            part.annotation.image,
            model,
            axes=part.annotation.image_axes,
            region=part.region,
            device=device,
            precision=precision,
            pixel_size=part.annotation.pixel_size,
        )
        try:
            probabilities = yield from predictor.unit_steps(0)
        finally:
            predictor.close()
        loss = _cross_entropy(probabilities, part)
        predicted.append(Predicted(part, foreground(probabilities), loss))
    return predicted


def _cross_entropy(probabilities: NDArray[np.float32], part: HeldOut) -> float:
    target = part.target[part.known]
    likely = probabilities[:, part.known]
    if len(likely) == 1:
        likely = np.concatenate([1 - likely, likely])
        target = np.minimum(target, 1)
    true = np.take_along_axis(likely, target[None].astype(np.intp), axis=0)[0]
    losses = -np.log(np.maximum(true, _SMALLEST_PROBABILITY), dtype=np.float64)
    return float(losses.sum())


def score(
    predicted: Sequence[Predicted],
    passport: Passport,
    settings: ObjectSettings | None = None,
) -> dict[str, float]:
    """Score a prediction; only held-out pixels count.

    True and predicted objects are both restricted to them, so that an object that
    reaches out of the known part is judged by what is known of it. Objects of
    different classes never match.

    Parameters
    ----------
    predicted : sequence of Predicted
        All that is held out.
    passport : Passport
        Names the classes; everything but background is made objects of.
    settings : ObjectSettings, optional
        By default what the passport recommends.

    Returns
    -------
    dict of str to float
        See `TrainingStep`.
    """
    scores = _score_objects(predicted, passport, settings)
    pixels = sum(int(one.part.known.sum()) for one in predicted)
    return {
        "loss": sum(one.loss_sum for one in predicted) / pixels,
        "IoU": scores.foreground_iou,
        "F1@0.5": scores.at(0.5).f1,
        "AP@0.5": scores.at(0.5).average_precision,
    }


def _score_objects(
    predicted: Sequence[Predicted], passport: Passport, settings: ObjectSettings | None
) -> Scores:
    return score_images(_pairs(predicted, passport, settings))


def _pairs(
    predicted: Sequence[Predicted], passport: Passport, settings: ObjectSettings | None
) -> Iterator[tuple[NDArray, NDArray]]:
    """Make true and predicted objects, class by class."""
    settings = settings or ObjectSettings.recommended(passport)
    background, *others = passport.classes
    objects = [info.model_copy(update={"kind": "objects"}) for info in others]
    only_objects = passport.model_copy(update={"classes": (background, *objects)})
    for one in predicted:
        labels, of_class = label_classes(one.foreground, only_objects, settings)
        class_of = np.append(0, of_class)[labels]
        labels = np.where(one.part.known, labels, 0)
        for number in range(1, len(passport.classes)):
            true = one.part.objects
            if len(others) > 1:
                true = np.where(one.part.target == number, true, 0)
                yield true, np.where(class_of == number, labels, 0)
            else:
                yield true, labels


def tune_steps(
    predicted: Sequence[Predicted],
    passport: Passport,
    thresholds: Sequence[float],
    grows: Sequence[int],
    sizes: Sequence[int],
) -> Generator[None, None, ObjectSettings]:
    """Choose how objects are made of the probabilities.

    Weights of the classes shift the probabilities, the gaps that are cut for training
    make objects smaller, and the objects may be larger than those of the old model,
    or of a shape that can be told apart where they touch.

    Parameters
    ----------
    predicted : sequence of Predicted
        Of the held-out part.
    passport : Passport
        Its recommendation is kept unless another gives a higher F1@0.5, or the same
        and a higher mean AP.
    thresholds : sequence of float
        To try.
    grows : sequence of int
        Pixels, to try.
    sizes : sequence of int
        Smallest objects in pixels, to try.

    Yields
    ------
    None
        Heartbeats.

    Returns
    -------
    ObjectSettings
    """
    recommended = ObjectSettings.recommended(passport)
    best, merit = recommended, (-1.0, -1.0)
    candidates = [
        replace(
            recommended,
            threshold=threshold,
            grow=grow,
            minimal_size=size,
            split_touching=split,
        )
        for size in dict.fromkeys(sizes)
        for split in (False, True)
        for grow in dict.fromkeys(grows)
        for threshold in thresholds
    ]
    for candidate in [recommended, *candidates]:
        yield
        scores = _score_objects(predicted, passport, candidate)
        found = scores.at(0.5).f1, scores.mean_average_precision
        if found > merit:
            best, merit = candidate, found
    return best
