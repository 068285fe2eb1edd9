"""Weights out of a pickled network or TorchScript, with stand-ins for all its code.

Nothing that such a file names is imported or called but the few functions of
`_REAL`, which put tensors and plain containers together. A `StandIn` takes the place of
all others and keeps what it is given: of a module, its parameters and buffers.
Still no reader for files from strangers: it runs in the child of `trust` only, where
time and memory are limited.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from napari_unet.errors import BadModel
from napari_unet.models.containers import LEGACY_MAGIC, MAX_MEMBERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MAX_DEPTH = 64  # of values within values


def take_weights(path: Path) -> dict[str, Tensor]:
    """Take all tensors out of a file that ``torch.save`` or pickle has written.

    Parameters
    ----------
    path : Path
        Of a zip archive of torch (TorchScript, too), a file of torch < 1.6, or a
        plain pickle.

    Returns
    -------
    dict of str to Tensor
        Apart from each other, in the order and by the names that
        ``module.state_dict()`` would give them; those of a module within something
        else have its place as a prefix.

    Raises
    ------
    BadModel
        If it holds no tensors.
    """
    content = path.read_bytes()
    with warnings.catch_warnings(action="ignore"):  # of old storages and lost sources
        if content.startswith(b"PK"):
            tree = _load(_without_code(content))
        elif content[2:15] == LEGACY_MAGIC:
            tree = _load(io.BytesIO(content))
        else:
            tree = _Unpickler(io.BytesIO(content)).load()
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(tree, (), ()):
        if tensor.layout is torch.strided and not tensor.is_quantized:
            found[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        if len(found) > MAX_MEMBERS:
            raise BadModel(
                f"It holds more tensors than a network has ({MAX_MEMBERS} at most)."
            )
    if not found:
        raise BadModel("No weights are in it, or they were made part of its code.")
    return found


def _without_code(content: bytes) -> io.BytesIO:
    """Return a plain archive of torch with the data of another one.

    Torch takes an archive with code for TorchScript and would compile it.
    """
    plain = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(plain, "w") as new,
    ):
        names = old.namelist()
        roots = [name[:-8] for name in names if name.endswith("/data.pkl")]
        if not roots:
            raise BadModel("It is no archive that torch has written.")
        for name in names:
            inner = name.removeprefix(roots[0])
            if inner in ("data.pkl", "byteorder") or inner.startswith("data/"):
                new.writestr(f"archive/{inner}", old.read(name))
        new.writestr("archive/version", b"3\n")
    plain.seek(0)
    return plain


def _load(file: io.BytesIO) -> Any:
    """Let torch read, with our pickle machine instead of Python's."""
    # A file in memory: of one on a disk torch would try first whether it is a tar.
    return torch.load(
        file, map_location="cpu", pickle_module=_PICKLE, weights_only=False
    )


# --- what the pickle machine makes -------------------------------------------


class StandIn:
    """An object of a class, or the result of a function, that nobody looks up."""

    __slots__ = ("fields", "items")

    dump_patches = False  # torch asks whether an old network's code has changed
    fields: dict[Any, Any]
    items: dict[Any, Any]

    def __new__(cls, *_: object, **__: object) -> StandIn:
        """Take any arguments, and forget them."""
        it = super().__new__(cls)
        it.fields, it.items = {}, {}
        return it

    def __call__(self, *_: object, **__: object) -> StandIn:
        """Be called, should the file take this for a function."""
        return StandIn()

    def __setstate__(self, state: object) -> None:
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, dict):
                self.fields.update(part)

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, value: object) -> None:
        """Keep an item of what was a list."""
        self.items[len(self.items)] = value


class _Call:
    """A function that may be called; nothing of it can be changed, as pickles can."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("functions have no state")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _REAL.get(f"{module}.{name}", StandIn)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    """Return a part of a storage; torch checks that it lies within."""
    values = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    return values.as_strided(tuple(size), tuple(stride), offset)


def _load_bytes(content: bytes) -> Any:
    """Read a storage within a plain pickle."""
    if content[2:15] != LEGACY_MAGIC:
        raise BadModel("It holds tensors in a form that is not known.")
    return _load(io.BytesIO(content))


def _first(value: Any, *_: object) -> Any:
    return value


_REAL = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": _Call(set),
    "__builtin__.set": _Call(set),
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_parameter": _Call(_first),
    "torch._utils._rebuild_parameter_with_state": _Call(_first),
    "torch._tensor._rebuild_from_type_v2": _Call(
        lambda function, _, arguments, __: function(*arguments)
    ),
    "torch.storage._load_from_bytes": _Call(_load_bytes),
    "_codecs.encode": _Call(lambda text, _: text.encode("latin1")),
    # TorchScript marks its lists and dicts with their types.
    "torch.jit._pickle.restore_type_tag": _Call(_first),
    "torch.jit._pickle.build_tensorlist": _Call(_first),
}
_PICKLE: Any = SimpleNamespace(
    __name__="stand_ins",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


# --- its tensors by name -----------------------------------------------------


def _tensors(
    value: Any, place: tuple[str, ...], inside: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors with their names, those of a module as its state dict does."""
    if isinstance(value, Tensor):
        yield ".".join(place), value
    elif id(value) not in inside:  # modules may know their parents
        if len(place) > _MAX_DEPTH:
            raise BadModel("Its values are nested too deeply for a network.")
        for name, part in _parts(value):
            yield from _tensors(part, (*place, *name), (*inside, id(value)))


def _parts(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what is in a container or object: how it extends the name, and a value."""
    if isinstance(value, dict):
        yield from (((str(key),), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from (((str(n),), item) for n, item in enumerate(value))
    elif isinstance(value, StandIn):
        fields = value.fields
        if isinstance(modules := fields.get("_modules"), dict):
            hidden = fields.get("_non_persistent_buffers_set")
            hidden = hidden if isinstance(hidden, set) else set()
            yield (), fields.get("_parameters")
            buffers = fields.get("_buffers")
            if isinstance(buffers, dict):
                yield (), {n: b for n, b in buffers.items() if n not in hidden}
            yield (), modules
        else:
            yield (), fields
            yield (), value.items
