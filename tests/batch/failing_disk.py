"""A disk on which the N-th attempt to write fails."""

import builtins
import io
import os
from contextlib import contextmanager


class FailingDisk:
    """Counts whatever would change the disk, and lets one attempt fail.

    Creating, writing, syncing, renaming and making folders count, in Python's own
    calls, which all libraries here use.
    """

    def __init__(self, fail_at, number):
        self.calls = 0
        self._fail_at, self._number = fail_at, number

    @property
    def has_failed(self):
        return self.calls >= self._fail_at

    def tick(self):
        self.calls += 1
        if self.calls == self._fail_at:
            raise OSError(self._number, os.strerror(self._number))

    def counted(self, function):
        def call(*arguments, **options):
            self.tick()
            return function(*arguments, **options)

        return call


@contextmanager
def failing_disk(monkeypatch, fail_at, number):
    """Let an attempt to write fail, and all others succeed."""
    disk = FailingDisk(fail_at, number)
    original, original_open = io.open, os.open

    class File(io.FileIO):
        def write(self, data):
            disk.tick()
            return super().write(data)

    def open_file(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None
    ):
        if not set(mode) & set("wax+"):
            return original(file, mode, buffering, encoding, errors, newline)
        if not isinstance(file, int) and os.fspath(file) != os.devnull:
            disk.tick()
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
            disk.tick()
        return original_open(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)
        patch.setattr(os, "open", open_descriptor)
        for name in ("fsync", "replace", "rename", "mkdir"):
            patch.setattr(os, name, disk.counted(getattr(os, name)))
        yield disk
