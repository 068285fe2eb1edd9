"""The bundled and the user's own models, by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from napari_unet.errors import BadModel
from napari_unet.models.checkpoint import read_model

if TYPE_CHECKING:
    from napari_unet.models.model import Model

BUNDLED = Path(__file__).parent / "bundled"
SUFFIX = ".safetensors"


def data_dir() -> Path:
    """Return the folder of all that is kept for the user (it may not exist yet).

    ``NAPARI_UNET_HOME`` overrides the platform's user data folder.
    """
    home = os.environ.get("NAPARI_UNET_HOME")
    return Path(home) if home else platformdirs.user_data_path("napari-unet", False)


def library_dir() -> Path:
    """Return the folder of the user's own models (it may not exist yet)."""
    return data_dir() / "models"


def list_models() -> dict[str, Path]:
    """Return the files of all models in the library by name, sorted.

    A model of the user hides a bundled one of the same name.
    """
    found: dict[str, Path] = {}
    for folder in (BUNDLED, library_dir()):
        if folder.is_dir():
            found |= {path.stem: path for path in folder.glob(f"*{SUFFIX}")}
    return dict(sorted(found.items()))


def load_model(name_or_path: str | Path) -> Model:
    """Load a model from the library or from a file.

    Parameters
    ----------
    name_or_path : str or path
        A name in the library, which comes first, or the path of a checkpoint.

    Returns
    -------
    Model

    Raises
    ------
    BadModel
        If there is no such model or its file cannot be used.
    """
    models = list_models()
    if str(name_or_path) in models:
        return read_model(models[str(name_or_path)])
    path = Path(name_or_path).expanduser()
    if not path.suffix and len(path.parts) == 1 and not path.is_file():
        names = ", ".join(models) or "none"
        raise BadModel(
            f"There is no model {str(name_or_path)!r} in the library (there are: "
            f"{names}). Name one of these or the path of a checkpoint."
        )
    return read_model(path)
