"""A computation that torch compiles while it is already used."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from napari_unet.network.cropping import Cropping

    Function = Callable[[Tensor, Cropping | None], Tensor]

__all__ = ["CompiledLater", "can_compile"]

# Compiling takes a minute, which images of a few seconds are not worth.
USED_SECONDS = 10
# torch keeps as many results of one function, for all networks of a process together;
# other shapes go on as they are.
MOST_RESULTS = 8

_log = logging.getLogger(__name__)


def can_compile(device: torch.device) -> bool:
    """Tell whether torch can compile for a device: it needs Triton and a C compiler."""
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang", "cl")
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and any(shutil.which(name) for name in compilers if name)
    )


class CompiledLater:
    """Computes at once, and faster as soon as torch has compiled.

    That begins when a shape has been in use for `USED_SECONDS`, in a thread beside
    everything else, so that no result ever waits for it.

    Parameters
    ----------
    function : callable
        Of an image and a cropping. It is compiled for each shape and cropping by
        itself, because these decide how much of each map is computed.
    backend : str
        What compiles.
    """

    _lock = threading.Lock()
    _begun = 0  # results of all objects of this class
    _thread: threading.Thread | None = None  # one at a time compiles

    def __init__(self, function: Function, backend: str = "inductor"):
        self._function = function
        self._backend = backend
        self._ready: dict[Any, Function] = {}
        self._first_used: dict[Any, float] = {}

    @property
    def is_ready(self) -> bool:
        """Whether anything is compiled."""
        return bool(self._ready)

    def __call__(self, image: Tensor, cropping: Cropping | None) -> Tensor:
        """Compute, with what is compiled for this shape if there is."""
        key = tuple(image.shape), cropping
        function = self._ready.get(key)
        # Before 2.13, torch runs nothing compiled while it compiles in another thread.
        if function is not None and not self._is_compiling():
            try:
                # If a switch of torch has changed since, it would compile here.
                with torch.compiler.set_stance("eager_on_recompile"):
                    return function(image, cropping)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                del self._ready[key]
                self._give_up(error)
        result = self._function(image, cropping)
        if function is None:
            self._consider(key, image)
        return result

    @classmethod
    def wait(cls) -> None:
        """Wait until nothing is being compiled."""
        if cls._thread is not None:
            cls._thread.join()

    @staticmethod
    def _is_compiling() -> bool:
        thread = CompiledLater._thread
        return thread is not None and thread.is_alive()

    def _consider(self, key: Any, image: Tensor) -> None:
        """Begin to compile for a shape that is used much, if nothing else is."""
        shared = CompiledLater
        now = time.monotonic()
        with self._lock:
            first = self._first_used.setdefault(key, now)
            is_first_use = first == now
            if is_first_use or now - first < USED_SECONDS or self._is_compiling():
                return
            if shared._begun >= MOST_RESULTS:
                return
            shared._begun += 1
            # Not a daemon: torch aborts a process that ends while it compiles.
            shared._thread = threading.Thread(
                target=self._compile,
                args=(key, torch.zeros_like(image)),
                name="compile",
            )
            shared._thread.start()

    @torch.inference_mode()
    def _compile(self, key: Any, image: Tensor) -> None:
        # The compiler is a Python program: whenever another thread has waited for a
        # device or a lock, it would wait for as long as this to go on.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            function = torch.compile(
                self._function, dynamic=False, backend=self._backend
            )
            function(image, key[1])  # the first call compiles
        except Exception as error:
            self._give_up(error)
        else:
            self._ready[key] = function
        finally:
            sys.setswitchinterval(interval)

    @staticmethod
    def _give_up(error: Exception) -> None:
        _log.info("Going on without compiling: %s", error)
        CompiledLater._begun = MOST_RESULTS  # nor is it tried again
