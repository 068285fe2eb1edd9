"""Programs: what is said of them, and how their weights are taken with consent."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from hostile_pickles import (
    FOUR,
    GADGETS,
    Gadget,
    gadgets_by_instruction,
    gadgets_by_kind,
    gadgets_by_position,
    state_dict,
    storage,
    tensor,
    torch_zip,
)
from originals import Buda, Milesial
from test_foreign import CASES, randomise
from test_foreign_shapes import Nameless
from test_safety import child_of
from torch import nn

from napari_unet.errors import BadModel, NeedsTrust
from napari_unet.models import trust
from napari_unet.models.checkpoint import read_model
from napari_unet.models.foreign import recognise
from napari_unet.models.library import (
    find_model,
    import_model,
    import_steps,
    load_model,
)
from napari_unet.models.safety import read_checked
from napari_unet.models.stand_ins import take_weights
from napari_unet.models.trust import Limits, convert_steps, explain
from napari_unet.models.trust_child import OUT_OF_MEMORY, PROBLEM, WEIGHTS
from napari_unet.steps import Progress, run_to_end

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("own_library"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="what Linux alone offers")


# --- what is taken -----------------------------------------------------------


class Wrapper(nn.Module):
    """A module with all that a state dict knows, and with what it leaves out."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.again = inner
        self.scale = nn.Parameter(torch.ones(2))
        self.shared = self.scale
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("left_out", torch.ones(3), persistent=False)
        self.register_parameter("missing", None)
        self.some = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"a": nn.PReLU()})])
        self.plain = torch.ones(5)
        self.parent = [self]


def pickled(protocol):
    return lambda network, path: path.write_bytes(pickle.dumps(network, protocol))


def scripted(make):
    return lambda network, path: torch.jit.save(make(network), str(path))


FORMS = {
    "torch zip": torch.save,
    "torch legacy": lambda n, p: torch.save(n, p, _use_new_zipfile_serialization=False),
    "torch protocol 4": lambda n, p: torch.save(n, p, pickle_protocol=4),
    "pickle 2": pickled(2),
    "pickle 4": pickled(4),
    "pickle 5": pickled(5),
    "traced": scripted(lambda n: torch.jit.trace(n, torch.zeros(1, 1, 32, 32))),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_state_dict_in_its_order(form, tmp_path):
    network = randomise(Milesial(1, 2))
    FORMS[form](network, tmp_path / "network.pt")
    with pytest.raises(NeedsTrust):
        read_checked(tmp_path / "network.pt")
    assert_state(take_weights(tmp_path / "network.pt"), network.state_dict())


def assert_state(weights, state):
    assert list(weights) == list(state)
    for name, value in state.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value)


@pytest.mark.parametrize("form", ["torch zip", "torch legacy", "pickle 4"])
def test_a_module_gives_what_its_own_state_dict_has(form, tmp_path):
    network = nn.DataParallel(Wrapper(nn.BatchNorm3d(4)))
    FORMS[form](network, tmp_path / "network.pt")
    assert_state(take_weights(tmp_path / "network.pt"), network.state_dict())


def test_scripted_control_flow(tmp_path):
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 1)])
            self.names = ["a", "b"]
            self.sizes = {"a": 1}

        def forward(self, x):
            if x.sum() > 0:
                return self.layers[0](x)
            return self.layers[1](x)

    network = Flow()
    torch.jit.script(network).save(tmp_path / "flow.pt")
    assert_state(take_weights(tmp_path / "flow.pt"), network.state_dict())


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("torch")])
def test_every_family_pickled_whole(name, tmp_path):
    network = randomise(CASES[name].make())
    torch.save({"epoch": 3, "model": network}, tmp_path / "whole.pt")
    theirs = recognise(network.state_dict())
    ours = recognise(take_weights(tmp_path / "whole.pt"))
    assert ours.network.config == theirs.network.config
    assert_state(ours.network.state_dict(), theirs.network.state_dict())


