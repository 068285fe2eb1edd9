"""What the docks share (the model) and what is remembered between sessions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import platformdirs
from psygnal import Signal, SignalGroupDescriptor

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

    `library_changed` tells the former and the new name of a model in the library: ""
    and a name when it was added, a name and "" when it was removed, both "" when it is
    not known whether something was.
    """

    events: ClassVar[SignalGroupDescriptor] = SignalGroupDescriptor(
        warn_on_no_fields=False
    )
    library_changed: ClassVar = Signal(str, str)
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


def follow_rename(session: Session, old: str, new: str) -> None:
    """Let the docks and what they remember follow a model to its new name.

    Parameters
    ----------
    session : Session
        Of the docks.
    old : str
        Its name before.
    new : str
        Its name now.
    """

    def renamed(objects: Mapping[str, Any]) -> dict[str, Any]:
        return {new if name == old else name: mine for name, mine in objects.items()}

    for dock in ("Segment", "Fine-tune", "Batch"):
        values = recall(dock)
        followed = dict(values)
        if values.get("model") == old:
            followed["model"] = new
        if old in values.get("objects", {}):
            followed["objects"] = renamed(values["objects"])
        if followed != values:
            remember(dock, followed)
    session.objects = renamed(session.objects)
    if session.source == old:
        session.source = new
    session.library_changed.emit(old, new)
