"""What kind of file a checkpoint is, and zip archives as ``torch.save`` writes them.

Nothing here interprets what a file holds.
"""

from __future__ import annotations

import stat
import struct
import zipfile
from typing import BinaryIO

from napari_unet.errors import BadModel, NeedsTrust

SAFETENSORS = "safetensors"
TORCH_ZIP = "torch zip"
TORCH_LEGACY = "torch legacy"
ONNX = "ONNX"

# The first pickle of a file of torch < 1.6: a magic number; its protocol may vary.
LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")

MAX_MEMBERS = 10_000
MAX_PICKLE = 16 << 20  # bytes; a network of 10**4 tensors has about 3 MB
MAX_NOTE = 4096  # bytes of a member that holds neither the pickle nor weights
_NOTES = {
    "version",
    "byteorder",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
}
_SCRIPT = (
    "It is a program (TorchScript), not weights alone, and torch would run it to read "
    "them."
)
_EXPORTED = (
    "It is a program (a graph that torch.export has written), not weights. Ask for the "
    "weights as a state dict: in Python, torch.save(model.state_dict(), 'weights.pt')."
)
_PICKLE = "It is a plain Python pickle, which can run any program when opened."
_DAMAGED = "Get the file again."


def container(start: bytes, end: bytes) -> str:
    """Return the container of a file: one of the constants of this module.

    Parameters
    ----------
    start, end : bytes
        The first 512 and the last 512 bytes, or all of a smaller file.

    Raises
    ------
    NeedsTrust
        If it is a plain Python pickle.
    BadModel
        Naming what the file is instead, where that can be told.
    """
    if start.startswith(b"PK"):
        return TORCH_ZIP
    if start[:1] == b"\x80" and start[2:15] == LEGACY_MAGIC[: len(start[2:15])] != b"":
        return TORCH_LEGACY
    if start[8:9] == b"{":
        return SAFETENSORS
    # The version of the format, then a text or message that such a file begins with.
    has_version = start[:1] == b"\x08" and b"\0" < start[1:2] < b"\x20"
    if has_version and start[2:3] in b'\x12\x1a"2:B' and start[:3] != b"\x08\x01\x12":
        return ONNX
    if len(start) > 8 and start[0] == 0x80 and 2 <= start[1] <= 5:
        raise NeedsTrust(_PICKLE)
    raise BadModel(_other(start, end))


def _other(start: bytes, end: bytes) -> str:
    """Say what a file is that cannot be a checkpoint of ours."""
    weights = "Ask for the PyTorch weights (.pt, .pth, .ckpt) or a .safetensors file."
    text = start.lstrip().lower()
    if not start:
        return f"It is empty. {_DAMAGED}"
    if len(start) < 9 or not any(start):
        return f"It holds no data: it is incomplete or damaged. {_DAMAGED}"
    if text.startswith(b"version https://git-lfs"):
        return (
            "It is a Git LFS pointer, not the weights themselves. Run `git lfs pull` "
            "in its repository, or download the file from its web page."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "It is a web page, not weights; the download went wrong. Use the page's "
            "own download link."
        )
    if start[257:262] == b"ustar":
        return (
            "It is a tar archive: torch before 0.4 wrote these, and they cannot be "
            "read safely. Unpack it, or save the weights again with a newer torch."
        )
    if start.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh")):
        return "It is compressed. Unpack it and choose the checkpoint inside."
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"It is HDF5, as Keras and TensorFlow write it. {weights}"
    if start[4:8] == b"TFL3" or end.endswith(bytes.fromhex("57fb808b247547db")):
        return f"It is a TensorFlow file. {weights}"
    if start.startswith(b"\x08\x01\x12"):
        return f"It is a TensorFlow SavedModel. {weights}"
    return (
        "It is not a napari-unet checkpoint, nor one that torch or safetensors wrote. "
        "Choose a .safetensors, .pt, .pth, .ckpt or .onnx file, or get the file again."
    )


def read_archive(file: BinaryIO, size: int) -> tuple[bytes, dict[str, int]]:
    """Check a zip archive of ``torch.save`` and the checksum of every member.

    The rules are so narrow that Python's and torch's zip readers, which differ in
    how they take odd archives, cannot see different things in one that passes.

    Parameters
    ----------
    file : binary file
        Open for reading.
    size : int
        Of the file in bytes.

    Returns
    -------
    pickle : bytes
        The member ``data.pkl``.
    storages : dict
        The size in bytes of every storage, by its key.

    Raises
    ------
    NeedsTrust
        If it is TorchScript.
    BadModel
        If it is incomplete, damaged, another kind of archive or not plain.
    """
    count = _check_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) != count or not members:
                raise BadModel(f"Its zip directory is damaged. {_DAMAGED}")
            root = _check_names(members)
            _check_places(members, size)
            pickle, storages = b"", {}
            for member in members:
                name = member.filename.removeprefix(root)
                content = _checked_content(archive, member, name == "data.pkl")
                if name == "data.pkl":
                    pickle = content
                elif name.startswith("data/"):
                    storages[name.removeprefix("data/")] = member.file_size
                elif name == "byteorder" and content not in (b"little", b"big"):
                    raise BadModel(f"Its byte order is unknown. {_DAMAGED}")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise BadModel(f"It is damaged ({str(error)[:200]}). {_DAMAGED}") from error
    except (ValueError, OverflowError, struct.error) as error:
        raise BadModel(f"Its zip directory is damaged. {_DAMAGED}") from error
    return pickle, storages


