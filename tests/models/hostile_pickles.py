"""Files that ``torch.save`` never wrote: pickles that attack, lie or explode."""

import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict

import torch

CANARY = "canary"
MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
NAMED = r"asks for {} to be called or made"
DAMAGED = r"incomplete or damaged"


def torch_zip(content: bytes, storages=None, extra=None, root="archive") -> bytes:
    """Return an archive with these bytes as its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{root}/data.pkl", content)
        for key, values in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", values)
        for name, values in ({"version": b"3\n"} | (extra or {})).items():
            archive.writestr(f"{root}/{name}", values)
    return file.getvalue()


def legacy(content: bytes, keys=(), body=b"", system=None, version=None) -> bytes:
    """Return a file of torch < 1.6 with these bytes as its pickle."""
    version = pickle.dumps(1001, 2) if version is None else version
    system = pickle.dumps(SYSTEM, 2) if system is None else system
    return MAGIC + version + system + content + pickle.dumps(list(keys), 2) + body


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count=4, key="0", kind="FloatStorage", tail=b"") -> bytes:
    name = f"ctorch\n{kind}\n".encode()
    reference = text("storage") + name + text(key) + text("cpu") + number(count)
    return b"(" + reference + tail + b"tQ"


HOOKS = b"ccollections\nOrderedDict\n)R"


def tensor(source=None, offset=0, shape=(4,), stride=(1,), tail=b"\x89" + HOOKS):
    source = storage() if source is None else source
    view = source + number(offset) + numbers(shape) + numbers(stride) + tail
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"


def state_dict(value: bytes, key: bytes | None = None) -> bytes:
    """Return the pickle of a dict with one entry."""
    return b"\x80\x02}" + (text("weight") if key is None else key) + value + b"s."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


class Gadget:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful(Gadget):
    """Calls a function with the state of an object that is built."""

    def __reduce__(self):
        return OrderedDict, (), {"gadget": Gadget(*self.call)}


TOUCH = f"touch {CANARY}"
PYTHON = f"open({CANARY!r}, 'w')"
GADGETS = {
    "os.system": Gadget(os.system, TOUCH),
    "eval": Gadget(eval, PYTHON),
    "exec": Gadget(exec, PYTHON),
    "open": Gadget(open, CANARY, "w"),
    "getattr": Gadget(getattr, Gadget(__import__, "os"), "system"),
    "import": Gadget(__import__, "antigravity"),
    "popen": Gadget(subprocess.Popen, ["touch", CANARY]),
    "mkdir": Gadget(os.mkdir, CANARY),
    "torch.load": Gadget(torch.load, CANARY),
    "pickle.loads": Gadget(pickle.loads, pickle.dumps(Gadget(eval, PYTHON))),
}


def gadgets_by_position():
    """One gadget, at every place of a checkpoint, in both containers."""
    evil = GADGETS["os.system"]
    weights = OrderedDict(weight=torch.ones(3))
    marked = OrderedDict(weights)
    marked._metadata = {"": {"version": evil}}
    trees = {
        "top level": evil,
        "among weights": weights | {"evil": evil},
        "optimizer": {"state_dict": weights, "optimizer": {"state": {0: evil}}},
        "hparams": {"state_dict": weights, "hyper_parameters": {"lr": evil}},
        "in a list": {"state_dict": weights, "losses": [1.0, [evil]]},
        "in a tuple": {"state_dict": weights, "best": (1, evil)},
        "metadata": marked,
        "state of an object": {"a": Stateful(os.system, TOUCH)},
        "whole network": torch.nn.Conv2d(1, 1, 1),
    }
    for place, tree in trees.items():
        for zipped in (True, False):
            name = f"gadget {place} {'zip' if zipped else 'legacy'}"
            expected = "whole network" if place == "whole network" else "system"
            if expected != "system":
                expected = r"torch\.nn\.modules|whole network"
            yield (
                name,
                saved(tree, _use_new_zipfile_serialization=zipped),
                expected,
            )


def gadgets_by_kind():
    for name, evil in GADGETS.items():
        yield f"gadget {name}", saved({"weight": torch.ones(1), "x": evil}), "asks for"
    for protocol in range(6):
        content = pickle.dumps({"x": GADGETS["eval"]}, protocol)
        expected = "asks for|instruction|protocol"
        yield f"gadget protocol {protocol} zip", torch_zip(content), expected
        yield f"gadget protocol {protocol} legacy", legacy(content), expected
        yield f"gadget protocol {protocol} plain", content, "pickle|not a napari-unet"


def gadgets_by_instruction():
    call = text(TOUCH)
    system = b"cos\nsystem\n"
    pickles = {
        "REDUCE": (system + b"(" + call + b"tR", r"os\.system"),
        "escaped": (b"c\\x6fs\n\\c\n(" + call + b"tR", r"\\x6fs\.\\c"),
        "python 2": (b"c__builtin__\neval\n(" + call + b"tR", r"__builtin__\.eval"),
        "not printable": (b"c\x1b[2Jos\nsystem\n)R", "asks for"),
        "not ascii": ("cös\nsystem\n)R".encode(), "ös.system"),
        "spaces": (b"ctorch FloatStorage\n\n)R", "asks for"),
        "INST": (b"(" + call + b"ios\nsystem\n", "INST"),
        "OBJ": (b"(" + system + call + b"o", r"os\.system"),
        "hooks": (tensor(tail=b"\x89" + system + b"(" + call + b"tR"), r"os\.system"),
        "NEWOBJ": (HOOKS[:-2] + b")\x81", DAMAGED),
        "NEWOBJ gadget": (system + b"(" + call + b"t\x81", r"os\.system"),
        "STACK_GLOBAL": (text("os") + text("system") + b"\x93)R", "STACK_GLOBAL"),
        "STACK_GLOBAL from memo": (
            text("os") + b"q\0" + text("system") + b"q\x01h\0h\x01\x93)R",
            "STACK_GLOBAL",
        ),
        "EXT1": (b"\x82\x01)R", "EXT1"),
        "BUILD": (HOOKS + b"}" + text("items") + text("x") + b"sb", DAMAGED),
        "BUILD gadget": (HOOKS + system + b"b", r"os\.system"),
        "PERSID": (b"Pos.system\n", "PERSID"),
        "BINPERSID": (b"(" + text("storage") + system + b"tQ", r"os\.system"),
        "BINPERSID text": (text("os.system") + b"Q", DAMAGED),
        "BINPERSID module": (
            b"(" + text("module") + b"ctorch\nSize\n" + text("/etc/passwd") + b"NtQ",
            "whole network",
        ),
        "call a storage": (
            b"ctorch\nFloatStorage\n" + numbers([2**40]) + b"R",
            DAMAGED,
        ),
        "call a dtype": (b"ctorch\nfloat32\n)R", DAMAGED),
        "call a text": (call + b")R", DAMAGED),
        "a function as value": (b"ctorch._utils\n_rebuild_tensor_v2\n", "is no value"),
        "memo of nothing": (b"h\x07", DAMAGED),
        "empty stack": (b"0000", "instruction POP"),
        "no mark": (b"t", DAMAGED),
    }
    for name, (content, expected) in pickles.items():
        yield f"opcode {name}", torch_zip(state_dict(content)), expected
    key = system + b"(" + call + b"tR"
    yield "gadget as key", torch_zip(state_dict(b"N", key)), r"os\.system"
    evil = pickle.dumps(GADGETS["os.system"], 2)
    good = state_dict(tensor())
    body = struct.pack("<q", 4) + FOUR
    yield "gadget as version", legacy(good, ["0"], body, version=evil), "system"
    yield "gadget as system", legacy(good, ["0"], body, system=evil), "system"
    yield "gadget as key list", MAGIC + legacy(good)[15:-4] + evil, "system"


def bombs():
    """Pickles whose execution takes memory or time."""
    laughs = (
        b"(]q\0"
        + b"".join(
            b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e"
            for i in range(30)
        )
        + b"t"
    )
    tuples = b")q\0" + b"".join(
        (b"h" + bytes([i])) * 2 + b"\x86q" + bytes([i + 1]) for i in range(40)
    )
    entries = b"".join(text(str(i)) + b"N" for i in range(40_000))
    counters = b"ccollections\nCounter\nq\0(}q\1(" + entries + b"utR"
    counters = b"](" + counters + b"h\0h\1\x85R" * 20_000 + b"e"
    pairs = b"".join(text(str(i)) + b"N\x86" for i in range(40_000))
    copies = b"ccollections\nOrderedDict\nq\0(]q\1(" + pairs + b"etR"
    copies = b"](" + copies + b"h\0h\1\x85R" * 20_000 + b"e"
    sizes = b"ctorch\nSize\nq\0(" + numbers([1] * 50_000) + b"q\1tR"
    sizes = b"](" + sizes + b"h\0h\1\x85R" * 40_000 + b"e"
    device = b"ctorch\ndevice\nq\0(" + text("a" * (8 << 20)) + b"q\1tR"
    device = b"](" + device + b"h\0h\1\x85R" * 40_000 + b"e"
    keys = storage(0, "k" * (8 << 20)).replace(b"X\3\0\0\0cpu", text("c"))
    crowd = b"](" + b"]" * 49_000 + b"e"
    ordered = b"](" + b"ccollections\nOrderedDict\nq\0)R" + b"h\0)R" * 49_000 + b"e"
    collisions = b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, 100_000))
    named = {
        "bytearray": b"cbuiltins\nbytearray\n" + numbers([10**11]) + b"R",
        "untyped": b"ctorch.storage\nUntypedStorage\n" + numbers([10**11]) + b"R",
        "tensor": b"ctorch\nTensor\n" + numbers([10**6, 10**6]) + b"R",
        "parameter": b"ctorch.nn.parameter\nParameter\n" + numbers([10**9]) + b"R",
        "codec": b"c_codecs\nencode\n(" + text("a" * 9999) + text("punycode") + b"tR",
        "set": b"cbuiltins\nset\n)R",
        "sparse": b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
        "quantized": b"ctorch._utils\n_rebuild_qtensor\n)R",
        "nested": b"ctorch._utils\n_rebuild_nested_tensor\n)R",
        "meta": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R",
        "subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n)R",
        "complex storage": storage(kind="ComplexFloatStorage"),
        "numpy": b"cnumpy.core.multiarray\nscalar\n)R",
    }
    for name, content in named.items():
        expected = DAMAGED if name in ("numpy", "codec") else "asks for"
        yield f"bomb {name}", torch_zip(state_dict(content)), expected
    sized = {
        "LONG4": (b"\x8b\xff\xff\xff\x7f", "LONG4"),
        "LONG4 of 8 MB": (
            b"\x8b" + struct.pack("<i", 8 << 20) + b"\x7f" * (8 << 20),
            "LONG4",
        ),
        "LONG text": (b"L" + b"9" * 10**6 + b"L\n", "instruction LONG,"),
        "BINUNICODE": (b"X\xff\xff\xff\xff", DAMAGED),
        "BINUNICODE8": (b"\x8d" + b"\xff" * 7 + b"\x7f", "BINUNICODE8"),
        "BINBYTES8": (b"\x8e" + b"\xff" * 7 + b"\x7f", "BINBYTES8"),
        "FRAME": (b"\x95" + b"\xff" * 7 + b"\x7f", "FRAME"),
        "nested tuples": (b")" + b"\x85" * 249_000, "too many or nested too deeply"),
        "nested lists": (
            b"]" * 60_000 + b"a" * 59_999,
            "too many or nested too deeply",
        ),
        "nested dicts": ((b"}" + text("a")) * 500 + b"N" + b"s" * 500, "nested"),
        "a list in itself": (b"]q\0h\0a", "too many or nested too deeply"),
        "laughs": (laughs, "too many or nested too deeply"),
        "tuples as key": (
            b"}" + text("x") + b"(" + tuples + b"tsh\x28Ns",
            DAMAGED,
        ),
        "colliding keys": (b"}(" + collisions + b"u", DAMAGED),
        "counted tuples": (b"ccollections\nCounter\n(](" + tuples + b"etR", DAMAGED),
        "copied counters": (counters, DAMAGED),
        "copied mappings": (copies, DAMAGED),
        "sizes": (sizes, DAMAGED),
        "device": (device, DAMAGED),
        "long key": (tensor(keys, shape=(0,)), DAMAGED),
        "many lists": (crowd, "no tensors"),
        "too many lists": (b"](" + b"]" * 60_000 + b"e", "too many or nested"),
        "many dicts": (ordered, "no tensors"),
        "many instructions": (b"N0" * 200_000 + b"N", "instruction POP"),
        "many numbers": (b"](" + b"N" * 400_000 + b"e", "more values"),
        "20 MB": (text("a" * (20 << 20)), "too large"),
        "long name": (b"}" + text("a" * 10**6) + b"Ns", "name of a tensor"),
        "wild name": (b"}" + text("a\x1b[31m") + b"Ns", "name of a tensor"),
    }
    for name, (content, expected) in sized.items():
        yield f"bomb {name}", torch_zip(state_dict(content)), expected


def lies():
    """Tensors that do not lie within what the file holds."""
    views = {
        "too long": tensor(shape=(5,)),
        "offset": tensor(offset=1),
        "offset past the end": tensor(offset=9, shape=(1,)),
        "negative offset": tensor(offset=-1, shape=(1,)),
        "stride": tensor(shape=(2,), stride=(4,)),
        "negative stride": tensor(stride=(-1,)),
        "negative shape": tensor(shape=(-4,)),
        "expanded": tensor(shape=(10**6, 10**6), stride=(0, 0)),
        "overflowing": tensor(shape=(2**33, 2**33), stride=(0, 0)),
        "ndim": tensor(shape=(1,) * 65, stride=(1,) * 65),
        "shape and stride": tensor(shape=(2, 2)),
        "text as shape": tensor().replace(numbers([4]), text("4")),
        "hooks": tensor(tail=b"\x89" + state_dict(b"N")[2:-1]),
        "gradient": tensor(tail=b"K\x07" + HOOKS),
        "conjugated": tensor(tail=b"\x89" + HOOKS + state_dict(b"\x88")[2:-1]),
    }
    for name, content in views.items():
        content = state_dict(content)
        expected = r"does not lie within|damaged"
        yield f"view {name}", torch_zip(content, {"0": FOUR}), expected
        body = struct.pack("<q", 4) + FOUR
        yield f"view {name} legacy", legacy(content, ["0"], body), expected
    many = b"](" + tensor() * 9 + b"e"
    yield "shown often", torch_zip(state_dict(many), {"0": FOUR}), "same values more"
    good = state_dict(tensor())
    for name, values in {"short": FOUR[:-1], "long": FOUR + b"\0"}.items():
        yield f"storage {name}", torch_zip(good, {"0": values}), "should have 16 bytes"
    yield "storage missing", torch_zip(good), "should have 16 bytes but have 0"
    giant = state_dict(tensor(storage(2**40), shape=(2**40,)))
    yield "storage giant", torch_zip(giant, {"0": FOUR}), "should have 4398046511104"
    body = struct.pack("<q", 2**40)
    yield "legacy giant", legacy(giant, ["0"], body), r"incomplete \(\d+ of \d+ bytes"
    two = tensor() + b"0" + tensor(storage(2), shape=(2,))
    two = state_dict(b"](" + two.replace(b"R0c", b"Rc") + b"e")
    yield "storage twice", torch_zip(two, {"0": FOUR}), "twice"
    bare = state_dict(storage())
    yield "storage bare", torch_zip(bare, {"0": FOUR}), "bare storages"
    body = struct.pack("<q", 4) + FOUR
    yield "legacy keys", legacy(good, ["1"], body), "list of its weights"
    yield "legacy no keys", legacy(good, [], body), "list of its weights"
    yield "legacy keys twice", legacy(good, ["0", "0"], body * 2), "list of its weights"
    yield "legacy size", legacy(good, ["0"], body.replace(b"\4", b"\3", 1)), "announced"
    big = pickle.dumps(SYSTEM | {"little_endian": False}, 2)
    yield "legacy big endian", legacy(good, ["0"], body, system=big), "big-endian"
    long = b"\x80\x02" + b"](" + b"]" * 200_000 + b"e."
    yield "legacy long version", legacy(good, ["0"], body, version=long), "100 steps"
    yield "legacy long system", legacy(good, ["0"], body, system=long), "100 steps"
    yield "legacy long keys", MAGIC + legacy(good)[15:-4] + long, "40000 steps"
    old = pickle.dumps(7, 2)
    yield "legacy version", legacy(good, ["0"], body, version=old), "unknown version"
    view = storage(tail=b"(" + text("1") + number(0) + number(4) + b"t")
    view = state_dict(tensor(view))
    yield "legacy view", legacy(view, ["0"], body), "torch before 0.4"
    for value in (float("nan"), float("inf")):
        weights = {"state_dict": {"head.bias": torch.tensor([1, value, value])}}
        expected = r"2 non-finite values in state_dict\.head\.bias"
        yield f"{value} zip", saved(weights), expected
        yield (
            f"{value} legacy",
            saved(weights, _use_new_zipfile_serialization=False),
            expected,
        )
    yield (
        "two names",
        saved({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}),
        "Two of",
    )
    yield "no tensors", saved({"epoch": 3}), "no tensors"
    yield "a list", saved([torch.ones(1)]), "does not hold a state dict"
    sparse = {"weight": torch.eye(3).to_sparse()}
    yield "sparse", saved(sparse), "_rebuild_sparse_tensor"


def hostile_pickles():
    """Yield (name, content, what its message says)."""
    yield from gadgets_by_position()
    yield from gadgets_by_kind()
    yield from gadgets_by_instruction()
    yield from bombs()
    yield from lies()
