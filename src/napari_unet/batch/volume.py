"""One image of any size: from pixels to labels in arrays that are written in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.errors import BadOutput
from napari_unet.inference.segment import Found, segment_units_steps

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unet.inference.engine import Predictor
    from napari_unet.inference.instances import ObjectSettings
    from napari_unet.steps import Progress


def segment_into_steps(
    predictor: Predictor,
    settings: ObjectSettings,
    labels: Any,
    probabilities: Any = None,
    *,
    scratch: Path | None = None,
) -> Generator[Progress, None, Found]:
    """Segment an image into arrays that may be larger than the memory.

    Parameters
    ----------
    predictor : Predictor
        Of the image; it is left open.
    settings : ObjectSettings
        How objects are made.
    labels : writable array of uint32, numpy or zarr
        Of the shape ``predictor.output_shape[1:]``. Written whole.
    probabilities : writable array of float32, optional
        Of the shape ``predictor.output_shape``. Written whole, if given.
    scratch : path, optional
        A folder for temporary files, which exists; by default the system's.

    Yields
    ------
    Progress

    Returns
    -------
    Found

    Raises
    ------
    BadOutput
        If there are more objects than ``labels`` can number.
    BadInput, OutOfMemory
        See `predict`.
    """

    def write(
        place: tuple[int | slice, ...], found: NDArray, predicted: NDArray
    ) -> None:
        if found.dtype.itemsize > np.dtype(labels.dtype).itemsize:
            raise BadOutput(
                "There are more objects than 32-bit labels can number. Raise the "
                "minimal size, or segment the image in parts."
            )
        labels[place] = found
        if probabilities is not None:
            probabilities[(slice(None), *place)] = predicted

    return (yield from segment_units_steps(predictor, settings, write))