def _check_directory(file: BinaryIO, size: int) -> int:
    """Check the records at the end of a zip file; return the number of members.

    They must be those of one archive that fills the file: no comment, nothing in
    front, the 64-bit record (torch always writes one) at its place.
    """
    length = min(size, 98)
    file.seek(size - length)
    end = file.read(length).rjust(98, b"\0")
    file.seek(0)
    magic, *disks, here, count, length, start, comment = struct.unpack(
        "<4sHHHHIIH", end[76:]
    )
    if magic != b"PK\5\6":
        raise BadModel(
            f"It is incomplete: the end of the archive is missing after {size} bytes. "
            f"{_DAMAGED}"
        )
    narrow, limit = (here, count, length, start), size - 22
    plain = not any(disks) and not comment
    if end[56:60] == b"PK\6\7":
        limit = size - 98
        plain = plain and end[56:76] == struct.pack("<4sIQI", b"PK\6\7", 0, limit, 1)
        magic, own, _, _, *disks, here, count, length, start = struct.unpack(
            "<4sQHHIIQQQQ", end[:56]
        )
        plain = plain and magic == b"PK\6\6" and own == 44 and not any(disks)
        most = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        wide = (here, count, length, start)
        plain = plain and all(
            a in (b, m) for a, b, m in zip(narrow, wide, most, strict=True)
        )
    if not plain or here != count or start + length != limit:
        raise BadModel(f"Its zip directory is damaged. {_DAMAGED}")
    if count > MAX_MEMBERS or length > 512 * MAX_MEMBERS:
        raise BadModel(
            f"It holds {count} members, more than a network has ({MAX_MEMBERS} at "
            "most). Choose a checkpoint of one network."
        )
    return int(count)


def _check_names(members: list[zipfile.ZipInfo]) -> str:
    """Check the names of all members; return the folder that holds all of them."""
    names = [member.filename for member in members]
    root = names[0].partition("/")[0] + "/"
    inner = {name.removeprefix(root) for name in names}
    if any(name.startswith("models/") for name in inner):
        raise BadModel(_EXPORTED)
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise NeedsTrust(_SCRIPT)
    if "data.pkl" not in inner:
        raise BadModel(_other_archive(names))
    seen = set()
    for member in members:
        name = member.filename
        parts = name.split("/")
        plain = member.orig_filename == name and name.isprintable()
        plain = plain and "\\" not in name and not {"", ".", ".."} & {*parts}
        if not plain or parts[0].endswith(":"):
            raise BadModel(f"Its member {name[:80]!r} has a forbidden name. {_DAMAGED}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BadModel(f"Its member {name[:80]!r} is a link. {_DAMAGED}")
        if name.lower() in seen:  # torch finds members without regard to case
            raise BadModel(f"Its member {name[:80]!r} is there twice. {_DAMAGED}")
        seen.add(name.lower())
        inside = name.removeprefix(root)
        known = inside in ("data.pkl", *_NOTES) or inside.startswith("data/")
        if not name.startswith(root) or not known:
            raise BadModel(
                f"It holds {name[:80]!r}, which torch.save does not write. Choose a "
                "checkpoint that torch.save wrote."
            )
    return root


def _other_archive(names: list[str]) -> str:
    """Say what a zip archive is that torch has not written."""
    files = {name.rpartition("/")[2].lower() for name in names}
    if files & {"rdf.yaml", "bioimageio.yaml"}:
        return (
            "It is a bioimage.io package that cannot be read as it is: its description "
            "is not at its top, or it is damaged. Unpack it and choose the folder that "
            "holds the rdf.yaml or bioimageio.yaml."
        )
    if files & {"model.weights.h5", "saved_model.pb", "keras_metadata.pb"}:
        return (
            "It is a Keras or TensorFlow model. Ask for the PyTorch weights (.pt, "
            ".pth, .ckpt) or a .safetensors file."
        )
    if any(name.endswith(".npy") for name in files):
        return "It holds numpy arrays, not a checkpoint. Choose one of torch.save."
    return (
        "It is a zip archive that torch.save has not written. If a checkpoint is "
        "inside, unpack it and choose that."
    )


def _check_places(members: list[zipfile.ZipInfo], size: int) -> None:
    """Check that all members are stored as they are and lie apart in the file."""
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename[:80]
        if member.flag_bits & 0x41:
            raise BadModel(f"Its member {name!r} is encrypted. Save it unencrypted.")
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.compress_size != member.file_size
        ):
            raise BadModel(
                f"Its member {name!r} is compressed, which torch.save never does. "
                "If you packed it yourself, unpack it and choose the checkpoint inside."
            )
        if member.header_offset < end:
            raise BadModel(f"Its member {name!r} overlaps another one. {_DAMAGED}")
        end = member.header_offset + 30 + len(member.filename) + member.file_size
    if end > size:
        raise BadModel(f"It claims {end} bytes but has {size}. {_DAMAGED}")


def _checked_content(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, is_pickle: bool
) -> bytes:
    """Read a whole member, which checks its CRC; return it unless it holds weights."""
    name = member.filename.partition("/")[2]
    weights = name.startswith("data/")
    if not weights and member.file_size > (MAX_PICKLE if is_pickle else MAX_NOTE):
        raise BadModel(
            f"Its member {name!r} is too large ({member.file_size} bytes) for a "
            "network. Save the weights alone: torch.save(model.state_dict(), 'w.pt')."
        )
    with archive.open(member) as stream:
        if not weights:
            return stream.read()
        while stream.read(1 << 20):
            pass
    return b""
