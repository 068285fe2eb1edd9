"""Generators that the tests of `in_child` run in other processes."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_unet import errors
from napari_unet.files.atomic import atomic_path
from napari_unet.steps import Progress


@dataclass(frozen=True)
class Report:
    step: int
    preview: np.ndarray
    path: Path


def count_steps(total, scale=1):
    for done in range(total):
        yield Progress(done * scale, total * scale, f"step {done}")
    return {"steps": total}


def echo_steps(*values):
    """Yield the arguments, then what is sent; return at None."""
    answer = yield values
    while answer is not None:
        answer = yield answer
    return values


def report_steps(shape):
    yield Report(1, np.full(shape, 7, np.uint16), Path("a") / "b")


def return_tuple_steps():
    yield None
    return 1, 2


def raise_steps(name, text):
    yield 1
    raise getattr(errors, name)(text)


def fail_steps(kind="ValueError"):
    yield 1
    if kind == "SystemExit":
        sys.exit(3)
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind]("odd shape")


def unpicklable_steps():
    yield 1
    yield lambda: None


def return_unpicklable_steps():
    yield 1
    return threading.Lock()


def chatty_steps():
    for step in range(20):
        sys.stdout.write("out" * 10_000)
        sys.stderr.write("error" * 10_000)
        os.write(1, b"raw" * 10_000)
        subprocess.run(["echo", "from a program"], check=True)
        warnings.warn("a warning", stacklevel=1)
        yield step


def read_input_steps():
    yield sys.stdin.read()


def exit_steps():
    sys.stdout.write("last words\n")
    yield 1
    os._exit(7)


def crash_steps():
    yield 1
    ctypes.string_at(0)


def kill_steps():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def log_steps(log, seconds=0.0):
    """Write a line for each step begun, and one when closed."""
    try:
        for step in range(1000):
            with log.open("a") as file:
                file.write(f"{step}\n")
            yield step
            time.sleep(seconds)
    finally:
        with log.open("a") as file:
            file.write("closed\n")


def slow_closing_steps(log):
    try:
        yield os.getpid()
    finally:
        time.sleep(0.1)
        log.write_text("closed")
        time.sleep(60)


def busy_steps(how):
    """Say who computes, then compute without ever yielding."""
    yield os.getpid()
    values = np.random.default_rng(0).random((200, 200))
    while how == "numpy":
        values = np.tanh(values @ values)
    while how == "sleep":
        time.sleep(100)
    # A PyDLL call keeps the interpreter locked, so that no other thread can run.
    ctypes.PyDLL(None).sleep(100)
    yield 0


def stubborn_steps():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield os.getpid()
    ctypes.PyDLL(None).sleep(100)
    yield 0


def thread_left_steps():
    threading.Thread(target=time.sleep, args=(100,)).start()
    yield os.getpid()


def slow_exit_steps(fails):
    atexit.register(time.sleep, 60)
    yield os.getpid()
    if fails:
        raise ValueError("odd shape")
    return "the end"


def write_steps(path):
    """Come half way with a file, and no further."""
    yield 1
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        time.sleep(100)
    yield 2


def memory_steps(array):
    """The largest and the usual resident size in MiB, with the array here."""
    import resource

    yield float(array[-1])
    yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return array


def surroundings_steps(with_torch=False):
    threads = None
    if with_torch:
        import torch

        threads = torch.get_num_threads()
    yield {
        "modules": {name.split(".")[0] for name in sys.modules},
        "nice": os.nice(0),
        "threads": threads,
        "limit": os.environ["OMP_NUM_THREADS"],
        "interrupts": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "pid": os.getpid(),
    }
