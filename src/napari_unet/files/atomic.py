"""Files and folders that are complete or not there: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from napari_unet.errors import BadOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NAME_BYTES = 255
SWAP_SECONDS = 10.0  # for other processes that replace the same folder

# Why it failed, and what to do: the errors that a user can do something about.
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another "
    "folder",
    errno.EFBIG: "the file is too large for this disk or your limits; choose another "
    "folder",
    errno.EACCES: "you are not allowed to write there; choose another folder",
    errno.EPERM: "you are not allowed to write there; choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.ENOENT: "the folder does not exist; create it first",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.EISDIR: "there is a folder of that name; choose another name",
    errno.EEXIST: "there is a file of that name; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an error; choose another folder",
}


def bad_output(path: Path, error: OSError) -> BadOutput:
    """Say in one sentence why a file could not be written.

    Parameters
    ----------
    path : Path
        What was to be written.
    error : OSError
        What the operating system said.

    Returns
    -------
    BadOutput
        The error to raise.
    """
    reason = _REASONS.get(error.errno or 0)
    if reason is None and "requested and" in str(error):
        # numpy reports a short write without an error number.
        reason = _REASONS[errno.ENOSPC]
    if reason is None:
        reason = f"{error.strerror or error}; choose another folder"
    return BadOutput(f"Cannot write {path}: {reason}.")


def _host() -> str:
    """Name this computer in eight letters: a folder may be shared by several."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


# .name.<host>-<pid>.<uuid>.part
_PART = re.compile(r"^\..*\.([0-9a-f]{8})-(\d+)\.[0-9a-f]{32}\.part$", re.DOTALL)


def _part_path(path: Path) -> Path:
    """Return the name of a temporary file beside ``path`` that nobody else has."""
    tail = f".{_host()}-{os.getpid()}.{uuid.uuid4().hex}.part"
    # The name itself may already have all the bytes that the file system allows.
    name = os.fsencode(path.name)[: MAX_NAME_BYTES - len(tail) - 1]
    return path.with_name(f".{name.decode(errors='ignore')}{tail}")


def _create(path: Path) -> None:
    """Create an empty file that did not exist, never through a link."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(path, flags, 0o666))


def _sync(path: Path) -> None:
    """Wait until the contents of a file are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until a new name is on the disk, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(source: Path, target: Path) -> None:
    """Rename, and on Windows wait for a virus scanner to let go of the file."""
    deadline = time.monotonic() + (2 if os.name == "nt" else 0)
    while True:
        try:
            os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it appears complete or not at all.

    Parameters
    ----------
    path : path-like
        The file to make or to replace. Its folder must exist.

    Yields
    ------
    Path
        An empty temporary file in the same folder; write to it. At the end of the
        block it is synced to the disk and takes the name ``path``. After any
        exception it is removed, and what was at ``path`` is as before.

    Raises
    ------
    BadOutput
        When the disk is full, the folder cannot be written to, and so on; any
        other exception of the block passes through.
    """
    path = Path(path)
    part = _part_path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        _create(part)
        try:
            yield part
            _sync(part)
            _replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise bad_output(path, error) from error
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder so that it appears complete or not at all.

    Parameters
    ----------
    path : path-like
        The folder to make or to replace. Its parent must exist.

    Yields
    ------
    Path
        An empty temporary folder on the same disk; write into it. At the end of the
        block everything in it is synced to the disk and it takes the name ``path``.
        After any exception it is removed, and what was at ``path`` is as before.

    Raises
    ------
    BadOutput
        As for :func:`atomic_path`.
    """
    path = Path(path)
    # A folder cannot be replaced in one step. The old one waits inside, under its
    # own name: there :func:`sweep` finds it, should the process die in between.
    part = _part_path(path)
    new, old = part / "new", part / "old" / path.name
    try:
        if path.is_file():
            raise FileExistsError(errno.EEXIST, "there is a file of that name")
        part.mkdir()
        try:
            new.mkdir()
            yield new
            for inner, _, files in os.walk(new):
                for name in files:
                    _sync(Path(inner, name))
            old.parent.mkdir()
            _swap(new, path, old)
        except BaseException:
            with suppress(OSError):
                _discard(part, path.parent)
            raise
        # Not given back: another writer may just have taken the name from it.
        shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise bad_output(path, error) from error
    _sync_folder(path.parent)


