"""Numbers of numpy, paths and settings that training scripts save with the weights."""

import argparse
import collections
import copyreg
import io
import pathlib
import pickle
import sys
import threading
import types

import numpy as np
import pytest
import torch
from hostile_numbers import array, dtype, raw, scalar
from hostile_pickles import FOUR, tensor, text, torch_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_safety import assert_same, save

from napari_unet.errors import NeedsTrust
from napari_unet.models.safety import read_checked

TORCH = ["torch zip", "torch legacy"]
NUMBERS = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()


def assert_read(content, path, container, expected=None):
    tree = read_checked(save(content, path, container)).tree
    assert_same(tree, content if expected is None else expected)
    return tree


@pytest.mark.parametrize("container", TORCH)
def test_what_training_scripts_keep(container, tmp_path):
    weights = {"weight": torch.ones(2)}
    losses = collections.defaultdict(list)
    losses["train"].append(np.float32(0.5))
    content = {
        "epoch": np.int64(12),
        "best_iou": np.float64(0.8),
        "improved": np.bool_(True),
        "model": weights,
        "history": losses,
        "args": argparse.Namespace(lr=1e-3, data=pathlib.PurePosixPath("/a/b"), x=None),
        "none": argparse.Namespace(),
        "out": pathlib.PureWindowsPath("c:\\runs"),
        "here": pathlib.Path("runs"),
        "torch": torch.__version__,
        "bytes": b"\0\xff",
        "no bytes": b"",
        np.int64(7): "seven",
    }
    expected = content | {
        "epoch": 12,
        "history": {"train": [0.5]},
        "args": {"lr": 1e-3, "data": "/a/b", "x": None},
        "none": {},
        "out": "c:\\runs",
        "here": "runs",
        "torch": str(torch.__version__),
    }
    tree = assert_read(content, tmp_path / "last.pt", container, expected)
    kinds = {name: type(value) for name, value in tree.items()}
    assert (kinds["epoch"], kinds["best_iou"], kinds["improved"]) == (int, float, bool)
    assert kinds["out"] is kinds["torch"] is str
    assert type(list(tree)[-1]) is int


@pytest.mark.parametrize("container", TORCH)
def test_tensors_among_settings_are_found(container, tmp_path):
    content = {"args": argparse.Namespace(mean=torch.ones(3), deep=[torch.zeros(1)])}
    checked = read_checked(save(content, tmp_path / "a.pt", container))
    assert set(checked.tensors) == {"args.mean", "args.deep.0"}


