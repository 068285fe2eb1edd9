"""Our file: what was saved comes back, and nothing else is taken for a model."""

import dataclasses
import errno
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from napari_unet.errors import BadModel, BadOutput
from napari_unet.models.checkpoint import (
    FORMAT,
    MAX_HEADER,
    model_sha256,
    read_model,
    save_model,
)
from napari_unet.models.model import (
    BorderWeights,
    ClassInfo,
    Model,
    Passport,
    TrainingRecord,
)
from napari_unet.models.normalize import Normalization
from napari_unet.network.config import NAMED_CONFIGS, UNetConfig
from napari_unet.network.unet import UNet

FULL_PASSPORT = Passport(
    name="Zellkerne – 核 🔬",
    version="2",
    description='quotes " and \\ and\nlines',
    citation="doi:10.1007/978-3-319-24574-4_28",
    classes=(
        ClassInfo(name="background", kind="background"),
        ClassInfo(name="nucleus", kind="objects", color="#00ff00"),
    ),
    channels=("DAPI",),
    pixel_size=(0.1, 1 / 3),
    object_diameter=17.5,
    normalization=Normalization(method="fixed", lower=-1.5, upper=4e9, scope="plane"),
    intensity_range=(0.0, 65535.0),
    threshold=0.62,
    minimal_size=12,
    split_touching=True,
    grow=1,
    border_weights=BorderWeights(preset="falk", w0=50, sigma=6),
    history=(
        TrainingRecord(
            date="2026-01-02",
            data="simulated nuclei",
            settings={"steps": 3, "nested": {"a": [1, None, "x"]}},
            scores={"ap50": 0.8125},
        ),
    ),
    library_versions={"torch": torch.__version__},
    thumbnail="iVBORw0KGgo=",
)


def equal_outputs(one: Model, other: Model) -> bool:
    config = one.network.config
    # A legal side for each of the named configurations.
    side = 44 if config.padding == "same" else 188
    torch.manual_seed(1)
    image = torch.randn(1, config.in_channels, *[side] * config.ndim)
    with torch.inference_mode():
        return torch.equal(one.network(image), other.network(image))


def test_everything_comes_back(trained, tmp_path):
    model = Model(trained().network, FULL_PASSPORT)
    path = save_model(model, tmp_path / "Zellkerne 核")
    assert path.name == "Zellkerne 核.safetensors"
    assert os.listdir(tmp_path) == [path.name]
    loaded = read_model(path)
    assert loaded.passport == FULL_PASSPORT
    assert loaded.network.config == model.network.config
    assert equal_outputs(model, loaded)
    assert model_sha256(loaded) == model_sha256(model)
    assert not loaded.network.training
    assert all(p.requires_grad for p in loaded.network.parameters())
    saved, read = model.network.state_dict(), loaded.network.state_dict()
    assert list(saved) == list(read)
    assert all(torch.equal(saved[name], read[name]) for name in saved)


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_named_configurations_are_trained_saved_and_loaded(name, trained, tmp_path):
    config = NAMED_CONFIGS[name]
    config = dataclasses.replace(config, base_channels=min(config.base_channels, 4))
    model = trained(**config.to_dict())
    assert model.network.config == config
    untrained = Model(UNet.from_config(config).eval())
    loaded = read_model(save_model(model, tmp_path / name))
    assert loaded.network.config == config
    assert equal_outputs(model, loaded)
    assert not equal_outputs(untrained, loaded)


@pytest.mark.parametrize("norm", ["batch", "group", "instance", None])
@pytest.mark.parametrize("ndim", [2, 3])
def test_every_norm_comes_back(norm, ndim, trained, tmp_path):
    model = trained(norm=norm, ndim=ndim, in_channels=2, num_classes=3)
    loaded = read_model(save_model(model, tmp_path / "m"))
    assert equal_outputs(model, loaded)
    assert loaded.passport == model.passport


def test_a_loaded_model_can_be_trained_and_saved_again(file, tmp_path):
    model = read_model(file)
    before = model_sha256(model)
    optimiser = torch.optim.Adam(model.network.parameters(), lr=0.1)
    model.network.train()(torch.randn(1, 1, 16, 16)).sum().backward()
    optimiser.step()
    again = read_model(save_model(model, tmp_path / "again"))
    assert equal_outputs(Model(model.network.eval()), again)
    assert model_sha256(again) != before
    assert model_sha256(read_model(file)) == before


# --- writing ---------------------------------------------------------------


