"""Long computations are generators: each ``yield`` is a tick and a cancel point.

A function whose name ends in ``_steps`` yields :class:`Progress` and returns its
result. Closing the generator cancels it. :func:`in_child` runs one in a process
of its own.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, BinaryIO, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Yielded = TypeVar("Yielded", covariant=True)
Sent = TypeVar("Sent", contravariant=True)
Result = TypeVar("Result", covariant=True)
Ticked = TypeVar("Ticked")

# Seconds that an unwanted child has to come to its next yield, and then once more
# to run its ``finally`` blocks: it is gone within a second.
GRACE = 0.4
_KEPT_OUTPUT = 1 << 16


@dataclass(frozen=True)
class Progress:
    """How far a computation is.

    Parameters
    ----------
    done, total : int
        Finished units of work and their number; ``total`` may grow when a tile
        is split. A heartbeat repeats the same ``done``.
    message : str
        What is being done, in words, e.g. ``"tile 14 of 36"``.
    note : str
        Something the user should know and that stays true, e.g. that the GPU
        cannot be used. Sent once.
    """

    done: int
    total: int
    message: str = ""
    note: str = ""


def describe_seconds(seconds: float) -> str:
    """Say how long something took: 0.4 s, 12 s, 3:10, 1:02:10.

    Parameters
    ----------
    seconds : float
        Not negative.
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def mapped_steps(
    steps: Generator[Ticked, None, Result],
    change: Callable[[Ticked], Iterable[Yielded]],
) -> Generator[Yielded, Any, Result]:
    """Pass on other ticks: none, one or several for each.

    Parameters
    ----------
    steps : generator
        Closed with this one.
    change : callable
        From a tick to those that are yielded in its place. What is sent goes to
        them, if they are a generator.

    Returns
    -------
    object
        What the generator returns.
    """
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            yield from change(step)


def seldom_steps(
    steps: Generator[Ticked, None, Result], interval: float = 0.25
) -> Generator[Ticked, Any, Result]:
    """Pass on some of many ticks.

    Parameters
    ----------
    steps : generator
        One that yields more often than anybody wants to know.
    interval : float
        Seconds between two ticks at least; the first comes after as many.

    Returns
    -------
    object
        What the generator returns.
    """
    passed = time.monotonic()

    def seldom(step: Ticked) -> Generator[Ticked, None, None]:
        nonlocal passed
        if time.monotonic() >= passed + interval:
            yield step
            passed = time.monotonic()

    return mapped_steps(steps, seldom)


def run_to_end(
    steps: Generator[Ticked, None, Result],
    on_step: Callable[[Ticked], object] = lambda step: None,
) -> Result:
    """Exhaust a generator and return its result: the blocking form.

    Parameters
    ----------
    steps : generator
        Any generator of this package whose name ends in ``_steps``. Closed in any
        case.
    on_step : callable
        Gets every tick.

    Returns
    -------
    object
        What the generator returns.
    """
    with closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            on_step(step)


