"""The header of a safetensors file, checked before its tensors are read."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError

from napari_unet.errors import BadModel
from napari_unet.models.containers import MAX_MEMBERS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MAX_HEADER = 16 << 20  # bytes, of a safetensors file
MAX_HEADER_PARTS = 400_000  # of the header's JSON; a network of 10**4 tensors has 10**5
_ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_DAMAGED = "Get the file again."


def check_header(file: BinaryIO, size: int) -> dict[str, str]:
    """Check that the header describes tensors that fill the file.

    Parameters
    ----------
    file : binary file
        Open for reading.
    size : int
        Of the file in bytes.

    Returns
    -------
    dict of str to str
        The texts in the header.

    Raises
    ------
    BadModel
        If it is incomplete, damaged or describes more than a network has.
    """
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER and length <= size:
        raise BadModel(
            f"Its header has {length >> 20} MB ({MAX_HEADER >> 20} at most), more "
            "than a network needs. Choose a checkpoint of one network."
        )
    header = file.read(length) if length <= MAX_HEADER else b""
    if len(header) < length or length < 2:
        raise BadModel(
            f"It is incomplete ({size} of at least {8 + length} bytes) or damaged. "
            f"{_DAMAGED}"
        )
    if sum(map(header.count, (b"{", b"[", b","))) > MAX_HEADER_PARTS:
        raise BadModel(
            f"Its header lists more tensors than a network has ({MAX_MEMBERS} at "
            "most). Choose a checkpoint of one network."
        )
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        texts = all(type(text) is str for text in metadata.values())
        end = 8 + length + _end_of_tensors(entries)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise BadModel(f"Its header is damaged. {_DAMAGED}") from error
    if not texts:
        raise BadModel(f"Its header is damaged. {_DAMAGED}")
    if size < end:
        raise BadModel(f"It is incomplete ({size} of {end} bytes). {_DAMAGED}")
    if size > end:
        raise BadModel(
            f"It has {size - end} bytes behind its end, or is damaged. {_DAMAGED}"
        )
    return dict(metadata)


def _end_of_tensors(entries: dict[str, Any]) -> int:
    """Check each tensor's dtype, shape and place; return where the last one ends."""
    if len(entries) > MAX_MEMBERS:
        raise BadModel(
            f"It holds {len(entries)} tensors, more than a network has "
            f"({MAX_MEMBERS} at most). Choose a checkpoint of one network."
        )
    end = 0
    places = []
    for name, entry in entries.items():
        kind, shape, (start, stop) = (
            entry["dtype"],
            entry["shape"],
            entry["data_offsets"],
        )
        if kind not in _ITEM_SIZES:
            raise BadModel(
                f"Its tensor {name[:80]!r} has the unknown type {str(kind)[:20]!r}. "
                "Save the weights as float32."
            )
        nbytes = _ITEM_SIZES[kind]
        for side in shape:
            if type(side) is not int or side < 0:
                raise ValueError(side)
            nbytes *= side
        if len(name) > 500 or not name.isprintable() or stop - start != nbytes:
            raise ValueError(name)
        places.append((start, stop))
    for start, stop in sorted(places):
        if start != end:
            raise ValueError(start)
        end = stop
    return end


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that was checked; raise `BadModel` if that fails."""
    try:
        return dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadModel(f"It is damaged ({str(error)[:200]}). {_DAMAGED}") from error
