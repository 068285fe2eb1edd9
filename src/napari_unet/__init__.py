"""U-Net segmentation for napari.

The public names are imported when they are first used, so that importing the
package loads neither torch nor Qt.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from napari_unet.inference.predict import predict
    from napari_unet.inference.segment import segment
    from napari_unet.models.checkpoint import save_model
    from napari_unet.models.library import load_model
    from napari_unet.models.model import Model
    from napari_unet.network.config import UNetConfig
    from napari_unet.network.unet import UNet
    from napari_unet.training.annotations import Annotation
    from napari_unet.training.fine_tune import fine_tune
    from napari_unet.training.settings import TrainingSettings
    from napari_unet.training.weight_map import border_weight_map

_WHERE = {
    "Annotation": "training.annotations",
    "Model": "models.model",
    "TrainingSettings": "training.settings",
    "UNet": "network.unet",
    "UNetConfig": "network.config",
    "border_weight_map": "training.weight_map",
    "fine_tune": "training.fine_tune",
    "load_model": "models.library",
    "predict": "inference.predict",
    "save_model": "models.checkpoint",
    "segment": "inference.segment",
}

__all__ = [
    "Annotation",
    "Model",
    "TrainingSettings",
    "UNet",
    "UNetConfig",
    "border_weight_map",
    "fine_tune",
    "load_model",
    "predict",
    "save_model",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slower to import than all else here

        return version("napari-unet")
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
