"""A computation that torch compiles while it is already used."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from napari_unet.network.cropping import Cropping

    Function = Callable[[Tensor, Cropping | None], Tensor]

__all__ = ["CompiledLater", "can_compile"]

_MOST = 4  # shapes: the tiles of one image have four at most

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

    To compile takes a minute, in a thread beside everything else. It begins when a
    shape comes for the second time: the first result never waits, and single small
    images are not worth it.

    Parameters
    ----------
    function : callable
        Of an image and a cropping. It is compiled for each shape and cropping by
        itself, because these decide how much of each map is computed.
    backend : str
        What compiles.
    """

    def __init__(self, function: Function, backend: str = "inductor"):
        self._function = function
        self._backend = backend
        self._lock = threading.Lock()
        self._ready: dict[Any, Function] = {}
        self._seen: set[Any] = set()
        self._thread: threading.Thread | None = None
        self._able = True

    @property
    def is_ready(self) -> bool:
        """Whether anything is compiled."""
        return bool(self._ready)

    def __call__(self, image: Tensor, cropping: Cropping | None) -> Tensor:
        """Compute, with what is compiled for this shape if there is."""
        key = tuple(image.shape), cropping
        with self._lock:
            function = self._ready.get(key)
        if function is not None:
            return function(image, cropping)
        result = self._function(image, cropping)
        self._consider(key, image)
        return result

    def wait(self) -> None:
        """Wait until nothing is being compiled."""
        if self._thread is not None:
            self._thread.join()

    def _consider(self, key: Any, image: Tensor) -> None:
        """Begin to compile for a shape that came again, if nothing else is."""
        with self._lock:
            came_before = key in self._seen
            self._seen.add(key)
            busy = self._thread is not None and self._thread.is_alive()
            if not came_before or busy or not self._able:
                return
            if len(self._ready) == _MOST:
                # Other images have come; torch keeps few results of one function.
                self._ready.clear()
                self._seen = {key}
                torch.compiler.reset()
            self._thread = threading.Thread(
                target=self._compile,
                args=(key, torch.zeros_like(image)),
                name="compile",
                daemon=True,
            )
        self._thread.start()

    @torch.inference_mode()
    def _compile(self, key: Any, image: Tensor) -> None:
        try:
            function = torch.compile(
                self._function, dynamic=False, backend=self._backend
            )
            function(image, key[1])  # the first call compiles
        except Exception as error:
            _log.info("Going on without compiling: %s", error)
            self._able = False
            return
        with self._lock:
            self._ready[key] = function