def test_classes_that_are_nowhere_installed(tmp_path):
    """Such as a script's own network, its trainer, and what it has from others."""
    lost = types.ModuleType("lost.and_found")
    code = """
import torch, enum
class Net(torch.nn.Module):
    def __init__(self, inner):
        super().__init__(); self.inner = inner
class Trainer:
    def __init__(self, net): self.net, self.note, self.mode = net, {"a"}, Mode.FAST
class Names(list): pass
class Settings(dict): pass
class Slots:
    __slots__ = ("a",)
class Mode(enum.Enum):
    FAST = 1
class Odd:
    def __reduce__(self): return make, (1, [2]), None, iter([3, 4]), iter([(5, 6)])
def make(*_): return Settings()
"""
    exec(code, lost.__dict__)
    for item in vars(lost).values():
        if getattr(item, "__module__", "") == "builtins":
            item.__module__ = "lost.and_found"
    network = randomise(Milesial(1, 2))
    trainer = lost.Trainer(lost.Net(network))
    trainer.names, trainer.settings = lost.Names("ab"), lost.Settings(a=1)
    trainer.slots, trainer.odd = lost.Slots(), lost.Odd()
    trainer.slots.a = 3
    sys.modules["lost.and_found"] = lost
    sys.modules["lost"] = types.ModuleType("lost")
    try:
        torch.save(trainer, tmp_path / "trainer.pt")
    finally:
        del sys.modules["lost.and_found"], sys.modules["lost"]
    weights = take_weights(tmp_path / "trainer.pt")
    expected = {f"net.inner.{n}": t for n, t in network.state_dict().items()}
    assert_state(weights, expected)
    assert "milesial" in recognise(weights).passport.description


def test_tensors_of_subclasses_and_parameters_with_state(tmp_path):
    class Meta(torch.Tensor):
        pass

    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "own"
    content = {"meta": torch.ones(3).as_subclass(Meta), "parameter": parameter}
    Meta.__qualname__ = "Meta"
    sys.modules[__name__].Meta = Meta
    torch.save(content, tmp_path / "odd.pt")
    weights = take_weights(tmp_path / "odd.pt")
    assert {name: type(t) for name, t in weights.items()} == dict.fromkeys(
        ("meta", "parameter"), torch.Tensor
    )


def test_views_of_one_storage_come_apart(tmp_path):
    grid = torch.arange(12.0).reshape(3, 4)
    views = {"a": grid.T, "b": grid[1:, ::2], "c": torch.zeros(0, 3), "d": grid[0, 0]}
    torch.save({"views": views, "x": GADGETS["eval"]}, tmp_path / "views.pt")
    weights = take_weights(tmp_path / "views.pt")
    assert_state(weights, {f"views.{name}": view for name, view in views.items()})
    assert len({t.untyped_storage().data_ptr() for t in weights.values()}) == 4


# --- nothing is run ----------------------------------------------------------


def test_gadgets_do_nothing_even_with_consent(tmp_path):
    """Every gadget is read in one child, which records what it does."""
    files = [tmp_path / "new.pt", tmp_path / "old.pt"]
    torch.save(Milesial(1, 2), files[0])
    torch.save(Milesial(1, 2), files[1], _use_new_zipfile_serialization=False)
    corpus = (*gadgets_by_position(), *gadgets_by_kind(), *gadgets_by_instruction())
    for n, (_, content, _) in enumerate(corpus):
        files.append(tmp_path / f"{n}.pt")
        files[-1].write_bytes(content)
    with child_of("take_weights", tmp_path) as tell:
        answers = [tell(path) for path in files][2:]  # by then all is imported
    assert len(answers) > 70
    done = [event for answer in answers for event in answer["done"]]
    # Torch looks whether the code of an old network has changed: that of the stand-in.
    assert all(event.startswith('compile (b\'"""Weights out of a') for event in done), (
        done
    )
    assert len(done) < 2
    assert all(answer["seconds"] < 2 for answer in answers)
    # Weights beside a gadget are had; "crashed" is what the parent hears as damage.
    assert sum("read" in answer for answer in answers) > 20


def sentinel(tmp_path) -> tuple[Path, Path]:
    """Return a network with a gadget in it, and the file that this would make."""
    made, path = tmp_path / "made", tmp_path / "evil.pt"
    network = randomise(Milesial(1, 2))
    network.evil = Gadget(os.mkdir, str(made))
    torch.save(network, path)
    return path, made


