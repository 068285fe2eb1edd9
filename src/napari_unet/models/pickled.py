"""Follow a pickle without running it.

A pickle is a program for a small machine with a stack, a memo and the power to call
any function of any module. `follow_pickle` is that machine without the power: it
knows the few functions that a checkpoint of weights needs, imports none of them and
makes plain values only, with a `TensorView` where a tensor would be. So it is known
what a file holds, and that all of it lies within the file, before torch reads it.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari_unet.errors import BadModel, NeedsTrust
from napari_unet.models import beside
from napari_unet.models.beside import Array, Beside, Dtype, Fields, Name

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_INSTRUCTIONS = 250_000  # 3000 tensors, as of 1000 and their optimiser, have 130,000
MAX_DEPTH = 32  # of nested containers
MAX_VALUES = 50_000  # with those counted again that are referred to again
MAX_SHARED = 4  # times a storage's values may be part of some tensor
MAX_NDIM = 16

_DAMAGED = "Get the file again."
_SAVE_AGAIN = (
    "If you trust where it came from, load it in Python and save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pt')."
)
_STORAGES = {
    f"torch.{name}Storage": size
    for size, names in {
        8: "Double Long",
        4: "Float Int",
        2: "Half BFloat16 Short",
        1: "Char Byte Bool",
    }.items()
    for name in names.split()
}
_DTYPES = {
    f"torch.{name}"
    for name in (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    )
}
_MAPPINGS = {"collections.OrderedDict", "collections.Counter"}
_TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
_PARAMETER = "torch._utils._rebuild_parameter"
_FACTS = {"torch.Size", "torch.device"}
_KNOWN = {*_STORAGES, *_DTYPES, *_MAPPINGS, *_TENSORS, *_FACTS, _PARAMETER}
_KNOWN |= beside.NAMES

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_INSTRUCTIONS = {
    *_CONSTANTS,
    *_ARGUMENTS,
    *_TUPLES,
    *"PROTO MARK TUPLE EMPTY_DICT EMPTY_LIST SHORT_BINSTRING".split(),
    *"APPEND APPENDS SETITEM SETITEMS BUILD".split(),
    *"BINPUT LONG_BINPUT BINGET LONG_BINGET".split(),
    *"GLOBAL REDUCE NEWOBJ BINPERSID".split(),
}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of values that a pickle refers to."""

    key: str
    kind: str
    count: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.count * _STORAGES[self.kind]


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor: which values of a storage it shows, in which shape."""

    storage: Storage
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Followed:
    """What a pickle makes."""

    tree: Any
    storages: dict[str, Storage]
    end: int
    beside: set[str]


def follow_pickle(
    content: bytes, start: int = 0, most: int = MAX_INSTRUCTIONS
) -> Followed:
    """Find out what a pickle makes, without making it.

    Parameters
    ----------
    content : bytes
        May go on behind the pickle.
    start : int
        Where the pickle starts.
    most : int
        Instructions to follow.

    Returns
    -------
    Followed
        Plain values with a `TensorView` for each tensor, all storages by key, where
        the pickle ends, and the names of what only `Beside` can make.

    Raises
    ------
    NeedsTrust
        If it asks for code to be run that plain weights do not need.
    BadModel
        If it holds more than a network has, or is damaged.
    """
    machine = _Machine()
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        for steps, (name, argument) in enumerate(_instructions(stream)):
            if steps >= most:
                raise BadModel(
                    "It holds more values than a network has (its description takes "
                    f"more than {most} steps). {_SAVE_AGAIN}"
                )
            machine.step(name, argument)
        tree = machine.pop()
    # pickletools raises ValueError for what it cannot parse; the rest comes of
    # instructions that do not fit the stack.
    except (ValueError, IndexError, KeyError, TypeError) as error:
        problem = f"Its description is incomplete or damaged. {_DAMAGED}"
        raise BadModel(problem) from error
    _check_values(tree)
    return Followed(tree, machine.storages, stream.tell(), machine.beside)


def _instructions(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of every instruction, up to STOP.

    No argument of an instruction that is not known is read.
    """
    while (opcode := _OPCODES[stream.read(1).decode("latin-1")]).name != "STOP":
        name = opcode.name
        if name not in _INSTRUCTIONS:
            raise NeedsTrust(
                f"It uses the pickle instruction {name}, which weights do not need and "
                "which can run programs."
            )
        argument = None
        if name == "GLOBAL":
            lines = [stream.readline() for _ in range(2)]
            _expect(lines[1].endswith(b"\n"))
            argument = [line[:-1].decode() for line in lines]
        elif opcode.arg:
            argument = opcode.arg.reader(stream)
        yield name, argument


