"""Archives, headers and other files that are not what they seem."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from hostile_onnx import hostile_onnx
from hostile_pickles import FOUR, state_dict, tensor, torch_zip

GOOD = state_dict(tensor())


def archive(members, **options) -> bytes:
    """Return a zip archive of (name or ZipInfo, content)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as made:
        for name, content in members:
            made.writestr(name, content)
    return file.getvalue()


def with_member(name, content=b"x", **attributes) -> bytes:
    """Return a good checkpoint with one more member."""
    info = zipfile.ZipInfo()
    info.filename = name
    for key, value in attributes.items():
        setattr(info, key, value)
    base = [("archive/data.pkl", GOOD), ("archive/data/0", FOUR)]
    return archive([*base, (info, content)])


def archives():
    forbidden = "forbidden name"
    for name in (
        "archive/../../evil",
        "archive/data/../../evil",
        "../evil",
        "archive/data/./0",
        "archive//etc/passwd",
        "/etc/passwd",
        "archive\\..\\evil",
        "C:/evil",
        "archive/data/a\rb",
    ):
        yield f"zip name {name!r}", with_member(name), forbidden
    nul = with_member("archive/data/1x2").replace(b"data/1x2", b"data/1\0002")
    yield "zip name NUL", nul, forbidden
    link = with_member("archive/data/1", b"/etc/passwd", external_attr=0o120777 << 16)
    yield "zip symlink", link, "is a link"
    for name in ("other/data/1", "archive/run.py", "archive/data", "archive/extra/x"):
        yield f"zip stranger {name}", with_member(name), "torch.save does not write"
    yield "zip without case", with_member("archive/DATA.pkl"), "is there twice"
    twice = with_member("archive/data/1").replace(b"data/1", b"data/0")
    yield "zip twice", twice, "is there twice"
    zeros = [("archive/data.pkl", GOOD), ("archive/data/0", bytes(100 << 20))]
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        packed = archive(zeros, compression=method, compresslevel=1)
        yield f"zip bomb {method}", packed, "is compressed"
    many = [("archive/data.pkl", GOOD)]
    many += [(f"archive/data/{i}", b"") for i in range(10_001)]
    yield "zip 10,002 members", archive(many), "holds 10002 members"
    many += [(f"archive/data/{i}", b"") for i in range(10_001, 100_000)]
    yield "zip 100,000 members", archive(many), "holds 100001 members"
    plain = torch_zip(GOOD, {"0": FOUR})
    directory = plain.index(b"PK\1\2")
    yield "zip overlap", overlapping(plain, directory), "overlaps|damaged"
    yield "zip comment", plain[:-2] + b"\3\0abc", "end of the archive is missing"
    yield "zip in front", b"PK\3\4" + plain, "directory is damaged"
    yield "zip behind", plain + b"\n", "end of the archive is missing"
    encrypted = bytearray(plain)
    encrypted[directory + 8] |= 1
    yield "zip encrypted", bytes(encrypted), "encrypted"
    counted = bytearray(plain)
    counted[-14] = counted[-12] = 2
    yield "zip count", bytes(counted), "directory is damaged"
    yield "zip second directory", second_directory(plain), "directory is damaged"
    big = torch_zip(GOOD, {"0": FOUR}, {"version": bytes(10_000)})
    yield "zip large note", big, "too large"
    order = torch_zip(GOOD, {"0": FOUR}, {"byteorder": b"middle"})
    yield "zip byte order", order, "byte order"
    script = {"constants.pkl": GOOD, "code/__torch__.py": b"import os"}
    yield "TorchScript", torch_zip(GOOD, {"0": FOUR}, script), "is a program"
    code = {"code/__torch__.py": b"import os"}
    yield "TorchScript code", torch_zip(GOOD, {"0": FOUR}, code), "is a program"
    exported = {"archive_format": b"pt2", "models/model.json": b"{}"}
    yield "exported", torch_zip(GOOD, {"0": FOUR}, exported), "is a program"
    package = [("rdf.yaml", b"type: model"), ("weights.pt", plain)]
    yield "bioimage.io", archive(package), "bioimage.io package"
    keras = [("config.json", b"{}"), ("model.weights.h5", b"")]
    yield "Keras", archive(keras), "Keras or TensorFlow"
    inside = [("weights.pt", plain)]
    packed = archive(inside, compression=zipfile.ZIP_DEFLATED)
    yield "zipped again", packed, "unpack it"
    arrays = io.BytesIO()
    np.savez(arrays, weight=np.ones(3))
    yield "numpy", arrays.getvalue(), "numpy arrays"
    yield "zip of nothing", archive([]), "not a napari-unet|damaged|incomplete"


