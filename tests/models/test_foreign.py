"""Import: every family gives the outputs of its own definition."""

import contextlib
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile_networks import hostile_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from originals import (
    Buda,
    Classic,
    DownConv,
    Milesial,
    Monai,
    OldMilesial,
    OneConvolution,
    PathUNet,
    Segmentify,
    TorchEM,
    Walkthrough,
)
from test_safety import child_of
from torch import nn

from napari_unet.errors import BadModel
from napari_unet.models.checkpoint import read_model, save_model
from napari_unet.models.foreign import recognise
from napari_unet.models.library import load_model
from napari_unet.network.config import UNetConfig
from napari_unet.network.unet import UNet


def randomise(network, seed=0):
    """Draw weights and batch statistics as after a training; outputs stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                tensor.copy_(values.abs() + 0.5)
            elif tensor.ndim > 1:
                tensor.copy_(values * math.sqrt(2 / tensor[0].numel()))
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * values)
            else:
                tensor.copy_(0.2 * values)
    return network.eval()


def case(make, save=None, sizes=((32, 48), (64, 16)), sigmoid=False, **config):
    return SimpleNamespace(**locals())


def milesial_file(network):
    """Its train.py: the state dict with the grey values of the masks."""
    return {**network.state_dict(), "mask_values": [0, 255]}


ODD = ((32, 48), (37, 51), (16, 31))
VALID = ((188, 204),)
CASES = {
    "milesial": case(lambda: Milesial(3, 2), milesial_file, ODD, in_channels=3),
    "milesial-old": case(lambda: Milesial(1, 1, bias=True), sizes=ODD, num_classes=1),
    "milesial-2018": case(
        lambda: OldMilesial(3, 1),
        sizes=ODD,
        in_channels=3,
        upsampling="bilinear",
        align_corners=True,
    ),
    "milesial-2018-transposed": case(lambda: OldMilesial(1, 2, False), sizes=ODD),
    "jvanvugt": case(PathUNet, norm_place="after_activation", upsampling="transposed"),
    "jvanvugt-upsample": case(
        lambda: PathUNet(mode="upsample", norm=False),
        norm=None,
        upsampling="bilinear",
    ),
    "milesial-bilinear": case(
        lambda: Milesial(1, 4, bilinear=True),
        milesial_file,
        ODD,
        upsampling="bilinear",
        align_corners=True,
        num_classes=4,
    ),
    "mateuszbuda": case(Buda, sigmoid=True, in_channels=3, num_classes=1),
    "segmentify": case(
        Segmentify,
        lambda n: {
            "model_name": "UNet",
            "model_args": {"dims": 1, "num_kernel": 4, "kernel_size": 3},
            "model_state": n.state_dict(),
        },
        sigmoid=True,
        skips="add",
        norm_place="after_activation",
        upsampling="transposed_3x3",
    ),
    "classic": case(Classic, norm=None, num_classes=3),
    "torch-em-instance": case(
        lambda: TorchEM(2, "InstanceNorm"),
        lambda n: {"iteration": 5, "model_state": n.state_dict(), "best_metric": 0.1},
        norm="instance",
        norm_place="before_convolution",
        upsampling="bilinear",
        depth=3,
    ),
    "torch-em-batch": case(
        lambda: TorchEM(2, "BatchNorm", in_channels=2), norm="batch", in_channels=2
    ),
    "torch-em-none": case(lambda: TorchEM(2, None), norm=None),
    "torch-em-3d": case(
        lambda: TorchEM(3, "InstanceNorm", depth=2), sizes=((8, 12, 16),), ndim=3
    ),
    "monai": case(
        lambda: Monai(2, "instance"),
        sizes=((32, 48), (64, 32)),
        norm="instance",
        negative_slope=0.1,
    ),
    "monai-batch": case(lambda: Monai(2, "batch", outputs=5), num_classes=5),
    "monai-3d": case(
        lambda: Monai(3, "instance"), sizes=((32, 32, 48),), ndim=3, depth=4
    ),
    "walkthrough": case(Walkthrough, sizes=VALID, padding="valid", norm="batch"),
    "down-conv": case(DownConv, sizes=VALID, padding="valid", norm=None),
    "one-transposed": case(OneConvolution, convs_per_level=1, base_channels=4),
    "one-repeat": case(lambda: OneConvolution(up="repeat"), upsampling="nearest"),
    "one-bare": case(lambda: OneConvolution(up="bare"), upsampling="nearest"),
    "own": case(lambda: UNet(2, 3, depth=2, base_channels=4), sizes=ODD, depth=2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_family_gives_the_outputs_of_its_definition(name, tmp_path):
    it = CASES[name]
    network = randomise(it.make())
    path = tmp_path / "their model.pth"
    torch.save((it.save or nn.Module.state_dict)(network), path)
    model = load_model(path)
    for option, value in it.config.items():
        assert getattr(model.network.config, option) == value, option
    torch.manual_seed(1)
    for size in it.sizes:
        image = torch.randn(2, model.network.config.in_channels, *size)
        with torch.inference_mode():
            theirs, ours = network(image), model.network(image)
        ours = ours.sigmoid() if it.sigmoid else ours
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert theirs.std() > 1e-3  # the comparison says something
    assert model.passport.name == "their model"
    # And as our own file.
    again = read_model(save_model(model, tmp_path / "ours"))
    with torch.inference_mode():
        assert torch.equal(again.network(image), model.network(image))


@pytest.mark.parametrize("name", CASES)
def test_shuffled_names_mean_the_same(name):
    """A .safetensors file does not keep the order of the tensors."""
    network = randomise(CASES[name].make())
    state = network.state_dict()
    model = recognise({key: state[key] for key in sorted(state)})
    image = torch.randn(1, model.network.config.in_channels, *CASES[name].sizes[0])
    with torch.inference_mode():
        assert torch.equal(model.network(image), recognise(state).network(image))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_configuration_is_read_off_the_shapes(data):
    options = {
        "in_channels": st.integers(1, 4),
        "num_classes": st.integers(1, 5),
        "depth": st.integers(1, 4),
        "base_channels": st.integers(1, 5),
        "convs_per_level": st.integers(1, 3),
        "upsampling": st.sampled_from(["transposed", "nearest", "bilinear"]),
        "norm": st.sampled_from(["batch", None]),
        "norm_place": st.sampled_from(
            ["before_activation", "after_activation", "before_convolution"]
        ),
        "ndim": st.sampled_from([2, 3]),
    }
    config = UNetConfig(**{name: data.draw(it, name) for name, it in options.items()})
    if config.norm is None:
        config = replace(config, norm_place="before_activation")
    network = UNet.from_config(config).eval()
    found = recognise(network.state_dict()).network
    assert found.config == config
    state = found.state_dict()
    assert all(torch.equal(state[n], t) for n, t in network.state_dict().items())


def ema_of(state):
    return {name: t * 2 if t.is_floating_point() else t for name, t in state.items()}


WRAPPERS = {
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}}},
    "model_state": lambda s: {"model_state": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "model": lambda s: {"model": s, "args": {"lr": 0.1}},
    "module": lambda s: {f"module.{n}": t for n, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "compiled and parallel": lambda s: {
        "state_dict": {f"module._orig_mod.{n}": t for n, t in s.items()}
    },
    "lightning": lambda s: {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{n}": t for n, t in s.items()}
        | {"criterion.weight": torch.ones(2)},
        "hyper_parameters": {"lr": 1e-3},
    },
    "averaged model": lambda s: (
        {"n_averaged": torch.tensor(7)} | {f"module.{n}": t for n, t in s.items()}
    ),
    "optimizer": lambda s: {
        "net": s,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 1, 3, 3)}}},
    },
    "last and averaged": lambda s: {"state_dict": ema_of(s), "state_dict_ema": s},
    "averaged in one dict": lambda s: {
        "state_dict": {f"model.{n}": t for n, t in ema_of(s).items()}
        | {f"ema_model.{n}": t for n, t in s.items()}
    },
    "ema": lambda s: {"model": ema_of(s), "ema": s, "updates": 9},
    "ema with counters": lambda s: {
        "model": ema_of(s),
        "model_ema": {"module": s, "decay": 0.99},
    },
    "online and averaged": lambda s: (
        {f"online_model.{n}": t for n, t in ema_of(s).items()}
        | {f"ema_model.{n}": t for n, t in s.items()}
        | {"initted": torch.tensor(True), "step": torch.tensor(5)}
    ),
    "half precision": lambda s: {
        n: t.half().double() if t.is_floating_point() else t for n, t in s.items()
    },
}


@pytest.mark.parametrize(
    ("name", "container"),
    [*((name, "zip") for name in WRAPPERS), ("model_state", "legacy")],
)
def test_wrappers(name, container, tmp_path):
    network = randomise(Milesial(1, 2, width=2))
    path = tmp_path / "wrapped.ckpt"
    content = WRAPPERS[name](copy.deepcopy(network.state_dict()))
    torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    model = load_model(path)
    image = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        difference = (model.network(image) - network(image)).abs().max()
    assert difference < (0.1 if name == "half precision" else 1e-5)
    assert ("averaged copy" in model.passport.description) == (
        name.startswith(("ema", "last and", "averaged in", "online and"))
    )


def test_layers_beside_the_network_are_mentioned():
    state = {f"unet.{n}": t for n, t in Milesial(1, 2).state_dict().items()}
    state |= {"judge.0.weight": torch.ones(2, 3), "judge.2.weight": torch.ones(2, 2)}
    description = recognise(state).passport.description
    assert "2 other layers in the file are not used." in description


def test_safetensors_of_others(tmp_path):
    network = randomise(Milesial(1, 2))
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, {"format": "pt"})
    image = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        ours = load_model(path).network(image)
        assert torch.allclose(ours, network(image), atol=1e-5)


def test_tiles_are_blended_where_corners_are_aligned():
    bilinear = recognise(Milesial(1, 2, bilinear=True).state_dict())
    assert "aligned corners" in bilinear.inexact_reason
    assert recognise(Milesial(1, 2).state_dict()).inexact_reason is None
    instance = recognise(TorchEM(2, "InstanceNorm").state_dict())
    assert "instance normalisation" in instance.inexact_reason


def test_the_passport_says_what_is_known_and_what_is_not():
    passport = recognise(Milesial(3, 1).state_dict()).passport
    assert "milesial/Pytorch-UNet, 2D, 3 channels in, 1 output" in passport.description
    assert passport.normalization.method == "fixed"
    assert passport.normalization.upper == 255
    assert "Not known: pixel size, names of the classes." in passport.description
    assert [info.kind for info in passport.classes] == ["background", "objects"]
    passport = recognise(Classic().state_dict()).passport
    assert len(passport.classes) == 3
    assert "normalisation" in passport.description


@pytest.mark.parametrize(
    ("values", "outputs", "names"),
    [
        ([0, 255], 2, ["value 255"]),
        ([0, 255], 1, ["value 255"]),
        ([0, 0.5, 1], 3, ["value 0.5", "value 1"]),
        (
            [[0, 0, 0], [255, 0, 0], [0, 0, 9]],
            3,
            ["value 255, 0, 0", "value 0, 0, 9"],
        ),
        (np.array([0, 7]).tolist(), 2, ["value 7"]),
        ([0, 1, 2], 2, ["object"]),
        ([0, 10**80], 2, ["object"]),
        ([0, float("nan")], 2, ["object"]),
        (["a", "b"], 2, ["object"]),
        ([[], []], 2, ["object"]),
        (3, 2, ["object"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}])
def test_values_of_the_masks_name_the_classes(values, outputs, names, wrap, tmp_path):
    state = {**Milesial(1, outputs, width=2).state_dict(), "mask_values": values}
    torch.save(wrap(state), tmp_path / "cars.pth")
    passport = load_model(tmp_path / "cars.pth").passport
    assert [info.name for info in passport.classes] == ["background", *names]
    assert ("value 0 is background" in passport.description) == (
        names != ["object"] and not isinstance(values[0], list)
    )


def test_transposed_convolutions_that_were_never_saved():
    state = DownConv(saved=False).state_dict()
    with pytest.raises(BadModel, match=r"4 upsampling layers were never saved.*train"):
        recognise(state)


def changed(**edits):
    state = dict(Milesial(1, 2).state_dict())
    for name, tensor in edits.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (changed(attention__weight=torch.ones(3, 3, 1, 1)), "unexpected attention"),
        (changed(outc__conv__weight=None, outc__conv__bias=None), "no head"),
        (
            changed(outc__conv__weight=torch.zeros(2, 9, 1, 1)),
            r"outc.conv.weight is \(2, 9, 1, 1\), but 4 channels come in",
        ),
        (
            changed(outc__conv__weight=torch.zeros(2, 4, 3, 3)),
            "outc.conv has a kernel of 3x3, not 1",
        ),
        (changed(up2__up__weight=torch.zeros(32, 16, 4, 4)), "kernel of 4x4, not 2"),
        (changed(inc__double_conv__1__running_mean=torch.zeros(9)), r"is \(9,\), not"),
        (changed(up3__up__weight=torch.zeros(5, 5, 2, 2)), "channels come in"),
    ],
    ids=range(7),
)
def test_what_does_not_fit_is_named(state, words):
    with pytest.raises(BadModel, match=words):
        recognise(state)


def test_no_more_than_five_differences_are_listed():
    extra = {f"gate{n}.weight": torch.ones(4, 4, 1, 1) for n in range(9)}
    with pytest.raises(BadModel) as caught:
        recognise(changed() | extra)
    message = str(caught.value)
    assert "closest to milesial/Pytorch-UNet: 41 layers" in message
    assert message.count("unexpected") == 5
    assert "and 4 more" in message


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"a": torch.ones(3)},
        {"fc.weight": torch.ones(3, 3), "fc.bias": torch.ones(3)},
        nn.TransformerEncoderLayer(8, 2).state_dict(),
        {f"layer{n}.weight": torch.ones(4, 4, 3, 3) for n in range(4)},
    ],
    ids=range(5),
)
def test_what_is_no_unet(state):
    with pytest.raises(BadModel, match=r"train a new\s+model"):
        recognise(state)


def test_far_too_many_layers_are_not_looked_at():
    state = {f"a{n}.b{n}.weight": torch.ones(1, 1, 3, 3) for n in range(3000)}
    with pytest.raises(BadModel, match="3000 layers"):
        recognise(state)


@pytest.mark.parametrize("name", ["milesial-bilinear", "torch-em-batch", "segmentify"])
def test_whatever_is_wrong_is_told_in_words(name):
    """Lost, renamed and reshaped tensors end in `BadModel`, or in a network."""
    state = CASES[name].make().state_dict()
    names = list(state)
    random = np.random.default_rng(0)
    for _ in range(100):
        wrong = dict(state)
        for key in random.choice(names, random.integers(1, 4), replace=False):
            tensor = wrong.pop(key)
            shape = random.integers(0, 9, random.integers(0, 6)).tolist()
            match random.integers(5):
                case 0:
                    wrong[key] = torch.zeros(shape)
                case 1:
                    wrong[key] = tensor.to(torch.int32)
                case 2:
                    wrong[key.replace("1", "2")] = tensor
                case 3:
                    wrong[key] = tensor[..., None]
        with contextlib.suppress(BadModel):
            model = recognise(wrong)
            model.network(torch.zeros(1, model.network.config.in_channels, 16, 16))


def test_networks_that_cannot_be_cost_little(tmp_path):
    """One child reads them all; it has to survive that, too."""
    good = tmp_path / "good.pt"
    torch.save(Milesial(1, 2).state_dict(), good)
    paths = []
    for name, state in hostile_networks():
        paths.append(tmp_path / f"{name}.pt")
        torch.save({n: t.clone() for n, t in state.items()}, paths[-1])
    with child_of("load_model", tmp_path) as tell:
        baseline = tell(good)
        answers = [tell(path) for path in paths]
    assert "read" in baseline
    for answer in answers:
        assert answer.get("refused", "").endswith("."), answer
        assert len(answer["refused"]) < 1500
        assert answer["seconds"] < 2, answer
        assert answer["peak"] - baseline["peak"] < 200 << 10, answer
        assert not answer["done"]


def test_other_kinds_of_networks_are_called_by_their_name():
    state = {
        "encoder.conv1.weight": torch.ones(64, 3, 7, 7),
        "decoder.blocks.0.conv1.0.weight": torch.ones(256, 768, 3, 3),
        "segmentation_head.0.weight": torch.ones(1, 16, 3, 3),
    }
    with pytest.raises(BadModel, match="network of segmentation_models_pytorch"):
        recognise({f"state_dict.{name}": tensor for name, tensor in state.items()})


def test_group_norms_are_not_guessed():
    state = TorchEM(2, "BatchNorm").state_dict()
    state = {n: t for n, t in state.items() if "running" not in n and "num" not in n}
    with pytest.raises(BadModel, match="group or instance norm"):
        recognise(state)