class _Machine:
    """The stack, the memo and the instructions that `torch.save` writes."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.beside: set[str] = set()
        self._beside = Beside()
        self._shown: dict[str, int] = {}
        self._copied = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _ARGUMENTS:
            push(argument)
        elif name in _TUPLES:
            push(tuple(self._take(_TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name == "GLOBAL":
            push(known := _known(*argument))
            if known.path in beside.NAMES:
                self.beside.add(known.path)
        elif name == "REDUCE":
            arguments = self.pop()
            push(self._call(self.pop(), arguments))
        elif name == "NEWOBJ":
            arguments, kind = self.pop(), self.pop()
            _expect(type(kind) is Name and kind.path in beside.NEW)
            push(self._call(kind, arguments))
        elif name == "BINPERSID":
            push(self._storage(self.pop()))
        else:
            self._fill(name, argument)

    def _fill(self, name: str, argument: Any) -> None:
        """Follow the instructions that make and fill containers."""
        if name == "EMPTY_DICT":
            self._stack.append({})
        elif name == "EMPTY_LIST":
            self._stack.append([])
        elif name == "TUPLE":
            items = self._take_marked()
            self._stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._take(1) if name == "APPEND" else self._take_marked()
            _expect(type(self._stack[-1]) is list)
            self._stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._take(2) if name == "SETITEM" else self._take_marked()
            _set_items(self._stack[-1], items)
        elif name == "BUILD" and type(self._stack[-2]) in (Fields, Dtype, Array):
            state = self.pop()
            self._beside.build(self._stack[-1], state)
        elif name == "BUILD":
            # The attributes of a state dict: its modules' versions, of no use here.
            state = self.pop()
            _expect(type(self._stack[-1]) is dict and type(state) is dict)
            _expect(set(state) <= {"_metadata"})
        elif name == "SHORT_BINSTRING":
            _expect(argument.isascii())
            self._stack.append(argument)
        elif argument != 2:  # of PROTO
            raise NeedsTrust(
                f"It was saved with pickle protocol {argument}, which cannot be read "
                "safely."
            )

    def _take(self, count: int) -> list[Any]:
        _expect(len(self._stack) >= count)
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _take_marked(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return what a known function would make of its arguments."""
        _expect(type(function) is Name and type(arguments) is tuple)
        path = function.path
        if path in beside.NAMES:
            return self._beside.make(path, arguments)
        if path in _TENSORS:
            return self._tensor(path, *arguments)
        if path == _PARAMETER:
            view, _, hooks = arguments
            _expect(type(view) is TensorView and hooks == {})
            return view
        if path in _MAPPINGS:
            return self._mapping(path, *arguments)
        if path == "torch.Size":
            (sizes,) = arguments
            _expect(_is_shape(sizes))
            return sizes
        _expect(path == "torch.device" and 1 <= len(arguments) <= 2)
        _expect(_is_word(arguments[0]) and all(map(_is_count, arguments[1:])))
        return arguments[0]

    def _mapping(self, path: str, content: Any = ()) -> dict[Any, Any]:
        """Return what ``OrderedDict(pairs)`` or ``Counter(dict)`` makes."""
        # The same content could be copied again and again.
        self._copied += len(content)
        _expect(self._copied <= MAX_VALUES)
        if path == "collections.Counter":
            _expect(not content or type(content) is dict)
            return dict(content)
        mapping: dict[Any, Any] = {}
        for pair in content:
            _expect(type(pair) in (tuple, list) and len(pair) == 2)
            _set_items(mapping, list(pair))
        return mapping

    def _storage(self, reference: Any) -> Storage:
        """Return the storage that a persistent id refers to."""
        _expect(type(reference) is tuple and len(reference) >= 1)
        if reference[0] == "module":
            raise NeedsTrust(
                "It is a whole network with its program code, not weights alone."
            )
        kind, name, key, location, count, *view = reference
        _expect(kind == "storage" and type(name) is Name and name.path in _STORAGES)
        _expect(_is_word(key) and _is_word(location) and _is_count(count))
        if view not in ([], [None]):
            raise BadModel(
                "It was written by a torch before 0.4, whose shared tensors cannot be "
                f"read. {_SAVE_AGAIN}"
            )
        storage = Storage(key, name.path, count)
        if self.storages.setdefault(key, storage) != storage:
            raise BadModel(f"It describes its storage {key[:40]} twice. {_DAMAGED}")
        return storage

    def _tensor(
        self, path: str, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any
    ) -> TensorView:
        """Return a tensor after checking that it lies within its storage."""
        _expect(type(storage) is Storage and _is_count(offset))
        _expect(_is_shape(shape) and _is_shape(stride) and len(shape) == len(stride))
        if path.endswith("_v2"):
            grad, hooks = rest
            _expect(type(grad) is bool and hooks == {})
        else:
            _expect(not rest)
        total, last = 1, offset
        for size, step in zip(shape, stride, strict=True):
            total *= size
            last += (size - 1) * step
        if total > storage.count or (total and last >= storage.count):
            raise BadModel(
                f"A tensor of shape {shape} does not lie within its {storage.count} "
                f"stored values. {_DAMAGED}"
            )
        shown = self._shown.get(storage.key, 0) + total
        if shown > MAX_SHARED * storage.count:
            raise BadModel(
                f"Its tensors show the same values more than {MAX_SHARED} times. "
                f"{_SAVE_AGAIN}"
            )
        self._shown[storage.key] = shown
        return TensorView(storage, shape)


