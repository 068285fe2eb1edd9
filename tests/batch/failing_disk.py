"""A disk on which the N-th attempt to write fails."""

import builtins
import errno
import io
import os
import stat
from contextlib import contextmanager

FOLDER_SYNC = "sync of a folder"
NEEDS_NO_SPACE = ("replace", "rename", FOLDER_SYNC)


class FailingDisk:
    """Counts whatever would change the disk, and lets one attempt fail.

    Creating, writing, syncing, renaming and making folders count, in Python's own
    calls, which all libraries here use: for each there is one system call.

    Parameters
    ----------
    fail_at : int
        Which attempt fails, from 1.
    number : int
        With which error. A disk that is full stays so for all that needs space.
    """

    def __init__(self, fail_at, number):
        self.calls = 0
        self.failed = ""  # which attempt it was, in words
        self._fail_at, self._number = fail_at, number

    def tick(self, kind, path=""):
        self.calls += 1
        is_full = self.failed and self._number == errno.ENOSPC
        if self.calls == self._fail_at or (is_full and kind not in NEEDS_NO_SPACE):
            self.failed = self.failed or " ".join([kind, os.path.basename(path)])
            raise OSError(self._number, os.strerror(self._number))

    def counted(self, name):
        function = getattr(os, name)

        def call(*arguments, **options):
            self.tick(name)
            return function(*arguments, **options)

        return call

    def make_folder(self, path, *arguments, original=os.mkdir, **options):
        if not os.path.isdir(path):  # else there is nothing to write
            self.tick("mkdir")
        original(path, *arguments, **options)

    def sync(self, descriptor, original=os.fsync):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        self.tick(FOLDER_SYNC if is_folder else "sync")
        original(descriptor)


@contextmanager
def failing_disk(monkeypatch, fail_at, number):
    """Let an attempt to write fail; see `FailingDisk`."""
    disk = FailingDisk(fail_at, number)
    original, original_open = io.open, os.open

    class File(io.FileIO):
        def write(self, data):
            disk.tick("write")
            return super().write(data)

    def open_file(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None
    ):
        if not set(mode) & set("wax+"):
            return original(file, mode, buffering, encoding, errors, newline)
        if not isinstance(file, int) and os.fspath(file) != os.devnull:
            disk.tick("open")
        raw = File(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        wrapper = io.BufferedRandom if "+" in mode else io.BufferedWriter
        binary = wrapper(raw)
        if "b" in mode:
            return binary
        return io.TextIOWrapper(binary, encoding, errors, newline)

    def open_descriptor(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            disk.tick("open", path)
        return original_open(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)
        patch.setattr(os, "open", open_descriptor)
        patch.setattr(os, "fsync", disk.sync)
        patch.setattr(os, "mkdir", disk.make_folder)
        for name in ("replace", "rename"):
            patch.setattr(os, name, disk.counted(name))
        yield disk
