"""What is checked before a byte of an untrusted checkpoint is interpreted.

The order: a regular file of a sane size; its container, by magic; the container's own
structure; for pickles every instruction and every tensor's place (`pickled`); only
then a reader of torch or safetensors, torch's being the one that runs no code; at last
that all weights are finite. A file that fails is refused: there is no second try in a
less safe way.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch
from torch import Tensor

from napari_unet.errors import BadModel, NeedsTrust
from napari_unet.models.beside import Array, Fields, Unread, unread
from napari_unet.models.containers import (
    MAX_MEMBERS,
    MAX_PICKLE,
    ONNX,
    SAFETENSORS,
    TORCH_ZIP,
    container,
    read_archive,
)
from napari_unet.models.onnx_graph import read_graph
from napari_unet.models.pickled import Followed, Storage, follow_pickle
from napari_unet.models.safetensors_file import check_header, load_tensors

MAX_FILE = 8 << 30  # bytes
MAX_ONNX = (2 << 30) - 1  # bytes; there are no larger protobuf messages
_DAMAGED = "Get the file again."
_ONE_LIST = Lock()
_CONSENT = (
    "Ask for the weights alone: torch.save(model.state_dict(), 'weights.pt'). If you "
    "trust whoever made it, Import… in the Models dock or `napari-unet models import "
    "--trust` takes them out of it."
)


@dataclass(frozen=True)
class CheckedFile:
    """What a checkpoint holds, read without running any of it.

    Attributes
    ----------
    tensors : dict
        All tensors by their place in `tree`, joined by dots: "state_dict.head.bias".
    tree : dict
        All that the file holds: dicts, lists and tuples of plain values, tensors and
        arrays of numpy.
    container : str
        "safetensors", "torch zip", "torch legacy" or "ONNX"; of the last the whole
        content is the one tensor, "graph".
    metadata : dict
        The texts in the header of a safetensors file.
    """

    tensors: dict[str, Tensor]
    tree: Any
    container: str
    metadata: dict[str, str] = field(default_factory=dict)


def read_checked(path: str | Path) -> CheckedFile:
    """Read a ``.safetensors`` file or one that ``torch.save`` wrote, safely.

    Parameters
    ----------
    path : path
        Of the file. It may come from anyone; its suffix does not matter.

    Returns
    -------
    CheckedFile
        Tensors on the CPU, dense, finite and without gradients.

    Raises
    ------
    NeedsTrust
        If it asks for code to be run, as pickled networks and TorchScript do. None
        was; ``__cause__`` says what it asks for, without advice.
    BadModel
        If the file is missing, damaged, no such checkpoint or holds more than
        plain weights need.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            return _read(path, file)
    except OSError as error:
        raise BadModel(
            f"Cannot read the checkpoint {path}: {error.strerror or error}. Check "
            "the path."
        ) from error
    except NeedsTrust as error:
        raise NeedsTrust(f"{path.name} cannot be used. {error} {_CONSENT}") from error
    except BadModel as error:
        raise BadModel(f"{path.name} cannot be used. {error}") from error


