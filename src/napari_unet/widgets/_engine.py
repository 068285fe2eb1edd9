"""The engine under the docks, imported in a thread once a dock is drawn.

Importing torch takes seconds, and no dock needs it before a model is used: modules of
the docks import neither torch nor dask, steps that run in a thread do.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import QObject, QTimer

from napari_unet.steps import Progress
from napari_unet.widgets._worker import start_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


_DELAY = 200  # ms, in which a dock that was just made is drawn


def when_drawn(dock: QObject, call: Callable[[], object]) -> None:
    """Call soon; if that may import torch, once a dock that was just made is drawn.

    Libraries that are mapped meanwhile hold up whoever draws. Nothing is called once
    the dock has gone.
    """
    timer = QTimer(dock)
    timer.setSingleShot(True)
    timer.timeout.connect(call)
    timer.timeout.connect(timer.deleteLater)
    timer.start(0 if "torch" in sys.modules else _DELAY)


def load_engine(dock: QObject, *modules: str) -> None:
    """Import modules in a thread.

    Parameters
    ----------
    dock : QObject
        For which they are imported, unless it goes before.
    *modules : str
        Names within the package, of what clicks will need.
    """
    when_drawn(
        dock,
        lambda: start_worker(
            _import_steps(modules),
            title="",
            on_progress=lambda step: None,
            on_result=lambda result: None,
            on_error=lambda message: None,  # it is said when it is needed
            on_finished=lambda: None,
        ),
    )


def _import_steps(modules: tuple[str, ...]) -> Generator[Progress, None, None]:
    yield Progress(0, 1, "loading")
    import_torch()
    for module in modules:
        import_module(f"napari_unet.{module}")
        yield Progress(0, 1, "loading")


def import_torch() -> None:
    """Import torch in a thread, and let the viewer go on meanwhile.

    Mapping its libraries takes a third of a second, and several from a cold disk.
    `import` keeps the interpreter locked meanwhile; a call by ctypes does not.
    """
    spec = find_spec("torch")
    if "torch" not in sys.modules and os.name == "posix" and spec and spec.origin:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        library = Path(spec.origin).parent / "lib" / f"libtorch_python.{suffix}"
        open_library = ctypes.CDLL(None).dlopen
        open_library.restype = ctypes.c_void_p
        open_library(os.fsencode(library), ctypes.c_int(os.RTLD_NOW))
    import_module("torch")
