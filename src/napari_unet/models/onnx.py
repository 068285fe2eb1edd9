"""ONNX files: checked, measured, made our model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from napari_unet.models.model import Model
    from napari_unet.network.program import Outputs


def import_onnx(
    data: bytes,
    name: str,
    *,
    halo: int | None = None,
    alignment: int | None = None,
    minimum: int | None = None,
    outputs: Outputs | None = None,
) -> Model:
    """Make a model of an ONNX network, which then runs as it is.

    Parameters
    ----------
    data : bytes
        The content of the file.
    name : str
        Of the model.
    halo : int, optional
        Pixels of context that its tiles need, if that is known; by default followed
        through its layers.
    alignment, minimum : int, optional
        Legal sides are multiples of ``alignment`` and not below ``minimum``; by
        default found out.
    outputs : "logits" or "probabilities", optional
        By default told by its last layer.

    Returns
    -------
    Model

    Raises
    ------
    BadModel
        If onnxruntime is missing, or the file is damaged, dangerous or no network
        from one image to one image.
    """
    raise NotImplementedError
