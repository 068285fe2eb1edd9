"""Numbers of numpy, paths and settings beside the weights that lie or explode."""

import numpy as np
from hostile_pickles import (
    DAMAGED,
    FOUR,
    Gadget,
    number,
    numbers,
    saved,
    state_dict,
    tensor,
    text,
    torch_zip,
)

SCALAR = b"cnumpy._core.multiarray\nscalar\n"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
LITTLE = b"(" + number(3) + text("<") + b"NNN" + number(-1) * 2 + number(0) + b"t"


def raw(content: str, encoding="latin1") -> bytes:
    return b"c_codecs\nencode\n" + text(content) + text(encoding) + b"\x86R"


def dtype(code="f8", align=b"\x89", copy=b"\x88", state=LITTLE) -> bytes:
    return b"cnumpy\ndtype\n" + text(code) + align + copy + b"\x87R" + state + b"b"


def scalar(kind=None, content=None) -> bytes:
    kind = dtype() if kind is None else kind
    content = raw("\0" * 8) if content is None else content
    return SCALAR + kind + content + b"\x86R"


def array(shape=b"K\x01\x85", kind=None, fortran=b"\x89", content=None, again=1):
    kind = dtype() if kind is None else kind
    content = raw("\0" * 8) if content is None else content
    empty = ARRAY + b"K\0\x85" + raw("b") + b"\x87R"
    state = b"(" + b"K\x01" + shape + kind + fortran + content + b"t"
    return empty + (state + b"b") * again


def lying_numbers():
    yield "itemsize of a number", scalar(content=raw("\0" * 4)), DAMAGED
    yield "no bytes", scalar(content=text("\0" * 8)), DAMAGED
    yield "no type", scalar(kind=text("f8")), DAMAGED
    yield "itemsize of an array", array(kind=dtype("f4")), DAMAGED
    yield "huge shape", array(b"(" + numbers([2**31, 2**31]) + b"t"), DAMAGED
    yield "huge sides", array(numbers([2**31, 2**31, 2**31])), DAMAGED
    yield "overflowing shape", array(numbers([2**62, 4, 4])), DAMAGED
    yield "negative shape", array(numbers([-1, -1])), DAMAGED
    yield "empty huge shape", array(numbers([0, 2**60])), DAMAGED
    yield "17 axes", array(numbers([1] * 17)), DAMAGED
    yield "filled twice", array(again=2), DAMAGED
    yield "never filled", array(again=0), "array is empty"
    yield "order of axes", array(fortran=b"K\x07"), DAMAGED
    objects = "of numpy beside its weights that are no numbers"
    for code in (
        "O8",
        "O",
        "U9",
        "V8",
        "S8",
        "M8[ns]",
        "c16",
        "f16",
        "i4,i4",
        "(9,)f8",
    ):
        yield f"array of {code}", array(kind=dtype(code)), objects
        yield f"number {code}", scalar(dtype(code)), objects
    # Without a copy, numpy's own type would be changed for the whole program.
    yield "type without copy", scalar(dtype(copy=b"\x89")), DAMAGED
    yield "type told twice", scalar(dtype(state=LITTLE + b"b" + LITTLE)), DAMAGED
    sized = LITTLE.replace(number(-1) * 2, number(800) * 2)
    yield "size of a type", scalar(dtype(state=sized)), DAMAGED
    yield (
        "fields of a type",
        scalar(dtype(state=LITTLE.replace(b"NNN", b"N}N"))),
        DAMAGED,
    )
    flags = LITTLE.replace(number(0) + b"t", number(63) + b"t")
    yield "flags of a type", scalar(dtype(state=flags)), DAMAGED
    yield "type as value", dtype(), "is no value"
    yield "array of another class", array().replace(b"ndarray", b"dtype"), DAMAGED
    yield (
        "ndarray called",
        b"cnumpy\nndarray\n" + numbers([10**6] * 2) + b"\x85R",
        DAMAGED,
    )
    yield "other codec", raw("a" * 99, "punycode"), DAMAGED
    yield "codec of strangers", raw("a", "unicode_escape"), DAMAGED
    yield (
        "bytes of a size",
        b"c__builtin__\nbytes\n" + number(10**11) + b"\x85R",
        DAMAGED,
    )
    yield "list called", b"c__builtin__\nlist\n)R", DAMAGED
    masked = b"cnumpy.ma.core\n_mareconstruct\n)R"
    yield "masked array", masked, r"values of numpy \(numpy\.ma\.core"


