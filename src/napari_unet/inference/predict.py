"""Predict: the probabilities of every class, in one array."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from napari_unet.inference.engine import Predictor
from napari_unet.steps import Progress, run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.inference.backends import Precision
    from napari_unet.models.model import Model


class PredictOptions(TypedDict, total=False):
    """The keyword arguments of `Predictor`, which see."""

    axes: str | None
    channels: Sequence[int] | None
    region: Mapping[str, slice] | None
    device: str
    tile_shape: Sequence[int] | None
    precision: Precision
    test_time_augmentation: bool
    pixel_size: Mapping[str, float] | None
    memory_limit: float | None


def predict_steps(
    image: Any, model: Model, **options: Unpack[PredictOptions]
) -> Generator[Progress, None, NDArray[np.float32]]:
    """Predict the probabilities of every class; see `predict`."""
    predictor = Predictor(image, model, **options)
    try:
        result = np.empty(predictor.output_shape, dtype=np.float32)
        for index, unit in enumerate(predictor.units):
            keep = partial(_keep, predictor, result, unit)
            yield from predictor.strip_steps(index, keep)
        return result
    finally:
        predictor.close()


def _keep(
    predictor: Predictor,
    result: NDArray[np.float32],
    unit: dict[str, int],
    rows: slice,
    part: NDArray[np.float32],
) -> None:
    """Write a part of a plane or volume to its place."""
    result[(slice(None), *predictor.place(unit, rows))] = predictor.to_output(part)


def predict(
    image: Any, model: Model, **options: Unpack[PredictOptions]
) -> NDArray[np.float32]:
    """Predict the probabilities of every class, tile by tile and exactly.

    A network of planes goes through a stack plane by plane. The result does not
    depend on the tile size, unless the model says why (`Model.inexact_reason`).

    Parameters
    ----------
    image : array
        numpy, dask or zarr; any real dtype. NaN and infinity become background.
    model : Model
        From `load_model`, or ``Model(UNet(...))``.
    **options
        axes : str, e.g. "TCZYX"; by default "YX", "ZYX" or "TZYX".
        channels : which channels of the image the model gets.
        region : mapping of axis letter to slice; everything by default.
        device : "auto", "cpu", "cuda" or "mps".
        tile_shape : sides of a tile; chosen by memory by default.
        precision : "auto" or "float32".
        test_time_augmentation : average over 8 flips and rotations.
        pixel_size : mapping of axis letter to µm, for rescaling.
        memory_limit : GB of the device's memory; a part of what is free by default.

    Returns
    -------
    float32 array of shape (class, *axes of the image without channels)
        Sums to 1 over the classes; for a network with one output its sigmoid.

    Raises
    ------
    BadInput
        If image, axes or channels do not fit the model.
    OutOfMemory
        If not even the smallest tile fits.
    """
    return run_to_end(predict_steps(image, model, **options))