def _known(module: str, name: str) -> Name:
    """Return the name of a function or type, if it is one that weights need."""
    path = f"{module}.{name}"
    if path in _KNOWN:
        return Name(path)
    shown = path if path.isprintable() else ascii(path)
    if path.startswith("numpy."):
        raise NeedsTrust(
            f"It keeps values of numpy ({shown[:80]}) beside its weights that are no "
            "plain numbers."
        )
    raise NeedsTrust(
        f"It asks for {shown[:80]} to be called or made when it is opened. Weights "
        "need none of that, and it could run any program."
    )


def _expect(fact: bool) -> None:
    """Raise the error of damaged or forged pickles unless a fact holds."""
    if not fact:
        raise ValueError("not as torch.save writes it")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_shape(value: Any) -> bool:
    return (
        type(value) is tuple and len(value) <= MAX_NDIM and all(map(_is_count, value))
    )


def _is_word(value: Any) -> bool:
    return type(value) is str and len(value) <= 100


def _set_items(mapping: Any, items: list[Any]) -> None:
    _expect(type(mapping) is dict and len(items) % 2 == 0)
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Other keys, such as nested tuples or huge numbers, can take ages to hash.
        _expect(type(key) in (str, bool, float, type(None)) or abs(key) < 2**60)
        mapping[key] = value


def _check_values(tree: Any) -> None:
    """Check the kinds, nesting and number of all values, as if nothing were shared."""
    seen = 0
    waiting = [(tree, 0)]
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH or seen + len(waiting) > MAX_VALUES:
            raise BadModel(
                "Its values are too many or nested too deeply for a network "
                f"({MAX_VALUES} values, {MAX_DEPTH} levels at most). {_SAVE_AGAIN}"
            )
        kind = type(value)
        if kind in (dict, Fields):
            names = [key for key in value if type(key) is str]
            _check_names(names)
            waiting.extend((item, depth + 1) for item in value.values())
        elif kind in (list, tuple):
            waiting.extend((item, depth + 1) for item in value)
        elif kind is Name:
            if value.path not in _DTYPES:
                raise BadModel(f"It is damaged: {value.path} is no value. {_DAMAGED}")
        elif kind is Array:
            if value.values is None:
                raise BadModel(f"It is damaged: an array is empty. {_DAMAGED}")
        elif kind is Dtype:
            raise BadModel(f"It is damaged: a type of numpy is no value. {_DAMAGED}")
        elif kind is Storage:
            raise BadModel(f"It holds bare storages instead of tensors. {_SAVE_AGAIN}")


def _check_names(names: list[str]) -> None:
    for name in names:
        if len(name) > 500 or not name.isprintable():
            raise BadModel(
                f"It is damaged: {name[:40]!a} cannot be the name of a tensor. "
                f"{_DAMAGED}"
            )
