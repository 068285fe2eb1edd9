"""Harmless values that training scripts save beside the weights.

Numbers and arrays of numpy, paths, settings: `Beside` makes plain values of them from
what a pickle says, and calls nothing of numpy with it but the reading of numbers. Where
torch reads the same pickle it gets `Unread` objects instead, which do nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from napari_unet.errors import BadModel, NeedsTrust

MAX_BYTES = 32 << 20  # of all arrays and texts together
MAX_MADE = 30_000  # values; a number of numpy counts twice, with its bytes
MAX_PATH = 4096  # letters
_NUMBERS = set("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())
_NUMPY = [
    f"numpy.{core}.multiarray.{name}"
    for core in ("core", "_core")
    for name in ("scalar", "_reconstruct")
]
_FACTORIES = {
    f"{module}.{name}"
    for module in ("__builtin__", "builtins")
    for name in ("bytes", "list", "dict", "int", "float", "str")
}
_PATHS = {
    f"{module}.{system}Path": kind
    for module in ("pathlib", "pathlib._local")
    for prefix in ("", "Pure")
    for system, kind in (
        (f"{prefix}Posix", PurePosixPath),
        (f"{prefix}Windows", PureWindowsPath),
    )
}
# Made without arguments, and then filled.
_MAPPINGS = {
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
}
_NAMESPACE = "argparse.Namespace"
_VERSION = "torch.torch_version.TorchVersion"
_ENCODE = "_codecs.encode"  # how bytes are written
NEW = {*_MAPPINGS, _NAMESPACE, _VERSION}  # what is made by NEWOBJ, not by REDUCE
NAMES = {
    *_NUMPY,
    *_FACTORIES,
    *_PATHS,
    *NEW,
    _ENCODE,
    "numpy.dtype",
    "numpy.ndarray",
    "collections.defaultdict",
}


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a function or type that is never looked up."""

    path: str


class Fields(dict[Any, Any]):
    """The attributes of an ``argparse.Namespace``."""


@dataclass(slots=True)
class Array:
    """An array of numpy; None before it is filled."""

    values: np.ndarray[Any, Any] | None = None


@dataclass(slots=True)
class Dtype:
    """The type of numbers; it can be told their byte order once."""

    kind: np.dtype[Any]
    is_told: bool = False


class Unread:
    """What torch gets for any of `NAMES`; attributes are kept for their tensors."""

    state: Any

    def __new__(cls, *_: object) -> Unread:
        """Take any arguments, and forget them."""
        it = super().__new__(cls)
        it.state = {}
        return it

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _UnreadMapping:
    """What torch gets for a mapping: a plain one, which it fills."""

    def __new__(cls, *_: object) -> Any:
        return {}


def unread(names: set[str]) -> list[Any]:
    """Return what torch shall take for some of `NAMES`, for its ``safe_globals``."""
    mappings = {*_MAPPINGS, "collections.defaultdict"}
    return [
        # Torch has the names of Python 3 for those of Python 2.
        (
            _UnreadMapping if name in mappings else Unread,
            name.replace("__builtin__", "builtins"),
        )
        for name in names - {_ENCODE}
    ]


class Beside:
    """Makes plain values, as many as fit into the memory that one file may take."""

    def __init__(self) -> None:
        self._left = MAX_BYTES
        self._made = 0

    def make(self, path: str, arguments: tuple[Any, ...]) -> Any:
        """Return what one of `NAMES` makes of its arguments.

        Raises
        ------
        NeedsTrust
            If it is no plain number.
        BadModel
            If there are too many of them.
        ValueError, TypeError
            If the arguments are not as their libraries write them.
        """
        self._made += 1
        if self._made > MAX_MADE:
            raise BadModel(
                f"It keeps more than {MAX_MADE // 2} values of numpy beside its "
                "weights. Save the weights alone: torch.save(model.state_dict(), "
                "'weights.pt')."
            )
        if path in _PATHS:
            _expect(all(type(part) is str for part in arguments))
            length = sum(map(len, arguments))
            _expect(length <= MAX_PATH)
            self._take(length)
            return str(_PATHS[path](*arguments))
        if path in _MAPPINGS or path == _NAMESPACE:
            _expect(arguments == ())
            return Fields() if path == _NAMESPACE else {}
        if path == "collections.defaultdict":
            _expect(all(item is None or _is_factory(item) for item in arguments))
            return {}
        if path == _VERSION:
            (text,) = arguments
            _expect(type(text) is str and len(text) <= 100)
            return text
        if path == _ENCODE:
            text, encoding = arguments
            _expect(type(text) is str and encoding in ("latin1", "latin-1"))
            self._take(len(text))
            return text.encode("latin-1")
        if path in _FACTORIES:
            _expect(path.endswith(".bytes") and arguments == ())
            return b""
        if path == "numpy.dtype":
            return _dtype(*arguments)
        _expect(path in _NUMPY)
        if path.endswith("scalar"):
            kind, content = arguments
            _expect(type(kind) is Dtype and type(content) is bytes)
            _expect(len(content) == kind.kind.itemsize)
            return np.frombuffer(content, kind.kind)[0].item()
        _expect(arguments == (Name("numpy.ndarray"), (0,), b"b"))
        return Array()

    def build(self, target: Any, state: Any) -> None:
        """Give a value that `make` has returned its state."""
        if type(target) is Fields:
            _expect(type(state) is dict and all(type(name) is str for name in state))
            self._take(100 * len(state))
            target.update(state)
        elif type(target) is Dtype:
            _expect(type(state) is tuple and len(state) == 8 and not target.is_told)
            order, rest = state[1], (state[0], *state[2:])
            _expect(rest == (3, None, None, None, -1, -1, 0))
            _expect(order in ("<", ">", "|"))
            target.kind, target.is_told = target.kind.newbyteorder(order), True
        else:
            _expect(type(target) is Array and target.values is None)
            version, shape, kind, is_fortran, content = state
            _expect(version == 1 and type(is_fortran) is bool)
            _expect(type(kind) is Dtype and type(content) is bytes)
            _expect(type(shape) is tuple and len(shape) <= 16)
            _expect(all(type(side) is int and 0 <= side < 2**32 for side in shape))
            _expect(math.prod(shape) * kind.kind.itemsize == len(content))
            self._take(len(content))
            values = np.frombuffer(content, kind.kind)
            values = values.reshape(shape, order="F" if is_fortran else "C")
            target.values = values.astype(kind.kind.newbyteorder("="))

    def _take(self, count: int) -> None:
        self._left -= count
        _expect(self._left >= 0)


def _is_factory(value: object) -> bool:
    return type(value) is Name and value.path in _FACTORIES


def _dtype(code: Any, align: Any, copy: Any) -> Dtype:
    # Without a copy numpy would change its own type for all others, too.
    _expect(type(code) is str and len(code) < 40 and code.isprintable())
    _expect(align is False and copy is True)
    if code not in _NUMBERS:
        raise NeedsTrust(
            f"It keeps values of numpy beside its weights that are no numbers ({code})."
        )
    return Dtype(np.dtype(code))


def _expect(fact: bool) -> None:
    if not fact:
        raise ValueError("not as it is written")
