"""Read the files named on the standard input; tell of each what it took and gave.

Writes one line of JSON a file. What no reader may do is recorded by an audit hook.
"""

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from napari_unet.errors import BadModel
from napari_unet.models.library import load_model
from napari_unet.models.safety import read_checked
from napari_unet.models.stand_ins import take_weights

FORBIDDEN = (
    "pickle.find_class",
    "os.",
    "subprocess.",
    "shutil.",
    "socket.",
    "urllib.",
    "webbrowser.",
    "code.__new__",
    "exec",
    "compile",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
HARMLESS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
READ = {
    "read_checked": lambda path: read_checked(path).tensors,
    "take_weights": lambda path: take_weights(Path(path)),
    "load_model": lambda path: load_model(path).network.state_dict(),
}[sys.argv[1]]
done: list[str] = []
watching = False


def hook(event, arguments):
    if not watching:
        return
    writes = event == "open" and arguments[2] & WRITING
    forbidden = event.startswith(FORBIDDEN) and not event.startswith(HARMLESS)
    # Python's own codecs are imported when they are first needed.
    forbidden = forbidden and f"{os.sep}encodings{os.sep}" not in str(arguments)
    if writes or forbidden:
        done.append(f"{event} {str(arguments)[:100]}")


def peak_memory() -> int:
    """Return the peak of the memory since `forget_peak` in KiB, on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def fingerprint(tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + content)
    return digest.hexdigest()


def is_sound(tensors) -> bool:
    return all(
        isinstance(name, str)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and (not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()))
        for name, tensor in tensors.items()
    )


def check(path) -> dict:
    global watching
    done.clear()
    answer = {"path": path}
    forget_peak()
    start = time.process_time()  # of this process: others may be busy
    watching = True
    try:
        tensors = READ(path)
    except BadModel as error:
        answer["refused"] = str(error)
    except BaseException as error:
        answer["crashed"] = repr(error)
    else:
        answer["read"] = fingerprint(tensors)
        answer["sound"] = is_sound(tensors)
    watching = False
    answer["seconds"] = time.process_time() - start
    answer["done"] = list(done)
    answer["peak"] = peak_memory()
    return answer


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.addaudithook(hook)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(check(line.rstrip("\n"))) + "\n")
        sys.stdout.flush()