def test_without_consent_nothing_is_loaded(tmp_path):
    path, made = sentinel(tmp_path)
    for use in (read_checked, load_model, import_model, read_model):
        with pytest.raises(
            NeedsTrust, match=r"import --trust` takes them out of it\.$"
        ):
            use(path)
    assert not made.exists()
    assert not (tmp_path / "home").exists()


def test_with_consent_it_becomes_a_model_and_its_gadget_still_does_nothing(tmp_path):
    path, made = sentinel(tmp_path)
    before = path.read_bytes()
    steps = import_steps(path, trust=True)
    first = next(steps)
    assert first == Progress(0, 1, "taking the weights out of evil.pt")
    name = run_to_end(steps)
    assert name == "evil"
    assert not made.exists()
    assert path.read_bytes() == before
    model = read_model(find_model("evil"))
    assert model.passport.name == "evil"
    image = torch.randn(1, 1, 32, 48)
    network = randomise(Milesial(1, 2))
    with torch.inference_mode():
        assert torch.allclose(model.network(image), network(image), atol=1e-5)


def test_consent_changes_nothing_for_plain_files(tmp_path):
    torch.save(Milesial(1, 2).state_dict(), tmp_path / "plain.pt")
    assert len(list(import_steps(tmp_path / "plain.pt", trust=True))) == 0
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(BadModel, match="incomplete"):
        import_model(tmp_path / "damaged.pt", trust=True)


def test_the_order_of_the_tensors_survives_the_child(tmp_path):
    """Networks without names are recognised by it."""
    network = randomise(Nameless())
    traced = torch.jit.trace(network, torch.zeros(1, 1, 32, 32))
    traced.save(tmp_path / "nameless.pt")
    checked = run_to_end(convert_steps(tmp_path / "nameless.pt"))
    assert_state(checked.tensors, network.state_dict())
    assert "by the order" in recognise(checked.tensors).passport.description


def refusal(path):
    with pytest.raises(NeedsTrust) as caught:
        read_checked(path)
    return explain(path.name, caught.value)


