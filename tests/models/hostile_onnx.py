"""ONNX files that ask for more than a network of images needs, or are damaged."""

import struct

import numpy as np
from onnx_files import field, node, onnx_file, tensor, value_info

ONE = np.ones((1, 1, 1, 1), np.float32)
IMAGE = [value_info("x", [1, 1, None, None])]
RESULT = [value_info("y", [1, 1, None, None])]
CONV = node("Conv", ["x", "w"], ["y"])


def small(nodes=(CONV,), weights=None, **more) -> bytes:
    weights = [tensor("w", ONE)] if weights is None else weights
    return onnx_file(nodes, weights, IMAGE, RESULT, **more)


def hostile_onnx():
    """Yield (name, content, what its message says), all refused before they run."""
    relu = node("Relu", ["x"], ["y"])
    subgraph = field(1, "body") + field(6, field(1, relu)) + field(20, 5)
    outside = field(13, field(1, "location") + field(2, "/etc/passwd")) + field(14, 1)
    plain = small()
    elsewhere = "in another file"
    yield "ONNX outside", small(weights=[tensor("w", ONE, more=outside)]), elsewhere
    marked = tensor("w", ONE, more=field(14, 1))
    yield "ONNX outside, unnamed", small(weights=[marked]), elsewhere
    named = tensor("w", ONE, more=field(13, field(1, "location")))
    yield "ONNX outside, unmarked", small(weights=[named]), elsewhere
    constant = field(5, field(1, "value") + field(5, tensor("", ONE, more=outside)))
    constant = field(4, "Constant") + field(2, "w") + constant
    yield "ONNX constant outside", small([constant, CONV], []), elsewhere
    # Protobuf merges what is there twice.
    second = field(7, field(5, tensor("v", ONE, more=outside)))
    yield "ONNX second graph", small(more=second), elsewhere
    yield "ONNX If", small([node("If", ["x"], ["y"])]), "decides while it runs"
    yield "ONNX Loop", small([field(4, "Loop") + field(5, subgraph)]), "decides"
    yield "ONNX subgraph", small([field(4, "Relu") + field(5, subgraph)]), "decides"
    for domain in ("com.microsoft", "my.company", "ai.onnx.ml"):
        other = small([node("Relu", ["x"], ["y"], domain=domain)])
        yield f"ONNX {domain}", other, f"operators of '{domain}'"
    twice = node("Relu", ["x"], ["y"], domain="ai.onnx")
    twice = field(7, "com.microsoft") + twice
    yield "ONNX domain twice", small([twice]), "operators of 'com.microsoft'"
    for kind in ("ImageDecoder", "RegexFullMatch", "RandomNormal", "PyOp", "x" * 999):
        unknown = small([node(kind, ["x"], ["y"])])
        yield f"ONNX {kind[:20]}", unknown, "do not need"
    yield "ONNX without operator", small([field(1, "x") + field(2, "y")]), "do not need"
    function = field(25, field(1, "Relu") + field(7, relu))
    yield "ONNX function", small(more=function), "functions of its own"
    yield "ONNX training", small(more=field(20, b"")), "training steps"
    sparse = field(7, field(15, field(1, tensor("s", ONE))))
    yield "ONNX sparse", small(more=sparse), "sparse weights"
    nan = small(weights=[tensor("head", ONE * np.nan)])
    yield "ONNX NaN", nan, "1 non-finite values in 'head'"
    floats = field(4, struct.pack("<2f", 1.0, np.inf))
    infinite = tensor("head", np.ones(2, np.float32), data=floats)
    yield "ONNX infinite", small(weights=[infinite]), "1 non-finite values in 'head'"
    many = small([relu] * 30_000)
    yield "ONNX many operators", many, "too many parts"
    yield "ONNX many parts", small(more=field(14, b"") * 1_100_000), "too many parts"
    axes = tensor("w", ONE, more=field(1, *[1] * 40))
    yield "ONNX many axes", small(weights=[axes]), "damaged"
    negative = field(5, field(1, -5) + field(2, 1) + field(8, "w"))
    yield "ONNX negative side", small(more=field(7, negative)), "damaged"
    yield "ONNX group", plain + b"\x0b\x0c", "damaged"
    yield "ONNX field 0", plain + b"\x02\x00", "damaged"
    yield "ONNX long key", plain + b"\xba\x80\x80\x80\x80\x01\x00", "damaged"
    yield "ONNX endless number", plain + b"\x70" + b"\xff" * 30, "damaged"
    yield "ONNX too long", plain + b"\x3a\xff\xff\xff\xff\x7f", "damaged"
    yield "ONNX empty", field(1, 8) + field(2, "x"), "damaged"
    yield "ONNX cut", plain[:-3], "damaged"
    deep = field(1, "a")
    for _ in range(2000):
        deep = field(6, field(1, field(4, "Relu") + field(5, deep)))
    yield "ONNX deep", small([field(4, "Relu") + field(5, deep)]), "decides"
    yield "ONNX header", b"\x08\x07\x12\x07pytorch\x1a\x031.9" + bytes(200), "damaged"


def heavy_onnx():
    """Yield (name, content): files that look harmless and compute without measure."""
    far = np.array([1, 1, 400_000, 400_000], np.int64)
    shape = [tensor("n", far)]
    huge = node("ConstantOfShape", ["n"], ["z"])
    yield (
        "constant",
        onnx_file([huge, node("Add", ["x", "z"], ["y"])], shape, IMAGE, RESULT),
    )
    grown = node("Expand", ["x", "n"], ["z"])
    mean = node("ReduceMean", ["z"], ["m"], axes=[2, 3])
    yield (
        "expanded",
        onnx_file([grown, mean, node("Add", ["x", "m"], ["y"])], shape, IMAGE, RESULT),
    )
    nodes, last = [], "x"
    for step in range(12):
        nodes.append(node("Concat", [last] * 8, [f"c{step}"], axis=1))
        last = f"c{step}"
    nodes += [
        node("ReduceMean", [last], ["m"], axes=[1]),
        node("Add", ["x", "m"], ["y"]),
    ]
    yield "doubled", onnx_file(nodes, [], IMAGE, RESULT)
    promised = field(1, 50_000, 50_000, 9, 9) + field(2, 1) + field(8, "w")
    yield "promised", onnx_file([CONV], [promised], IMAGE, RESULT)
    wide = node("Conv", ["x", "w"], ["y"], pads=[1 << 30] * 4)
    yield "padded", onnx_file([wide], [tensor("w", ONE)], IMAGE, RESULT)
    far_pads = tensor("p", np.array([0, 0, 1 << 30, 1 << 30] * 2, np.int64))
    yield "pad", onnx_file([node("Pad", ["x", "p"], ["y"])], [far_pads], IMAGE, RESULT)
    times = tensor("s", np.array([1, 1, 1e5, 1e5], np.float32))
    enlarged = node("Resize", ["x", "", "s"], ["y"], mode="nearest")
    yield "enlarged", onnx_file([enlarged], [times], IMAGE, RESULT)
