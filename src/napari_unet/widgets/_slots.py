"""Folders that belong to one session at a time, also among several programs."""

from __future__ import annotations

import itertools
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from filelock import BaseFileLock, FileLock, Timeout

from napari_unet.files.atomic import bad_output
from napari_unet.training.project_file import PROJECT_FILE, is_project

if TYPE_CHECKING:
    from pathlib import Path


def hold(folder: Path) -> BaseFileLock | None:
    """Lock a folder, which need not exist, until this process ends or releases it.

    Returns
    -------
    BaseFileLock or None
        None if it is locked already, here or in another process.

    Raises
    ------
    BadOutput
        If the lock, a file beside the folder, cannot be made.
    """
    path = folder.with_name(f"{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Docks and their workers are different threads.
        lock = FileLock(path, timeout=0, thread_local=False)
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        raise bad_output(path, error) from error
    return lock


@dataclass(frozen=True, eq=False)
class Slot:
    """A locked folder for the annotations of one session."""

    folder: Path
    lock: BaseFileLock

    @property
    def saved(self) -> datetime:
        """When."""
        return datetime.fromtimestamp((self.folder / PROJECT_FILE).stat().st_mtime)

    def empty(self) -> None:
        """Delete what is in it; nothing is offered any more."""
        # First what makes it a project, so that half of it is never offered.
        with suppress(OSError):
            (self.folder / PROJECT_FILE).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def find_left(home: Path) -> Slot | None:
    """Return what a session that has ended left, locked; None if there is nothing."""
    for folder in sorted(home.glob("*/")):
        if is_project(folder) and (lock := hold(folder)) is not None:
            if is_project(folder):  # nobody else took it just now
                return Slot(folder, lock)
            lock.release()
    return None


def take_slot(home: Path) -> Slot:
    """Return an empty folder that no other session has."""
    for number in itertools.count(1):
        folder = home / str(number)
        if is_project(folder) or (lock := hold(folder)) is None:
            continue
        if not is_project(folder):
            slot = Slot(folder, lock)
            slot.empty()  # of an interrupted deletion
            return slot
        lock.release()
    raise AssertionError