@pytest.mark.parametrize("container", TORCH)
@given(
    array=arrays.arrays(
        st.sampled_from([np.dtype(c).newbyteorder(o) for c in NUMBERS for o in "<>"]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    fortran=st.booleans(),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_arrays_come_back(container, array, fortran, tmp_path):
    array = np.asarray(array, order="F" if fortran else "C")
    content = {"weight": torch.ones(1), "losses": array, "first": array.ravel()[:1]}
    content |= {"numbers": list(array.ravel())}
    tree = read_checked(save(content, tmp_path / "a.pt", container)).tree
    found = tree["losses"]
    assert type(found) is np.ndarray
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.flags.writeable
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(tree["numbers"], array.ravel())
    assert all(type(number) in (bool, int, float) for number in tree["numbers"])


@pytest.mark.parametrize("core", [b"_core", b"core"])  # numpy 2 and numpy 1
@pytest.mark.parametrize("content", [scalar(), array()], ids=["number", "array"])
def test_the_names_of_both_numpys(core, content, tmp_path):
    """And: what the hostile files differ from is read."""
    content = content.replace(b"numpy._core.", b"numpy." + core + b".")
    content = b"\x80\x02}(" + text("weight") + tensor() + text("x") + content + b"u."
    (tmp_path / "a.pt").write_bytes(torch_zip(content, {"0": FOUR}))
    assert read_checked(tmp_path / "a.pt").tree["x"] == 0


def test_a_shared_type_and_shared_bytes(tmp_path):
    content = b"](" + scalar(dtype() + b"q\7", raw("\0" * 7 + "@") + b"q\x08")
    content += scalar(b"h\7", b"h\x08") + array(kind=b"h\7", content=b"h\x08") + b"e"
    content = b"\x80\x02}(" + text("weight") + tensor() + text("x") + content + b"u."
    (tmp_path / "a.pt").write_bytes(torch_zip(content, {"0": FOUR}))
    one, other, many = read_checked(tmp_path / "a.pt").tree["x"]
    assert one == other == many[0] == 2


def test_numpy_itself_is_as_before(tmp_path):
    """A type that is told its byte order is a copy, not numpy's own."""
    content = {"a": torch.ones(1), "b": np.arange(3, dtype=">f8"), "c": np.float64(1)}
    before = set(torch.serialization.get_safe_globals())
    read_checked(save(content, tmp_path / "a.pt", "torch zip"))
    assert np.dtype("f8").isnative
    assert set(torch.serialization.get_safe_globals()) == before


def test_settings_of_lightning(tmp_path):
    names = ("pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data")
    for name in (*names, "lightning.fabric.utilities.data"):
        module = types.ModuleType(name)
        exec("class AttributeDict(dict): pass", module.__dict__)
        module.AttributeDict.__module__ = name
        settings = module.AttributeDict(lr=np.float64(1), nested={"a": 1})
        content = {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": settings}
        parts = name.split(".")
        known = [".".join(parts[: n + 1]) for n in range(len(parts))]
        for parent in known:
            sys.modules.setdefault(parent, types.ModuleType(parent))
        sys.modules[name] = module
        try:
            save(content, tmp_path / "last.ckpt", "torch zip")
        finally:
            for parent in known:
                sys.modules.pop(parent)
        tree = read_checked(tmp_path / "last.ckpt").tree
        assert tree["hyper_parameters"] == {"lr": 1.0, "nested": {"a": 1}}
        assert type(tree["hyper_parameters"]) is dict


OTHERS = {
    "texts": np.array(["nucleus"]),
    "a text": np.str_("nucleus"),
    "objects": np.array([{}], object),
    "complex": np.complex64(1),
    "date": np.datetime64("2020-01-01"),
    "record": np.zeros(1, [("a", "f4")]),
    "masked": np.ma.masked_array([1]),
    "generator": np.random.default_rng(0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_values_of_numpy_need_consent(name, tmp_path):
    path = save({"w": torch.ones(1), "x": OTHERS[name]}, tmp_path / "a.pt", TORCH[0])
    with pytest.raises(NeedsTrust, match=r"of numpy.*beside its weights.*--trust"):
        read_checked(path)


def test_older_protocols_of_the_same(tmp_path):
    """What `copyreg` makes of objects up to protocol 1 is a program like any other."""
    file = io.BytesIO()
    pickle.dump({"x": argparse.Namespace(a=1)}, file, 1)
    assert copyreg._reconstructor.__name__.encode() in file.getvalue()
    (tmp_path / "a.pt").write_bytes(torch_zip(file.getvalue()))
    with pytest.raises(NeedsTrust, match=r"copyreg|copy_reg|protocol"):
        read_checked(tmp_path / "a.pt")


def test_many_threads_read_at_once(tmp_path):
    """The names that torch is told for one file do not get lost for another."""
    paths = []
    for n in range(8):
        values = {"a": np.float64(n), "b": argparse.Namespace(c=n)}
        content = {"w": torch.ones(1), "x": [values] * 50}
        paths.append(save(content, tmp_path / f"{n}.pt", TORCH[n % 2]))
    found = {}

    def read(n, path):
        for _ in range(5):
            found[n] = read_checked(path).tree["x"][-1]

    threads = [threading.Thread(target=read, args=pair) for pair in enumerate(paths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: {"a": n, "b": {"c": n}} for n in range(8)}
