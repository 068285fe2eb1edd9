import json
import os
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile_containers import hostile_containers
from hostile_numbers import hostile_numbers
from hostile_pickles import hostile_pickles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_unet.errors import BadModel
from napari_unet.models.safety import read_checked
from napari_unet.network.unet import UNet

REAL = Path(__file__).parents[3] / "shared" / "data" / "checkpoints"


def save(content, path: Path, container: str) -> Path:
    """Save in one of the three containers."""
    if container == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        zipped = container == "torch zip"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


CONTAINERS = ["torch zip", "torch legacy", "safetensors"]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return UNet(depth=1, base_channels=2).state_dict()


# --- good files --------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_state_dict(container, weights, tmp_path):
    checked = read_checked(save(weights, tmp_path / "unet.ckpt", container))
    assert checked.container == container
    assert set(checked.tensors) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(checked.tensors[name], tensor)
        assert checked.tree[name] is checked.tensors[name]
    assert type(checked.tree) is dict


@pytest.mark.parametrize("container", CONTAINERS[:2])
def test_a_checkpoint_of_a_whole_training(container, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.Adam(network.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    network(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    grid = torch.arange(12.0).reshape(3, 4)
    content = {
        "epoch": 3,
        "best": float("nan"),
        "score": torch.tensor(float("inf")),
        "names": ("a", "ü", None, True, -(2**40)),
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"milestones": Counter(scheduler.milestones)},
        "parameter": parameter,
        "ema": OrderedDict(network.state_dict()),
        "views": [grid.T, grid[:, 1], grid[1:, ::2], torch.zeros(0, 3)],
        "kinds": {str(t): torch.ones(2).to(t) for t in KINDS},
        "size": grid.shape,
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        3: {True: 1, 0.5: 2, None: 3},
    }
    checked = read_checked(save(content, tmp_path / "last.ckpt", container))
    assert_same(checked.tree, content)
    assert torch.equal(checked.tensors["views.0"], grid.T)
    assert torch.equal(checked.tensors["parameter"], parameter)
    assert "optimizer.state.0.exp_avg" in checked.tensors
    assert not any(t.requires_grad for t in checked.tensors.values())


KINDS = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def assert_same(found, wanted):
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert type(found) is dict
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted or (found != found and wanted != wanted)


tensors = st.builds(
    lambda shape, kind: torch.arange(int(np.prod(shape))).reshape(shape).to(kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, *KINDS]),
)
words = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words | st.integers(0, 99), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("container", CONTAINERS[:2])
@given(
    named=st.dictionaries(words, tensors, min_size=1, max_size=4),
    other=plain,
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_all_that_torch_saves_of_plain_values_comes_back(
    container, named, other, tmp_path
):
    content = {"weights": named, "other": other}
    checked = read_checked(save(content, tmp_path / "any.pt", container))
    assert_same(checked.tree, content)
    assert set(checked.tensors) == {f"weights.{name}" for name in named}


def test_real_files():
    if not REAL.is_dir():
        pytest.skip("the real checkpoints are not here")
    expected = {
        "segmentify_Nuclei.pth": ("torch legacy", 124),
        "segmentmytif_flair_toy_ep10_scale0_125.pth": ("torch zip", 46),
        "bioimageio_unet2d_fixed_shape/weights.pt": ("torch zip", 36),
    }
    for name, (container, count) in expected.items():
        checked = read_checked(REAL / name)
        assert (checked.container, len(checked.tensors)) == (container, count)
        reference = torch.load(REAL / name, weights_only=True, map_location="cpu")
        assert_same(checked.tree, reference)


def test_what_an_optimizer_holds_may_be_infinite(tmp_path):
    path = tmp_path / "last.pt"
    moments = torch.full((3,), float("inf"))
    torch.save({"state_dict": {"a": torch.ones(3)}, "optimizer": [moments]}, path)
    assert read_checked(path).tensors["state_dict.a"].sum() == 3


def test_what_is_no_file(tmp_path):
    with pytest.raises(BadModel, match=r"directory. Check the path\."):
        read_checked(tmp_path)
    with pytest.raises(BadModel, match=r"No such file.* Check the path\."):
        read_checked(tmp_path / "missing.pt")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "missing.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name in ("gone.pt", "loop.pt"):
        with pytest.raises(
            BadModel, match=r"Cannot read the checkpoint.*Check the path"
        ):
            read_checked(tmp_path / name)
    if not hasattr(os, "mkfifo"):
        return
    (tmp_path / "endless.pt").symlink_to("/dev/zero")
    with pytest.raises(BadModel, match=r"not a regular file.* Check the path\."):
        read_checked(tmp_path / "endless.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(BadModel, match=r"not a regular file.* Check the path\."):
        read_checked(tmp_path / "pipe.pt")


# --- hostile and broken files: one child reads them all ------------------------


@contextmanager
def child_of(reader: str, folder: Path):
    """Give a function: what one and the same child process tells of a file."""
    script = Path(__file__).parent / "child_check.py"
    process = subprocess.Popen(
        [sys.executable, str(script), reader],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )

    def tell(path: Path) -> dict:
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert answer["path"] == str(path)
        return answer

    before = sorted(folder.iterdir())
    with process:
        yield tell
        process.stdin.close()
    assert process.returncode == 0
    assert sorted(folder.iterdir()) == before  # no file that a gadget would make


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """Return a function: what one child tells of each of some files."""
    with child_of("read_checked", tmp_path_factory.mktemp("child")) as tell:
        yield lambda paths: [tell(path) for path in paths]


def good_files(folder: Path, weights) -> list[Path]:
    return [save(weights, folder / f"good {c}.pt", c) for c in CONTAINERS]


def test_hostile_files(child, weights, tmp_path):
    good = good_files(tmp_path, weights)
    corpus = [*hostile_pickles(), *hostile_numbers(), *hostile_containers()]
    names = [name for name, _, _ in corpus]
    assert len(names) == len(set(names)) > 200
    paths = []
    for i, (_, content, _) in enumerate(corpus):
        paths.append(tmp_path / f"model {i}.pt")
        paths[-1].write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    answers = child([*good, *paths])
    assert all("read" in answer for answer in answers[:3])
    baseline = max(answer["peak"] for answer in answers[:3])
    failures = []
    for (name, _, expected), path, answer in zip(
        corpus, paths, answers[3:], strict=True
    ):
        message = answer.get("refused", "")
        if not (
            re.search(expected, message)
            and message.startswith(f"{path.name} cannot be used. ")
            and message.endswith((".", "'weights.pt').", "'w.pt')."))
            and message.isprintable()
            and len(message) < 500
            and answer["seconds"] < 2
            and answer["peak"] - baseline < 200 << 10
            and not answer["done"]
        ):
            failures.append((name, answer))
    assert not failures, "\n".join(map(str, failures))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_at_any_place(container, child, weights, tmp_path):
    content = save(weights, tmp_path / "good.pt", container).read_bytes()
    rng = np.random.default_rng(0)
    cuts = {0, 1, 2, 8, 9, 20, len(content) - 1, len(content) - 22}
    cuts = sorted(cuts | set(rng.integers(0, len(content), 200).tolist()))
    for cut in cuts:
        (tmp_path / f"{cut}.pt").write_bytes(content[:cut])
    answers = child([tmp_path / f"{cut}.pt" for cut in cuts])
    assert len(answers) >= 200
    for cut, answer in zip(cuts, answers, strict=True):
        words = "empty|incomplete|holds no data" if cut < 9 else "incomplete"
        assert re.search(words, answer["refused"]), answer
        assert "Get the file again" in answer["refused"]
        assert answer["seconds"] < 2
        assert not answer["done"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_flipped_bit(container, child, weights, tmp_path):
    """All of an archive but its padding is under a checksum, so damage is found there.

    The other containers have none: what is read of a damaged one is sound, at least.
    """
    good = save(weights, tmp_path / "good.pt", container)
    content = good.read_bytes()
    rng = np.random.default_rng(1)
    paths = [good]
    for i, place in enumerate(rng.integers(0, len(content), 200)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        paths.append(tmp_path / f"{i}.pt")
        paths[-1].write_bytes(damaged)
    answers = child(paths)
    original = answers[0]["read"]
    for answer in answers[1:]:
        assert "crashed" not in answer, answer
        assert answer["seconds"] < 2
        assert not answer["done"]
        if container == "torch zip":
            assert "refused" in answer or answer["read"] == original
        else:
            assert "refused" in answer or answer["sound"]
    assert sum("refused" in answer for answer in answers) > 10


def test_every_bit_of_the_weights_in_an_archive_is_guarded(tmp_path):
    weight = torch.arange(1.0, 17)
    path = save({"weight": weight}, tmp_path / "small.pt", "torch zip")
    content = path.read_bytes()
    start = content.index(weight.numpy().tobytes())
    for bit in range(8 * 64):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(BadModel, match=r"damaged \(Bad CRC-32"):
            read_checked(path)


def test_there_is_no_second_try(monkeypatch, tmp_path):
    """When torch itself refuses, nothing less safe is tried."""
    path = tmp_path / "good.pt"
    torch.save({"a": torch.ones(2)}, path)
    calls = []

    def refuse(file, **options):
        calls.append(options)
        raise RuntimeError("no")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(BadModel, match=r"refuses to read it safely \(no\)"):
        read_checked(path)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": False}]


def test_the_size_of_a_file(monkeypatch, tmp_path):
    path = tmp_path / "huge.pt"
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(9 << 30)  # takes no space
    with pytest.raises(BadModel, match="has 9 GB, more than any U-Net"):
        read_checked(path)
