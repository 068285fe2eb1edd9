"""Fixtures of the tests of files."""

import psutil
import pytest


@pytest.fixture
def leave_memory(monkeypatch):
    """Return what lets this computer have so many bytes of free memory."""

    class Memory:
        total = 2**34  # dask asks, too

    def leave(nbytes):
        Memory.available = nbytes
        monkeypatch.setattr(psutil, "virtual_memory", Memory)

    return leave
