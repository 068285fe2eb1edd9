"""What the docks share (the model) and what is remembered between sessions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import platformdirs
from psygnal import SignalGroupDescriptor

from napari_unet.errors import BadOutput
from napari_unet.files.atomic import atomic_path
from napari_unet.models.model import Model  # noqa: TC001 (psygnal reads the type)

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class Session:
    """The model that Segment, Fine-tune and Batch work with, and who is at work.

    Set it on the main thread only: slots run in the thread that sets it. `source` is
    the name or path it was loaded from, if any; set it before the model. `objects` is
    how the user has objects made now, as keywords of `ObjectSettings`, by model.
    """

    events: ClassVar[SignalGroupDescriptor] = SignalGroupDescriptor(
        warn_on_no_fields=False
    )
    model: Model | None = None
    source: str = ""
    is_segmenting: bool = False
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)


session = Session()


def _settings_file() -> Path:
    home = os.environ.get("NAPARI_UNET_HOME")
    base = Path(home) if home else platformdirs.user_config_path("napari-unet", False)
    return base / "settings.json"


def recall(dock: str) -> dict[str, Any]:
    """Return what a dock remembered, {} at the first start or if it is unreadable.

    Parameters
    ----------
    dock : str
        Its display name.
    """
    try:
        everything = json.loads(_settings_file().read_text("utf-8"))
        values = everything.get(dock, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return values if isinstance(values, dict) else {}


def remember(dock: str, values: Mapping[str, Any]) -> None:
    """Store plain values for the next session; without them nothing is lost.

    Parameters
    ----------
    dock : str
        Its display name.
    values : mapping
        Plain, JSON-able data.
    """
    path = _settings_file()
    try:
        everything = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        everything = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            content = json.dumps(everything | {dock: dict(values)}, indent=1)
            Path(temporary).write_text(content, "utf-8")
    except (OSError, BadOutput):
        return  # a read-only home must not stop the work