def overlapping(plain: bytes, directory: int) -> bytes:
    """Let the second member's entry point to the first one."""
    changed = bytearray(plain)
    second = plain.index(b"PK\1\2", directory + 1)
    changed[second + 42 : second + 46] = bytes(4)
    return bytes(changed)


def second_directory(plain: bytes) -> bytes:
    """Add a 64-bit record at another place than where Python looks for it."""
    count, length, start = struct.unpack("<HII", plain[-12:-2])
    record = struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start
    )
    place = len(plain) - 22
    wrong = struct.pack("<4sIQI", b"PK\6\7", 0, place - 8, 1)
    return plain[:-22] + record + wrong + plain[-22:]


def header(entries, body=b"", length=None) -> bytes:
    """Return a safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start=0, stop=4, dtype="F32", shape=(1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def headers():
    one = {"x": entry()}
    damaged = "header is damaged"
    bad = {
        "negative side": {"x": entry(shape=(-1,))},
        "fractional side": {"x": entry(shape=(1.0,))},
        "huge side": {"x": entry(shape=(2**62, 4))},
        "wrong size": {"x": entry(shape=(2,))},
        "reversed": {"x": entry(4, 0)},
        "before the start": {"x": entry(-4, 0)},
        "overlap": {"x": entry(), "y": entry()},
        "hole": {"x": entry(), "y": entry(8, 12)},
        "no tensor": {"x": 3},
        "metadata": one | {"__metadata__": {"a": 1}},
        "name": {"a\x1b[2J": entry()},
        "long name": {"a" * 1000: entry()},
    }
    for name, entries in bad.items():
        yield f"safetensors {name}", header(entries, bytes(12)), damaged
    yield (
        "safetensors dtype",
        header({"x": entry(dtype="Q9")}, bytes(4)),
        "unknown type",
    )
    yield "safetensors past the end", header({"x": entry(0, 4)}, b"\0"), "incomplete"
    yield "safetensors behind", header(one, bytes(5)), "1 bytes behind its end"
    yield "safetensors no tensors", header({}), "no tensors"
    for name, text in {
        "nested lists": b'{"a":' + b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "not JSON": b"{" + bytes(range(256)) * 20,
        "numbers": b'{"a":' + b"9" * 100_000 + b"}",
    }.items():
        yield f"safetensors {name}", header(text), damaged
    for length in (17 << 20, 2**31, 2**63, 2**64 - 1):
        content = header(b"{" + b" " * 1000, length=length)
        yield f"safetensors length {length}", content, "incomplete"
    long = header(b'{"x":1' + b" " * (17 << 20))
    yield "safetensors 17 MB", long, "header has 17 MB"
    for name, part in {"objects": b"{},", "lists": b"[],", "commas": b"0,"}.items():
        text = b'{"a":[' + part * ((15 << 20) // len(part)) + b"0]}"
        yield f"safetensors 15 MB of {name}", header(text), "more tensors than"
    empty = entry(0, 0, shape=(0,))
    for count in (10_001, 100_000):
        yield (
            f"safetensors {count} tensors",
            header({f"t{i}": empty for i in range(count)}),
            "more tensors than|holds 10001 tensors",
        )
    nan = struct.pack("<f", float("nan"))
    yield "safetensors NaN", header({"head.bias": entry()}, nan), "1 non-finite .*bias"


def others():
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    asks = "PyTorch weights"
    yield "empty", b"", "is empty"
    yield "two bytes", b"PK", "incomplete"
    yield "one byte", b"\x80", "no data"
    yield "zeros", bytes(5000), "no data"
    yield "tar", tar.getvalue(), "tar archive"
    yield "ONNX", b"\x08\x07\x12\x07pytorch\x1a\x031.9" + bytes(200), "no ONNX network"
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + bytes(200), "HDF5.*" + asks
    yield "SavedModel", b"\x08\x01\x12\x99" + bytes(200), "SavedModel.*" + asks
    yield "TFLite", b"\x1c\0\0\0TFL3" + bytes(200), "TensorFlow.*" + asks
    table = b"\1\2\3\4" * 30 + bytes.fromhex("57fb808b247547db")
    yield "TensorFlow checkpoint", table, "TensorFlow.*" + asks
    yield "gzip", b"\x1f\x8b\x08" + bytes(100), "compressed"
    yield "LFS", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"
    yield "web page", b"\n<!DOCTYPE html><html>404</html>", "web page"
    yield "text", b"This is no model.\n" * 9, "not a napari-unet checkpoint"
    yield "plain pickle", pickle.dumps({"a": 1}, 4), "plain Python pickle"


def hostile_containers():
    """Yield (name, content, what its message says)."""
    yield from archives()
    yield from headers()
    yield from others()
    yield from hostile_onnx()
