"""Ctrl-C ends the program at once, even within a long computation of a library."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from threading import Thread

import typer

from napari_unet.errors import Cancelled

STOPPED = "Stopped by Ctrl-C. The files written so far are complete."
_PATIENCE = 1.0  # seconds for what runs to tidy up


def end_soon_when_interrupted() -> None:
    """Let Ctrl-C end this process where Python does not come to it in time.

    Python hears of a signal between its own instructions only, and one of these may
    be a network's way back through a large patch, which takes a minute.
    """
    inbox, outbox = socket.socketpair()
    outbox.setblocking(False)
    signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
    Thread(target=_wait, args=(inbox, outbox), daemon=True).start()


def end_interrupted(message: str = STOPPED) -> None:
    """Say so and end this process; unloading torch would take seconds."""
    sys.stdout.flush()
    typer.echo(f"Error: {message}", err=True)
    os._exit(Cancelled.exit_code)


def _wait(inbox: socket.socket, outbox: socket.socket) -> None:
    """Wait for the interrupt; both ends of the pipe stay open as long."""
    with inbox, outbox:
        while inbox.recv(1) != bytes([signal.SIGINT]):
            pass
        time.sleep(_PATIENCE)
        end_interrupted()
