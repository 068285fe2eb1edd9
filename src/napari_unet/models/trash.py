"""The trash of the library: models that were removed, until they are restored."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from napari_unet.errors import BadModel
from napari_unet.files.atomic import bad_output
from napari_unet.models.library import (
    SUFFIX,
    library_dir,
    move_file,
    new_file,
    own_file,
)

if TYPE_CHECKING:
    from pathlib import Path

TRASH_DAYS = 30

_REMOVED = re.compile(rf"(\d+)-(.+){re.escape(SUFFIX)}", re.DOTALL)
_DAY = 24 * 60 * 60 * 10**9  # ns


@dataclass(frozen=True)
class Removed:
    """A model in the trash.

    Parameters
    ----------
    name : str
        That it had.
    path : Path
    time_ns : int
        When it was removed.
    """

    name: str
    path: Path
    time_ns: int

    @property
    def kept_until(self) -> date:
        """The day after which a later removal deletes it for good."""
        return date.fromtimestamp((self.time_ns + TRASH_DAYS * _DAY) / 1e9)


def remove_model(name: str) -> Removed:
    """Move one of the user's models to the trash of the library.

    What has been there for longer than `TRASH_DAYS` is then deleted for good.

    Parameters
    ----------
    name : str
        In the library.

    Returns
    -------
    Removed

    Raises
    ------
    BadModel
        If there is no such model.
    BadInput
        If it is a bundled one.
    BadOutput
        If the library cannot be written.
    """
    path, now = own_file(name), time.time_ns()
    removed = Removed(name, _trash_dir() / f"{now}-{name}{SUFFIX}", now)
    try:
        removed.path.parent.mkdir(exist_ok=True)
        for other in _all_removed():
            if other.time_ns < now - TRASH_DAYS * _DAY:
                other.path.unlink(missing_ok=True)
    except OSError as error:
        raise bad_output(removed.path, error) from error
    move_file(path, removed.path)
    return removed


def restore_model(name: str) -> None:
    """Bring a model back from the trash, the one removed last if there are several.

    Parameters
    ----------
    name : str
        That it had.

    Raises
    ------
    BadModel
        If there is none of that name in the trash.
    BadInput
        If another model has got its name meanwhile.
    BadOutput
        If the library cannot be written.
    """
    removed = list_removed()
    if name not in removed:
        names = ", ".join(removed) or "none"
        raise BadModel(
            f"There is no removed model {name!r} (there are: {names}). Name one of "
            "these."
        )
    with new_file(name) as file:
        move_file(removed[name].path, file)


def list_removed() -> dict[str, Removed]:
    """Return what is in the trash by name, sorted; the latest of each name."""
    return {removed.name: removed for removed in _all_removed()}


def _trash_dir() -> Path:
    return library_dir() / "trash"


def _all_removed() -> list[Removed]:
    """Return all that is in the trash by name, the latest of a name last."""
    found = [
        Removed(match[2], path, int(match[1]))
        for path in _trash_dir().glob(f"*{SUFFIX}")
        if (match := _REMOVED.fullmatch(path.name))
    ]
    return sorted(found, key=lambda removed: (removed.name, removed.time_ns))