@pytest.mark.parametrize("call", ["write_bytes", "fsync", "replace"])
def test_a_failing_write_leaves_the_previous_file(
    call, model, file, monkeypatch, trained
):
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path if call == "write_bytes" else os, call, fail)
    with pytest.raises(BadOutput, match="disk is full"):
        save_model(trained(depth=2), file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_killed_save_leaves_a_whole_file(file):
    script = (
        "import sys; from napari_unet.models.checkpoint import *\n"
        "model = read_model(sys.argv[1]); print('ready', flush=True)\n"
        "while True: save_model(model, sys.argv[1])"
    )
    wanted = model_sha256(read_model(file))
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"ready\n"
        # Read while it writes, then kill it: there is always one whole file.
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert model_sha256(read_model(file)) == wanted
        child.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    assert model_sha256(read_model(file)) == wanted


def test_a_passport_that_does_not_fit_is_refused(model, file):
    before = file.read_bytes()
    large = model.passport.model_copy(update={"thumbnail": "A" * MAX_HEADER})
    with pytest.raises(BadModel, match="too large for the file header"):
        save_model(Model(model.network, large), file)
    assert file.read_bytes() == before


# --- damaged files ----------------------------------------------------------


def refused(path: Path) -> str:
    """Read a bad file; return the message, which must be quick and say what to do."""
    start = time.monotonic()
    with pytest.raises(BadModel) as caught:
        read_model(path)
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert path.name in message
    assert message.endswith(".")
    assert 40 < len(message) < 700
    assert "Traceback" not in message
    return message


def test_truncated_at_any_place(file):
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    cuts = {0, 1, 7, 8, 9, len(content) - 1}
    for cut in sorted(cuts | set(rng.integers(0, len(content), 200).tolist())):
        file.write_bytes(content[:cut])
        message = refused(file)
        assert cut < 9 or "incomplete" in message, (cut, message)


def test_a_single_flipped_bit(file):
    content = file.read_bytes()
    header = struct.unpack("<Q", content[:8])[0] + 8
    rng = np.random.default_rng(0)
    # Every bit of the length, a third of the flips in the header, the rest in weights.
    places = [(i, bit) for i in range(8) for bit in range(8)]
    places += [(int(rng.integers(8, header)), int(rng.integers(8))) for _ in range(90)]
    last = len(content)
    places += [
        (int(rng.integers(header, last)), int(rng.integers(8))) for _ in range(150)
    ]
    for place, bit in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        refused(file)


@pytest.mark.parametrize("extra", [b"\0", b"more"])
def test_bytes_behind_the_end(file, extra):
    file.write_bytes(file.read_bytes() + extra)
    refused(file)


# --- foreign and forged files -------------------------------------------------


class Gadget:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_foreign_files(tmp_path, model):
    canary = tmp_path / "canary"
    random = np.random.default_rng(0).bytes(20_000)
    contents = {
        "empty": b"",
        "one byte": b"{",
        "zeros": bytes(4096),
        "random": random,
        "random behind a plausible length": struct.pack("<Q", 5000) + b"{" + random,
        "text": b"This is not a model.\n" * 50,
        "pickle": pickle.dumps({"state_dict": Gadget(canary)}),
        "tiff": b"II*\0\x08\0\0\0" + bytes(100),
        "json": b'{"a": 1}',
        "no network": safetensors.torch.save({"a.weight": torch.zeros(3)}),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        message = refused(path)
        words = {"empty": "is empty", "pickle": "plain Python pickle"}
        words["no network"] = "None of its layers is known from a U-Net"
        expected = words.get(name, "not a napari-unet checkpoint")
        assert expected in message or "damaged" in message, message
    path = tmp_path / "torch.pt"
    torch.save({"weights": model.network.state_dict(), "gadget": Gadget(canary)}, path)
    assert f"{os.mkdir.__module__}.mkdir" in refused(path)
    assert not canary.exists()


def test_a_folder_and_a_missing_file(tmp_path):
    assert "directory" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "missing.safetensors")


def write_forged(path: Path, header: dict | bytes, body: bytes = b"") -> Path:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def metadata(**changes) -> dict:
    passport = Model(UNet(depth=1, base_channels=2)).passport
    values = {
        "format": FORMAT,
        "config": json.dumps(UNetConfig(depth=1, base_channels=2).to_dict()),
        "passport": passport.model_dump_json(),
        "sha256": "",
    }
    return {"__metadata__": values | changes}


ONE_TENSOR = {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}


def test_a_header_that_is_too_large(tmp_path):
    for length in (MAX_HEADER + 1, 2**31, 2**63, 2**64 - 1):
        path = tmp_path / "big.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 2_000_000)
        refused(path)


def test_a_hundred_thousand_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"t{i}": entry for i in range(100_000)} | metadata()
    refused(write_forged(tmp_path / "many.safetensors", header))
    # As many as the header may hold.
    header = {f"t{i}": entry for i in range(14_000)} | metadata()
    refused(write_forged(tmp_path / "some.safetensors", header))


@pytest.mark.parametrize("name", ["config", "passport", "header"])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(tmp_path, name, opening):
    nested = opening * 100_000
    if name == "header":
        forged = b'{"a":' + nested.encode()
    else:
        forged = ONE_TENSOR | metadata(**{name: nested})
    refused(write_forged(tmp_path / "deep.safetensors", forged, b"\0"))