def _open(path: Path) -> BinaryIO:
    """Open a file, but not a pipe or device, which could keep us waiting for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "It is not a regular file")
    return path.open("rb")


def _read(path: Path, file: BinaryIO) -> CheckedFile:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE:
        raise BadModel(
            f"It has {size >> 30} GB, more than any U-Net ({MAX_FILE >> 30} GB at "
            "most). Choose a checkpoint of one network."
        )
    start = file.read(512)
    file.seek(max(0, size - 512))
    kind = container(start, file.read(512))
    if kind == ONNX:
        return _read_onnx(file, size)
    metadata: dict[str, str] = {}
    if kind == SAFETENSORS:
        metadata = check_header(file, size)
        content: Any = load_tensors(path)
        seen = content
    else:
        check = _check_zip if kind == TORCH_ZIP else _check_legacy
        followed = check(file, size)
        content = _load_torch(file, followed.beside)
        seen = followed.tree
    tensors: dict[str, Tensor] = {}
    try:
        tree = _plain(content, seen, (), tensors)
    except (ValueError, TypeError) as error:  # the two readers saw different things
        raise BadModel(f"Its description contradicts itself. {_DAMAGED}") from error
    if not tensors:
        raise BadModel("It holds no tensors. Choose a checkpoint of a network.")
    _check_finite(tensors)
    return CheckedFile(tensors, tree, kind, metadata)


def _read_onnx(file: BinaryIO, size: int) -> CheckedFile:
    if size > MAX_ONNX:
        raise BadModel(f"It has {size >> 30} GB, more than an ONNX file can have.")
    file.seek(0)
    content = bytearray(file.read())
    read_graph(content)
    graph = torch.frombuffer(content, dtype=torch.uint8)
    return CheckedFile({"graph": graph}, {"graph": graph}, ONNX)


# --- what torch.save writes --------------------------------------------------


def _check_zip(file: BinaryIO, size: int) -> Followed:
    """Check a zip archive of torch, its pickle, and that they agree."""
    content, sizes = read_archive(file, size)
    followed = follow_pickle(content)
    _check_tree(followed)
    for key, storage in followed.storages.items():
        if storage.nbytes != sizes.get(key):
            raise BadModel(
                f"Its weights {key[:40]!r} should have {storage.nbytes} bytes but have "
                f"{sizes.get(key, 0)}. {_DAMAGED}"
            )
    return followed


def _check_legacy(file: BinaryIO, size: int) -> Followed:
    """Check the pickles and the storages of a file of torch < 1.6."""
    file.seek(0)
    content = file.read(MAX_PICKLE)
    numbers = follow_pickle(content)
    version = follow_pickle(content, numbers.end, most=100)
    system = follow_pickle(content, version.end, most=100)
    followed = follow_pickle(content, system.end)
    _check_tree(followed)
    keys = follow_pickle(content, followed.end, most=4 * MAX_MEMBERS)
    if version.tree != 1001 or type(system.tree) is not dict:
        raise BadModel(f"It is damaged or of an unknown version of torch. {_DAMAGED}")
    if system.tree.get("little_endian") is not True:
        raise BadModel(
            "It was written by a big-endian computer, which torch cannot read. Save "
            "it again there with torch 1.6 or newer."
        )
    found = keys.tree if type(keys.tree) is list else []
    if not all(type(key) is str for key in found) or (
        sorted(found) != sorted(followed.storages)
    ):
        raise BadModel(f"The list of its weights is damaged. {_DAMAGED}")
    _check_storages(file, keys.end, size, [followed.storages[key] for key in found])
    return followed


def _check_storages(
    file: BinaryIO, place: int, size: int, storages: list[Storage]
) -> None:
    """Check that the storages of a legacy file lie behind each other from a place on.

    Torch reads no further, and real files have a line break behind the last one.
    """
    end = place + sum(8 + storage.nbytes for storage in storages)
    if end > size:
        raise BadModel(f"It is incomplete ({size} of {end} bytes). {_DAMAGED}")
    for storage in storages:
        file.seek(place)
        if file.read(8) != struct.pack("<q", storage.count):
            raise BadModel(
                f"Its weights {storage.key[:40]!r} do not have the announced size. "
                f"{_DAMAGED}"
            )
        place += 8 + storage.nbytes


def _check_tree(followed: Followed) -> None:
    if type(followed.tree) is not dict:
        raise BadModel(
            "It does not hold a state dict (the weights by name). Save it with "
            "torch.save(model.state_dict(), 'weights.pt')."
        )
    if len(followed.storages) > MAX_MEMBERS:
        raise BadModel(
            f"It holds {len(followed.storages)} tensors, more than a network has "
            f"({MAX_MEMBERS} at most). Choose a checkpoint of one network."
        )


def _load_torch(file: BinaryIO, beside: set[str]) -> Any:
    file.seek(0)
    try:
        # Torch keeps one list of names for all threads.
        with _ONE_LIST, torch.serialization.safe_globals(unread(beside)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        # All checks passed, yet a second reader that trusts nothing says no.
        reason = re.split(r"\n|  \(", str(error).strip())[0][:200]
        raise BadModel(
            f"torch refuses to read it safely ({reason}). If you trust where it came "
            "from, load it in Python and save the weights alone: "
            "torch.save(model.state_dict(), 'weights.pt')."
        ) from error


# --- what was read -----------------------------------------------------------


def _plain(
    value: Any, seen: Any, place: tuple[str, ...], tensors: dict[str, Tensor]
) -> Any:
    """Return a value made of plain containers only; gather its tensors by place.

    What torch has not read is taken from what was seen when its pickle was followed.
    """
    if isinstance(value, Unread):
        if not isinstance(seen, Fields):
            return seen.values if isinstance(seen, Array) else seen
        value = value.state
    if isinstance(value, dict):
        return {
            key: _plain(value[own], seen[key], (*place, str(key)), tensors)
            for own, key in zip(value, seen, strict=True)
        }
    if isinstance(value, list | tuple):
        items = [
            _plain(item, other, (*place, str(i)), tensors)
            for i, (item, other) in enumerate(zip(value, seen, strict=True))
        ]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, Tensor):
        return value
    name = ".".join(place)
    if name in tensors:
        raise BadModel(f"Two of its tensors have the name {name[:80]}. {_DAMAGED}")
    tensors[name] = value.detach()
    return tensors[name]


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse weights that are not finite; what an optimiser or a score holds may be."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or not tensor.ndim:
            continue
        if name.startswith("optimizer"):
            continue
        # Makes no temporary array of the tensor's size, as isfinite(tensor) does.
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise BadModel(
                f"It has {count} non-finite values in {name}; its training failed. "
                "Use an earlier checkpoint."
            )