def in_child(
    function: Callable[Arguments, Generator[Yielded, Sent, Result]],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> ChildSteps[Yielded, Sent, Result]:
    """Run a generator function in a process of its own, as if it ran here.

    The child computes only while this side waits for its next yield. It ends with
    the generator, and with this process however that ends.

    Parameters
    ----------
    function : callable
        A generator function of a module, whose name ends in ``_steps``.
    *args, **kwargs
        Its arguments. These, and all that is yielded, sent and returned, should
        be plain data, arrays, paths, and dataclasses made of them.

    Returns
    -------
    ChildSteps
        The generator; the process starts with the first step. It raises the
        child's ``UnetError`` as it is and everything else as `ChildError`.
    """
    if function.__module__ == "__main__" or not function.__name__.endswith("_steps"):
        raise ValueError(f"{function} must be of a module and named ..._steps.")
    return ChildSteps((function, args, kwargs))


class ChildError(Exception):
    """A child process failed in a way that nobody foresaw, or was stopped.

    ``__cause__`` holds its traceback or last output, for a bug report. Not a
    ``RuntimeError``, because superqt's worker swallows those.
    """


class ChildSteps(Generator[Yielded, Sent, Result]):
    """The generator of `in_child`; any thread may cancel or close it at any time."""

    def __init__(self, request: object) -> None:
        self._request: object = request
        self._process: Any = None
        self._output = bytearray()
        self._cancelled = self._finished = False

    def send(self, value: Any) -> Yielded:
        """Let the child run to its next yield."""
        if self._finished:
            raise StopIteration
        try:
            if self._process is None:
                self._start()
                value, self._request = (self._request, value), None
            kind, payload = self._exchange(value)
        except BaseException:
            self.close()
            raise
        if kind == "yield":
            return payload  # type: ignore[no-any-return]
        self.close()
        if kind == "return":
            raise StopIteration(payload)
        error, details = payload
        raise error from ChildError(details)

    def throw(self, kind: Any, value: Any = None, traceback: Any = None, /) -> Any:
        """Close the child and raise the exception here."""
        self.close()
        raise kind if value is None else value

    def cancel(self) -> None:
        """Ask the child to end, without waiting until it does.

        Whoever waits for a step gets that step or, after `GRACE`, a `ChildError`.
        """
        self._cancelled = True
        if self._process is not None:
            with suppress(OSError):  # it has gone already
                self._process.stdin.close()

    def close(self) -> None:
        """End the child and wait for that."""
        self._finished = True
        self.cancel()
        if (process := self._process) is None:
            return
        # Python code ends by itself within 2 * GRACE (see child.py), native code that
        # keeps the interpreter locked does not.
        for insist, patience in (process.terminate, 2.5 * GRACE), (process.kill, GRACE):
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
            insist()
        process.wait()
        self._collector.join(GRACE)
        process.stdout.close()

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        # With -P a file in the current folder cannot pose as a library.
        command = [sys.executable, "-P", "-m", "napari_unet.child"]
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        flags |= getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0)
        process: Any = subprocess.Popen(
            command, env=_environment(), creationflags=flags, **pipes
        )
        pipe_and_end = (process.stderr, self._output)
        self._collector = Thread(target=_collect, args=pipe_and_end, daemon=True)
        self._collector.start()
        self._process = process
        if self._cancelled:  # while it started
            self.cancel()

    def _exchange(self, message: object) -> Any:
        try:
            write_message(self._process.stdin, message)
            frame = read_frame(self._process.stdout)
        except (EOFError, OSError, ValueError) as error:
            if self._cancelled:
                raise ChildError("The computation was stopped.") from None
            if isinstance(error, ValueError):  # of pickle
                raise
        else:
            return pickle.loads(frame[0], buffers=frame[1:])
        self.close()
        code = self._process.returncode
        what = f"signal {-code}" if code < 0 else f"exit code {code}"
        what = f"The computation's own process ended unexpectedly ({what}). "
        what += "Try again, and report it if it happens again."
        if code == -9:  # so Linux ends a process when memory is short
            what += " Memory may have run out: close other programs before."
        raise ChildError(what) from ChildError(self._output.decode(errors="replace"))


def _environment() -> dict[str, str]:
    """The child finds the same modules and leaves a core to the viewer."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    own = dict.fromkeys(limits, str(max(1, cores - 1)))
    # A limit that the user has set wins.
    return own | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def _collect(pipe: BinaryIO, kept: bytearray) -> None:
    with pipe:
        while chunk := os.read(pipe.fileno(), _KEPT_OUTPUT):
            kept += chunk
            del kept[:-_KEPT_OUTPUT]


# A frame is a pickle and, uncopied, the memory of its arrays. Pickle can run code,
# but here it only reads what a process of the same user wrote into a pipe that no
# other can open: whoever controls one end needs no pickle to act as that user.


def write_message(file: BinaryIO, message: object) -> None:
    """Write a frame: the number of its parts, their sizes, and the parts."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    file.write(struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes))
    for part in parts:
        file.write(part)
    file.flush()


def read_frame(file: Any) -> list[bytearray]:
    """Read one frame; `EOFError` when the other end has gone."""

    def read(size: int) -> bytearray:
        data = bytearray(size)
        if file.readinto(data) < size:
            raise EOFError
        return data

    (count,) = struct.unpack("<Q", read(8))
    return [read(size) for size in struct.unpack(f"<{count}Q", read(8 * count))]
