"""Checkpoints that are programs: what to tell the user, and how their weights are had.

Nothing here is done without consent: `--trust` on the command line, a dialog in the
Models dock.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_unet.errors import BadModel, NeedsTrust
from napari_unet.models.safety import MAX_FILE, read_checked
from napari_unet.models.trust_child import OUT_OF_MEMORY, PROBLEM, WEIGHTS
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Generator

    from napari_unet.models.safety import CheckedFile

_TICK = 0.1  # seconds
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_RISK = (
    "A file like this can hold any program, and a program can do what you can do: "
    "read, change and delete your files, and send them away.\n\n"
    "If you trust whoever made it, napari-unet takes the weights out of it: in a "
    "process of its own with little time and memory, with stand-ins for the code that "
    "the file names, and keeping nothing but numbers, which are then checked like "
    "those of any file. That makes harm unlikely, not impossible. If you do not know "
    "where the file came from, ask for the weights alone: "
    "torch.save(model.state_dict(), 'weights.pt')."
)


@dataclass(frozen=True)
class Limits:
    """What the process that reads a program may use.

    Parameters
    ----------
    seconds : int
        From its start to its end.
    memory : int
        Bytes beyond those that torch takes by itself and four times the size of the
        file. Held on Linux only.
    """

    seconds: int = 120
    memory: int = 1 << 30


def explain(name: str, error: NeedsTrust) -> str:
    """Say what consent to `convert_steps` means, for a dialog.

    Parameters
    ----------
    name : str
        Of the file, folder or address.
    error : NeedsTrust
        The refusal without it.

    Returns
    -------
    str
        Paragraphs of plain text.
    """
    return f"{name}: {error.__cause__ or error}\n\n{_RISK}"


def convert_steps(
    path: str | Path, limits: Limits | None = None
) -> Generator[Progress, None, CheckedFile]:
    """Take the weights out of a program, in a process of its own.

    To be called with the user's consent only. That process gets an empty folder, few
    environment variables, no input and, where Linux allows it, no network. What it
    writes is checked like any file from a stranger.

    Parameters
    ----------
    path : path
        Of a pickled network or TorchScript; it is not changed.
    limits : Limits, optional
        Others than the usual ones.

    Yields
    ------
    Progress
        Ten a second; closing the generator ends the process.

    Returns
    -------
    CheckedFile
        Plain tensors in their order in the file.

    Raises
    ------
    BadModel
        If there are no weights to be had within the limits.
    """
    path, limits = Path(path).absolute(), limits or Limits()
    with tempfile.TemporaryDirectory(
        prefix="napari-unet-", ignore_cleanup_errors=True
    ) as folder:
        process = _start(path, Path(folder), limits)
        try:
            code = yield from _wait(process, path.name, limits.seconds)
        finally:
            _end(process)
        return _result(path.name, Path(folder), code)


def _start(path: Path, folder: Path, limits: Limits) -> subprocess.Popen[bytes]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadModel(
            f"Cannot read the checkpoint {path}: {error.strerror or error}. Check "
            "the path."
        ) from error
    if size > MAX_FILE:
        raise BadModel(
            f"{path.name} has {size >> 30} GB, more than any U-Net ({MAX_FILE >> 30} "
            "GB at most). Choose a checkpoint of one network."
        )
    # It is read, made plain, made tensors, taken apart and written.
    memory = limits.memory + 4 * size
    places = {"HOME": str(folder), "TMPDIR": str(folder), "TEMP": str(folder)}
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    known = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    module = "napari_unet.models.trust_child"
    # Five seconds more than the parent gives it: that one has the better words.
    numbers = [str(limits.seconds + 5), str(memory)]
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(path), *numbers],
        stdin=subprocess.PIPE,  # its end is our end
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=kept | places | known,
        start_new_session=True,
        creationflags=flags,
    )


def _wait(
    process: subprocess.Popen[bytes], name: str, seconds: int
) -> Generator[Progress, None, int]:
    """Wait for the exit code of the process, within its time."""
    deadline = time.monotonic() + seconds
    while True:
        yield Progress(0, 1, f"taking the weights out of {name}")
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_TICK)
        if time.monotonic() > deadline:
            raise BadModel(
                f"{name} cannot be used. Reading it took longer than {seconds} "
                "seconds and was stopped: it runs for ever or is too large. Ask for "
                "the weights alone: torch.save(model.state_dict(), 'weights.pt')."
            )


def _end(process: Any) -> None:
    """End the process and all that it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    process.stdin.close()


def _result(name: str, folder: Path, code: int) -> CheckedFile:
    """Check what the process has left behind, which may be anything."""
    weights, problem = folder / WEIGHTS, folder / PROBLEM
    if code == 0 and _is_plain(weights):
        try:
            checked = read_checked(weights)
        except BadModel as error:
            raise BadModel(str(error).replace(WEIGHTS, name)) from error
        return _in_order(checked)
    if code == OUT_OF_MEMORY:
        reason = (
            "Reading it takes more memory than its size warrants: it is damaged or "
            "made to fill the memory."
        )
    elif code == 0 and _is_plain(problem):
        with problem.open(encoding="utf-8", errors="replace") as file:
            reason = "".join(c if c.isprintable() else " " for c in file.read(400))
    else:
        reason = f"The process that read it ended unexpectedly (code {code})."
    raise BadModel(
        f"{name} cannot be used. {reason} Ask for the weights alone: "
        "torch.save(model.state_dict(), 'weights.pt')."
    )


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _in_order(checked: CheckedFile) -> CheckedFile:
    """Bring tensors into the order that the process has noted beside them."""
    try:
        order = json.loads(checked.metadata.get("order", ""))
        tensors = {name: checked.tensors[name] for name in order}
    except (ValueError, TypeError, KeyError):
        return checked
    if tensors.keys() != checked.tensors.keys():
        return checked
    return replace(checked, tensors=tensors, tree=tensors, metadata={})