def _swap(new: Path, path: Path, old: Path) -> None:
    """Give a folder its name, and the one that has it now another.

    Several processes may do so with the same name at once: the last one wins, and
    there is always a complete folder under the name or on its way to it.
    """
    deadline = time.monotonic() + SWAP_SECONDS
    while True:
        try:
            if os.path.lexists(path):
                shutil.rmtree(old, ignore_errors=True)  # of the last attempt
                _replace(path, old)
            _replace(new, path)
        except OSError as error:
            # Another process was faster: with taking the name, or with giving it.
            is_gone = isinstance(error, FileNotFoundError) and new.is_dir()
            if not (is_gone or _is_taken(error)) or time.monotonic() > deadline:
                raise
        else:
            return


def _is_taken(error: OSError) -> bool:
    """Tell whether a folder did not get a name because another folder has it."""
    is_windows = os.name == "nt" and error.errno == errno.EACCES
    return is_windows or error.errno in (errno.ENOTEMPTY, errno.EEXIST)


def _discard(part: Path, folder: Path) -> None:
    """Delete a temporary folder; what it should have replaced gets its name back."""
    if (part / "old").is_dir():
        for old in (part / "old").iterdir():
            try:
                if not os.path.lexists(folder / old.name):
                    _replace(old, folder / old.name)
            except OSError as error:
                # Another process has just given the name to a newer one.
                if not _is_taken(error):
                    raise
    shutil.rmtree(part)


def make_scratch(folder: str | os.PathLike[str]) -> Path:
    """Make a folder for temporary files, which :func:`sweep` deletes after a kill.

    Parameters
    ----------
    folder : path-like
        Where; it must exist.

    Returns
    -------
    Path
        To be deleted in the end.

    Raises
    ------
    BadOutput
        When it cannot be made.
    """
    part = _part_path(Path(folder) / "scratch")
    try:
        part.mkdir()
    except OSError as error:
        raise bad_output(part, error) from error
    return part


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before a long computation whether its result can be written.

    Parameters
    ----------
    path : path-like
        An existing folder, or a file or folder that is to be made in an existing
        one. A few bytes are written there and removed again.

    Raises
    ------
    BadOutput
        When that fails.
    """
    path = Path(path)
    probe = _part_path(path / "probe" if path.is_dir() else path)
    try:
        _create(probe)
        try:
            probe.write_bytes(b"\0" * 4096)
            _sync(probe)
        finally:
            with suppress(OSError):
                probe.unlink()
    except OSError as error:
        raise bad_output(path, error) from error


def _is_abandoned(part: Path, pid: int) -> bool:
    """Tell whether the process that made a temporary file is gone."""
    try:
        process = psutil.Process(pid)
        # One that has ended keeps its number until its parent has noticed. A younger
        # process of the same number is not the owner; the margin is for the
        # resolution of the clocks.
        is_over = process.status() == psutil.STATUS_ZOMBIE
        return is_over or bool(process.create_time() > part.stat().st_mtime + 60)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete the temporary files and folders that killed runs have left in a folder.

    Only those of :func:`atomic_path` and the like in this module, on this computer,
    whose process no longer runs are deleted; subfolders are not searched. A folder
    whose replacement was cut short gets its name back.

    Parameters
    ----------
    folder : path-like
        Where to look.

    Returns
    -------
    list of Path
        What was deleted.
    """
    folder = Path(folder)
    deleted = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    for name in names:
        match = _PART.match(name)
        if match is None or match[1] != _host():
            continue
        part = folder / name
        if part.is_symlink() or not _is_abandoned(part, int(match[2])):
            continue
        with suppress(OSError):
            if part.is_dir():
                _discard(part, folder)
            else:
                part.unlink()
            deleted.append(part)
    return deleted
