"""Segment: predict, then objects."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from napari_unet.inference.engine import PredictOptions, Predictor
from napari_unet.inference.instances import ObjectSettings, label_classes
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import NDArray

    from napari_unet.models.model import Model, Passport


class SegmentOptions(PredictOptions, total=False):
    """The keyword arguments of `segment`."""

    threshold: float | None
    minimal_size: int | None
    split_touching: bool | None


class Numbering:
    """Keeps object numbers running through the planes of a stack.

    Parameters
    ----------
    passport : Passport
        Regions keep their class index in every plane.
    """

    def __init__(self, passport: Passport):
        kinds = [info.kind for info in passport.classes]
        self._first = len(kinds) if "region" in kinds else 1
        self.count = 0
        self.object_classes: list[int] = []

    @property
    def next_label(self) -> int:
        """The number of the next object."""
        return self._first + self.count

    def renumber(self, labels: NDArray, object_classes: NDArray) -> NDArray:
        """Continue the numbers of the planes before; widen the dtype if needed."""
        largest = self.next_label + len(object_classes)
        dtype = np.uint32 if largest < 2**32 else np.uint64
        is_object = labels >= self._first
        numbered = labels.astype(dtype)
        np.add(numbered, dtype(self.count), out=numbered, where=is_object)
        self.count += len(object_classes)
        self.object_classes += object_classes.tolist()
        return numbered


def foreground(probabilities: NDArray) -> NDArray:
    """Leave out the background's probabilities; a sigmoid has none.

    Parameters
    ----------
    probabilities : array of shape (class, ...)
        As the engine gives them.

    Returns
    -------
    array of shape (class without background, ...)
        A view.
    """
    return probabilities[1:] if len(probabilities) > 1 else probabilities


def segment_steps(
    image: Any, model: Model, **options: Unpack[SegmentOptions]
) -> Generator[Progress, None, NDArray]:
    """Segment an image; see `segment`."""
    labels, _ = yield from _steps(image, model, options, keep=False)
    return labels


def segment_and_predict_steps(
    image: Any, model: Model, **options: Unpack[SegmentOptions]
) -> Generator[Progress, None, tuple[NDArray, NDArray[np.float32]]]:
    """Do what `segment` and `predict` do, with one pass of the network."""
    labels, probabilities = yield from _steps(image, model, options, keep=True)
    assert probabilities is not None
    return labels, probabilities


def _steps(
    image: Any, model: Model, options: SegmentOptions, *, keep: bool
) -> Generator[Progress, None, tuple[NDArray, NDArray[np.float32] | None]]:
    settings = ObjectSettings.recommended(model.passport)
    for name in ("threshold", "minimal_size", "split_touching"):
        value = options.pop(name, None)  # type: ignore[misc]
        if value is not None:
            settings = replace(settings, **{name: value})
    predictor = Predictor(image, model, **options)  # type: ignore[misc]
    numbering = Numbering(model.passport)
    try:
        result = np.zeros(predictor.output_shape[1:], dtype=np.uint32)
        kept = np.empty(predictor.output_shape, dtype=np.float32) if keep else None
        for index, unit in enumerate(predictor.units):
            probabilities = yield from predictor.unit_steps(index)
            place = predictor.place(unit)
            if kept is not None:
                kept[(slice(None), *place)] = predictor.to_output(probabilities)
            labels = numbering.renumber(
                *label_classes(foreground(probabilities), model.passport, settings)
            )
            if labels.dtype != result.dtype:
                result = result.astype(labels.dtype)
            result[place] = predictor.to_output(labels[None])[0]
        return result, kept
    finally:
        predictor.close()


def segment(image: Any, model: Model, **options: Unpack[SegmentOptions]) -> NDArray:
    """Segment an image into objects, or into classes where the model says so.

    Parameters
    ----------
    image : array
        See `predict`.
    model : Model
        Its passport recommends the settings that are not given.
    **options
        threshold : probability above which a pixel belongs to an object.
        minimal_size : in pixels or voxels.
        split_touching : whether to split objects at their necks.
        Further options: see `predict`.

    Returns
    -------
    uint32 (uint64 beyond 2**32 objects) array
        Shape of the image without channels. Object numbers run on through the
        planes of a stack.

    Raises
    ------
    BadInput, OutOfMemory
        See `predict`.
    """
    return run_to_end(segment_steps(image, model, **options))
