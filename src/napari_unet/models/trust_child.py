"""The far end of `trust.convert_steps`: takes the weights out of one file.

``python -m napari_unet.models.trust_child FILE SECONDS BYTES`` writes
`WEIGHTS` into the current folder, or `PROBLEM`. It ends when its input does, with the
parent that holds the other end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from napari_unet.errors import BadModel

WEIGHTS = "weights.safetensors"
PROBLEM = "problem.txt"
OUT_OF_MEMORY = 5  # exit code
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of Linux


def main(path: Path, seconds: int, memory: int) -> None:
    """Write the weights of a file, or why that cannot be."""
    _leave_network()
    _limit_time(seconds)
    Thread(target=_end_with_parent, daemon=True).start()
    # Only now: the network is left by processes of one thread, and torch has several.
    import safetensors.torch
    import torch

    from napari_unet.models.stand_ins import take_weights

    torch.set_num_threads(1)
    _limit_memory(memory)
    code = 0
    try:
        weights = take_weights(path)
        order = {"order": json.dumps(list(weights))}
        safetensors.torch.save_file(weights, WEIGHTS, order)
    except BadModel as error:
        Path(PROBLEM).write_text(str(error), encoding="utf-8")
    except BaseException as error:
        text = str(error).strip().partition("\n")[0]
        if isinstance(error, MemoryError) or "allocate" in text:
            code = OUT_OF_MEMORY
        else:
            what = f"It is damaged ({type(error).__name__}: {text[:200]})."
            Path(PROBLEM).write_text(what, encoding="utf-8", errors="replace")
    os._exit(code)


def _leave_network() -> None:
    """Go where there is no network, if Linux lets us."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_NETWORK):  # only root may without becoming another user
            libc.unshare(_NEW_USER | _NEW_NETWORK)


def _limit_time(seconds: int) -> None:
    """Let the system end this process, should the parent not be there to do it."""
    if os.name == "posix":
        import resource

        signal.setitimer(signal.ITIMER_REAL, seconds)
        _limit(resource, resource.RLIMIT_CPU, seconds)
        _limit(resource, resource.RLIMIT_CORE, 0)


def _limit_memory(more: int) -> None:
    """Let no more memory be had than now and so many bytes, where Linux tells us."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource, resource.RLIMIT_AS, pages * resource.getpagesize() + more)
        _limit(resource, resource.RLIMIT_FSIZE, more)


def _limit(resource: Any, kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