def test_what_is_said_before(tmp_path):
    torch.save(Buda(), tmp_path / "buda.pt")
    text = refusal(tmp_path / "buda.pt")
    assert text.startswith("buda.pt: It asks for originals.Buda to be called or made")
    assert "a program can do what you can do" in text
    assert "unlikely, not impossible" in text
    torch.jit.script(nn.Conv2d(1, 1, 1)).save(tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt").splitlines()[0]


def test_weights_that_have_become_code(tmp_path):
    traced = torch.jit.trace(nn.Conv2d(1, 1, 1).eval(), torch.zeros(1, 1, 2, 2))
    torch.jit.freeze(traced).save(tmp_path / "frozen.pt")
    with pytest.raises(BadModel, match="part of its code"):
        take_weights(tmp_path / "frozen.pt")


# --- the limits --------------------------------------------------------------


def endless(path: Path) -> Path:
    """Write a pickle that takes for ever to look through."""
    laughs = b"(]q\0" + b"".join(
        b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e"
        for i in range(30)
    )
    path.write_bytes(torch_zip(state_dict(laughs + b"cos\nsystem\nt")))
    return path


def test_what_takes_for_ever_is_stopped(tmp_path):
    steps = convert_steps(endless(tmp_path / "endless.pt"), Limits(seconds=2))
    start = time.monotonic()
    with pytest.raises(BadModel, match="took longer than 2 seconds and was stopped"):
        run_to_end(steps)
    assert time.monotonic() - start < 10
    assert not psutil.Process().children(recursive=True)


@linux
@pytest.mark.parametrize(
    ("views", "side"), [(1, 2**40), pytest.param(200, 2**24, marks=pytest.mark.slow)]
)
def test_what_fills_the_memory_is_stopped(views, side, tmp_path):
    """Tensors that show a few numbers again and again, one of them or many."""
    view = tensor(storage(4), shape=(side,), stride=(0,))
    content = state_dict(b"](" + view * views + b"cos\nsystem\ne")
    path = tmp_path / "greedy.pt"
    path.write_bytes(torch_zip(content, {"0": FOUR}))
    steps = convert_steps(path, Limits(memory=300 << 20))
    with pytest.raises(BadModel, match="more memory than its size warrants"):
        run_to_end(steps)


def child_now(process: psutil.Process) -> psutil.Process:
    """Wait for the child that reads, and until it has limited itself."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in process.children(recursive=True):
            if "trust_child" in " ".join(child.cmdline()):
                limits = Path(f"/proc/{child.pid}/limits")
                text = limits.read_text() if limits.exists() else "address space 1"
                if "unlimited" not in text.partition("address space")[2][:20]:
                    return child
        time.sleep(0.05)
    raise AssertionError("no child")


def gone(process: psutil.Process, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    return True


@linux
def test_what_the_process_has_and_has_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    steps = convert_steps(endless(tmp_path / "endless.pt"), Limits(memory=1 << 30))
    next(steps)
    child = child_now(psutil.Process())
    names = set(child.environ())
    assert "SECRET_TOKEN" not in names
    assert names <= {*trust._KEPT, "HOME", "TMPDIR", "TEMP"} | {
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "LC_CTYPE",
    }
    home = Path(child.environ()["HOME"])
    assert Path(child.cwd()) == home != Path.home()
    assert not list(home.iterdir())
    limits = {
        line[:25].strip(): line[26:].split()[0]
        for line in Path(f"/proc/{child.pid}/limits").read_text().splitlines()
    }
    assert int(limits["Max cpu time"]) == 125
    assert int(limits["Max core file size"]) == 0
    assert int(limits["Max address space"]) < 64 << 30
    assert 1 << 30 <= int(limits["Max file size"]) < 2 << 30
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    leave = [shutil.which("unshare") or "false", "-rn", "true"]
    if subprocess.run(leave, check=False).returncode == 0:  # where the system lets us
        network = "/proc/{}/ns/net"
        assert os.readlink(network.format(child.pid)) != os.readlink(
            network.format("self")
        )
    steps.close()
    assert gone(child, 1)
    assert not home.exists()


PARENT = """
import sys
from napari_unet.models.trust import convert_steps
for step in convert_steps(sys.argv[1]):
    pass
"""


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_the_process_ends_with_its_parent(tmp_path):
    path = endless(tmp_path / "endless.pt")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(path)])
    child = child_now(psutil.Process(parent.pid))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(child, 5)


# --- what comes back is not believed -----------------------------------------


def test_what_the_process_leaves_is_checked(tmp_path):
    def result(code=0):
        return trust._result("theirs.pt", tmp_path, code)

    weights, problem = tmp_path / WEIGHTS, tmp_path / PROBLEM
    with pytest.raises(BadModel, match=r"ended unexpectedly \(code -11\)"):
        result(-11)
    with pytest.raises(BadModel, match=r"ended unexpectedly \(code 0\)"):
        result()
    with pytest.raises(BadModel, match="more memory"):
        result(OUT_OF_MEMORY)
    problem.write_bytes(b"\x1b[2J\xff all is well\n" + b"!" * 10**6)
    with pytest.raises(BadModel) as caught:
        result()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(
        BadModel, match=r"^theirs\.pt cannot be used\. It holds no data"
    ):
        result()
    nan = {"head.weight": torch.full((2,), float("nan"))}
    safetensors.torch.save_file(nan, weights)
    with pytest.raises(BadModel, match="non-finite values in head"):
        result()
    weights.unlink()
    torch.save(GADGETS["eval"], weights)
    with pytest.raises(BadModel, match="asks for __builtin__"):
        result()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "other")
    weights.unlink()
    weights.symlink_to(tmp_path / "other")
    problem.unlink()
    with pytest.raises(BadModel, match="unexpected"):
        result()


@pytest.mark.parametrize("order", ["[]", "{", '["a", "c"]', '[["a"]]', "3", '["a"]'])
def test_a_lying_order_is_not_followed(order, tmp_path):
    both = {"a": torch.ones(2), "b": torch.ones(3)}
    safetensors.torch.save_file(both, tmp_path / WEIGHTS, {"order": order})
    assert_state(trust._result("x.pt", tmp_path, 0).tensors, both)