@pytest.mark.parametrize(
    "forged",
    [
        {"__metadata__": 3},
        {"__metadata__": None},
        {"__metadata__": {"format": FORMAT}},
        {"__metadata__": {"format": FORMAT, "config": 1, "passport": 2}},
        {"x": 1},
        {"x": {"data_offsets": ["a", "b"]}},
        {"x": {"data_offsets": {}}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [2, 1]}},
        {"x": {"dtype": "Q99", "shape": [1], "data_offsets": [0, 1]}},
        ONE_TENSOR | metadata(config="null"),
        ONE_TENSOR | metadata(config="[1]"),
        ONE_TENSOR | metadata(config='"text"'),
        ONE_TENSOR | metadata(config='{"depth": "deep"}'),
        ONE_TENSOR | metadata(config='{"depth": 1e3}'),
        ONE_TENSOR | metadata(config='{"depth": NaN}'),
        ONE_TENSOR | metadata(config='{"depth": ' + "9" * 5000 + "}"),
        ONE_TENSOR | metadata(passport="null"),
        ONE_TENSOR | metadata(passport='{"threshold": 7}'),
        ONE_TENSOR | metadata(passport="\ud800"),
    ],
    ids=lambda forged: json.dumps(forged)[-60:],
)
def test_forged_headers(tmp_path, forged):
    entries = {k: v for k, v in forged.items() if k != "__metadata__"}
    header = (ONE_TENSOR | metadata() | entries) if "x" in forged else forged
    refused(write_forged(tmp_path / "forged.safetensors", header, bytes(4)))


def test_a_gigantic_network_takes_no_memory(tmp_path):
    config = dataclasses.replace(
        UNetConfig(), base_channels=4096, depth=8, ndim=3, convs_per_level=8
    )
    forged = ONE_TENSOR | metadata(config=json.dumps(config.to_dict()))
    path = write_forged(tmp_path / "giant.safetensors", forged, b"\0")
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "missing" in refused(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # KiB


def rewritten(file: Path, change) -> Path:
    """Change tensors or metadata of a checkpoint and give it a fitting checksum."""
    from napari_unet.models import checkpoint

    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        header = opened.metadata()
    change(tensors, header)
    header["sha256"] = checkpoint._digest(tensors, header)
    file.write_bytes(safetensors.torch.save(tensors, header))
    return file


def test_rewriting_alone_changes_nothing(file, model):
    loaded = read_model(rewritten(file, lambda tensors, header: None))
    assert equal_outputs(model, loaded)


def change_config(**changes):
    def change(tensors, header):
        header["config"] = json.dumps(json.loads(header["config"]) | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop("head.bias"), "missing head.bias"),
        (lambda t, h: t.update(extra=torch.zeros(2)), "unexpected extra"),
        (
            lambda t, h: t.update({"head.bias": torch.zeros(3)}),
            r"head.bias has shape \(3,\) instead of \(2,\)",
        ),
        (
            lambda t, h: t.update({"head.bias": t["head.bias"].double()}),
            "head.bias is torch.float64 instead of torch.float32",
        ),
        (
            lambda t, h: t.update({"head.bias": t["head.bias"].to(torch.complex64)}),
            "head.bias is torch.complex64",
        ),
        (
            lambda t, h: t["encoder.0.0.weight"].view(-1)[3].fill_(np.nan),
            "1 non-finite values in encoder.0.0.weight",
        ),
        (
            lambda t, h: t["decoder.0.1.running_var"].fill_(np.inf),
            "2 non-finite values in decoder.0.1.running_var",
        ),
        (change_config(in_channels=2), r"encoder.0.0.weight has shape"),
        (change_config(depth=2), "missing .* more"),
        (change_config(ndim=3), "has shape .* more"),
        (change_config(norm="group"), "unexpected"),
        (change_config(attention=True), r"unknown entries \['attention'\].*[Uu]pdate"),
        (
            lambda t, h: h.update(passport=h["passport"][:-1] + ', "mood": "good"}'),
            "mood.*[Uu]pdate",
        ),
        (
            lambda t, h: h.update(
                passport=h["passport"].replace('"channel 1"', '"a", "b"')
            ),
            "names 2 channels, its network has 1",
        ),
    ],
)
def test_what_does_not_belong_together(file, change, message):
    rewritten(file, change)
    with pytest.raises(BadModel, match=message):
        read_model(file)


def test_many_problems_are_counted(file):
    rewritten(file, lambda tensors, header: [tensors.pop(k) for k in list(tensors)[:9]])
    with pytest.raises(BadModel, match=r"(missing [^;]*; ){4}missing \S+ and 4 more"):
        read_model(file)


def test_a_network_that_diverged_is_recognised_when_loaded(model, tmp_path):
    with torch.no_grad():
        model.network.bottleneck[0].weight[0, 0, 0, 0] = np.nan
    path = save_model(model, tmp_path / "diverged")
    with pytest.raises(BadModel, match=r"1 non-finite .* bottleneck.0.weight"):
        read_model(path)
