"""The far end of `steps.in_child`: runs one generator for a parent process.

``python -m napari_unet.child`` reads a function and its arguments from the standard
input, then a token for each step, and writes each answer to the standard output.
The end of its input, whatever caused it, ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, BinaryIO

from napari_unet.errors import UnetError
from napari_unet.steps import GRACE, ChildError, read_frame, write_message

Inbox = SimpleQueue[list[bytearray] | None]  # None: no more steps are wanted


def main() -> None:
    """Serve the parent until it wants no more steps, and end at once."""
    code = 0
    try:
        _serve()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    # Not as Python ends: unloading torch would take seconds. All files are written
    # and closed, and what the generator had went with it.
    os._exit(code)


def _serve() -> None:
    inlet, outlet = _take_pipes()
    faulthandler.enable()
    # Ctrl-C in a terminal reaches both processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)
    inbox: Inbox = SimpleQueue()
    ending = Event()
    Thread(target=_listen, args=(inlet, inbox, ending), daemon=True).start()
    generator: Any = None
    answer: Any
    try:
        while frame := inbox.get():
            try:
                message = pickle.loads(frame[0], buffers=frame[1:])
                if generator is None:
                    (function, args, kwargs), message = message
                    generator = function(*args, **kwargs)
                # No array stays here while the step is computed.
                frame = args = kwargs = answer = None
                try:
                    answer = "yield", generator.send(message)
                except StopIteration as stop:
                    answer = "return", stop.value
                write_message(outlet, answer)
            except BaseException as error:
                known: Exception = ChildError(f"{type(error).__name__}: {error}")
                if isinstance(error, UnetError):
                    known = type(error)(str(error))
                write_message(outlet, ("error", (known, traceback.format_exc())))
    finally:
        ending.set()
        if generator is not None:
            generator.close()


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to ourselves: what others print goes to the standard error."""
    inlet, outlet = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return inlet, outlet


def _listen(inlet: BinaryIO, inbox: Inbox, ending: Event) -> None:
    """Pass frames on; after the last end this process, even within a long step."""
    try:
        while True:
            inbox.put(read_frame(inlet))
    except (EOFError, OSError):
        inbox.put(None)
        if ending.wait(GRACE):
            time.sleep(GRACE)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