def lying_settings():
    default = b"ccollections\ndefaultdict\n"
    yield "default of os", default + b"cos\nsystem\n\x85R", r"os\.system"
    yield "default of a text", default + text("list") + b"\x85R", DAMAGED
    path = b"cpathlib\nPosixPath\n"
    yield "path of numbers", path + numbers([1, 2]) + b"R", DAMAGED
    yield "long path", path + text("a" * 5000) + b"\x85R", DAMAGED
    named = b"cargparse\nNamespace\n)\x81"
    yield "namespace of numbers", named + b"}" + number(1) + b"Nsb", DAMAGED
    yield "namespace of a list", named + b"]b", DAMAGED
    yield "namespace with arguments", b"cargparse\nNamespace\nN\x85\x81", DAMAGED
    yield "namespace called", b"cargparse\nNamespace\nN\x85R", DAMAGED
    system = b"cos\nsystem\n" + text("touch canary") + b"\x85R"
    yield "namespace of gadgets", named + b"}" + text("x") + system + b"sb", "system"
    yield (
        "namespace of dunder",
        named + b"}" + text("__class__") + system + b"sb",
        "sys",
    )
    parser = b"cargparse\nArgumentParser\n)R"
    yield "parser", parser, r"argparse\.ArgumentParser"
    omega = b"comegaconf.dictconfig\nDictConfig\n)\x81"
    yield "omegaconf", omega, r"omegaconf\.dictconfig"


def bombs():
    entries = b"".join(text(str(i)) + b"N" for i in range(40_000))
    named = b"cargparse\nNamespace\nq\x07)\x81}q\x08(" + entries + b"ub"
    named = b"](" + named + b"h\x07)\x81h\x08b" * 20_000 + b"e"
    yield "copied namespaces", named, DAMAGED
    some = raw("\0" * (4 << 20))[:-1] + b"Rq\x07"
    kind = dtype() + b"q\x08"
    side = number((4 << 20) // 8) + b"\x85q\x09"
    begin = ARRAY + b"K\0\x85" + raw("b") + b"\x87R"
    first = begin + b"(K\x01" + side + kind + b"\x89" + some + b"tb"
    again = begin + b"(K\x01h\x09h\x08\x89h\x07tb"
    yield "copied arrays", b"](" + first + again * 500 + b"e", DAMAGED
    codec = b"c_codecs\nencode\nq\x07" + text("a" * (8 << 20)) + b"q\x08"
    codec += text("latin1") + b"q\x09\x86R"
    yield "copied bytes", b"](" + codec + b"h\x07h\x08h\x09\x86R" * 900 + b"e", DAMAGED
    path = b"cpathlib\nPosixPath\nq\x07" + text("a" * 4000) + b"q\x08\x85R"
    path = b"](" + path + b"h\x07h\x08\x85R" * 29_000 + b"e"
    yield "copied paths", path, DAMAGED
    memo = SCALAR + b"q\x07" + dtype() + b"q\x08" + raw("\0" * 8) + b"q\x09\x86R"
    for count, expected in ((29_000, "no tensors"), (48_000, "more than 15000 values")):
        many = b"](" + memo + b"h\x07h\x08h\x09\x86R" * count + b"e"
        yield f"{count} numbers", many, expected


def hostile_numbers():
    """Yield (name, content, what its message says)."""
    for name, content, expected in (*lying_numbers(), *lying_settings()):
        # Beside a tensor, so that nothing else is wrong with it.
        both = b"\x80\x02}(" + text("weight") + tensor() + text("x") + content + b"u."
        yield f"beside {name}", torch_zip(both, {"0": FOUR}), expected
    for name, content, expected in bombs():
        yield f"beside {name}", torch_zip(state_dict(content)), expected
    yield (
        "beside a gadget within an array",
        saved({"x": np.array([Gadget(print, "x")], object)}),
        "no numbers",
    )
