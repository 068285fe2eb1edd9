import json
import sys
import time

import numpy as np
import pytest
import torch

from napari_unet.errors import BadModel
from napari_unet.inference.predict import predict
from napari_unet.models.checkpoint import model_sha256, read_header, save_model
from napari_unet.models.library import import_model, load_model
from napari_unet.models.safety import read_checked
from napari_unet.models.smp import prefix_of
from napari_unet.network.program import build_program
from napari_unet.network.program_config import ProgramConfig

# Encoder, keyword arguments: one of each family that is told by its layers.
FAST = [
    ("resnet18", {"in_channels": 1, "classes": 2, "decoder_use_norm": False}),
    ("resnet34", {"classes": 3, "decoder_channels": (64, 32, 16, 8, 8)}),
    ("efficientnet-b0", {"in_channels": 2, "decoder_attention_type": "scse"}),
]
# Enough where it does not matter which one it is, and quickly made.
SMALL = {"encoder_depth": 3, "decoder_channels": (16, 8, 8)}
SLOW = [
    ("resnet50", {"encoder_depth": 4, "decoder_channels": (32, 16, 8, 8)}),
    ("resnext50_32x4d", {}),
    ("se_resnet50", {}),
    ("densenet121", {}),
    ("vgg11_bn", {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}),
    ("mobilenet_v2", {"encoder_depth": 4, "decoder_channels": (32, 16, 8, 8)}),
]
UNETS = [
    *(pytest.param(*case, id=case[0]) for case in FAST),
    *(pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW),
]


@pytest.fixture(scope="session")
def library():
    """The real library, also where the operators of torchvision do not fit torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        missing = torch.library.Library("torchvision", "FRAGMENT")
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        missing.define(f"nms{boxes}")
        missing.define(f"qnms{boxes}")
    return pytest.importorskip("segmentation_models_pytorch")


@pytest.fixture(scope="session")
def unet(library):
    """Return a function: a network with statistics as after some training."""

    def make(encoder, **options):
        torch.manual_seed(0)
        network = library.Unet(encoder, encoder_weights=None, **options)
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
        return network.eval()

    return make


def image_for(network) -> torch.Tensor:
    channels = next(w for w in network.encoder.parameters() if w.ndim == 4).shape[1]
    return torch.randn(1, channels, 64, 96)


def assert_same(model, network):
    image = image_for(network)
    with torch.inference_mode():
        expected = network(image)
        torch.testing.assert_close(model.network(image), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0


@pytest.mark.parametrize(("encoder", "options"), UNETS)
def test_a_bare_state_dict(encoder, options, unet, tmp_path):
    network = unet(encoder, **options)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = load_model(tmp_path / "weights.pth")
    assert_same(model, network)
    config = model.network.config
    assert config.option("encoder_name") == encoder
    assert config.alignment == 2 ** options.get("encoder_depth", 5)
    assert "names and shapes" in model.passport.description
    assert model.passport.name == "weights"


@pytest.mark.parametrize("way", ["folder", "file"])
def test_what_save_pretrained_writes(way, unet, tmp_path):
    network = unet("resnet18", **SMALL, classes=2, decoder_interpolation="bilinear")
    folder = tmp_path / "yeast"
    network.save_pretrained(folder)
    model = load_model(folder if way == "folder" else folder / "model.safetensors")
    assert_same(model, network)
    assert model.network.config.option("decoder_interpolation") == "bilinear"
    assert model.passport.name == ("yeast" if way == "folder" else "model")
    assert "its config.json" in model.passport.description


def test_the_config_of_an_older_version(unet, tmp_path):
    network = unet("resnet18", **SMALL, decoder_use_norm=False)
    network.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del told["decoder_use_norm"], told["decoder_interpolation"]
    told["decoder_use_batchnorm"] = False
    (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
    assert_same(load_model(tmp_path), network)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax2d"])
def test_an_activation_is_not_applied_twice(activation, unet, tmp_path):
    classes = 1 if activation == "sigmoid" else 2
    network = unet(
        "resnet18", **SMALL, in_channels=1, classes=classes, activation=activation
    )
    network.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.network.config.outputs == "probabilities"
    assert_same(model, network)
    image = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    probabilities = predict(image, model, device="cpu")
    if classes == 2:
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert probabilities.std() > 0


@pytest.mark.parametrize("classes", [2, 4])
def test_sigmoids_of_several_classes(classes, unet, tmp_path):
    network = unet(
        "resnet18", **SMALL, in_channels=1, classes=classes, activation="sigmoid"
    )
    network.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    said = model.passport.description
    if classes == 4:
        assert_same(model, network)
        assert "the first one is taken for the background" in said
        return
    assert "each combination of them is a class" in said
    names = [info.name for info in model.passport.classes]
    assert names == ["background", "output 1", "output 2", "output 1 and output 2"]
    image = image_for(network)
    with torch.inference_mode():
        each, joint = network(image)[0], model.network(image)[0].softmax(dim=0)
    torch.testing.assert_close(joint[1] + joint[3], each[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(joint[2] + joint[3], each[1], atol=1e-5, rtol=0)


def test_a_lightning_checkpoint(unet, tmp_path):
    network = unet("resnet34", **SMALL, in_channels=1)
    state = {f"model.{name}": weight for name, weight in network.state_dict().items()}
    content = {
        "state_dict": state,
        "epoch": 3,
        "hyper_parameters": {"arch": "Unet", "encoder_name": "resnet34", "lr": 0.1},
    }
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    assert prefix_of(read_checked(path).tensors) == "state_dict.model."
    assert_same(load_model(path), network)


@pytest.mark.usefixtures("own_library")
def test_through_our_file_and_the_library(unet, tmp_path):
    network = unet("resnet18", **SMALL, in_channels=1, classes=2)
    folder = tmp_path / "yeast"
    network.save_pretrained(folder)
    model = load_model(folder)
    path = save_model(model, tmp_path / "ours")
    again = load_model(path)
    assert again.network.config == model.network.config
    assert again.passport == model.passport
    assert model_sha256(again) == model_sha256(model) == read_header(path).sha256
    assert_same(again, network)
    assert import_model(folder) == "yeast"
    assert_same(load_model("yeast"), network)


def test_tiles_of_any_image(unet, tmp_path):
    """Blended tiles come close to the whole image, and the user is told."""
    network = unet("resnet18", **SMALL, in_channels=1, classes=2)
    network.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    reason = "a network of segmentation_models_pytorch, and how much context"
    assert reason in model.inexact_reason
    assert "cannot be changed" in model.untrainable_reason
    image = np.random.default_rng(0).normal(size=(130, 300)).astype(np.float32)
    whole = predict(image, model, device="cpu", tile_shape=(160, 320))
    tiled = predict(image, model, device="cpu", tile_shape=(128, 128))
    assert whole.shape == tiled.shape == (2, 130, 300)
    assert np.abs(whole - tiled).mean() < 0.01


def test_what_cannot_be_told_is_asked_for(unet, tmp_path):
    network = unet("resnet18", **SMALL)
    state = network.state_dict()
    path = tmp_path / "weights.pt"
    unknown = {
        name.replace("encoder.", "encoder.model."): w for name, w in state.items()
    }
    torch.save(unknown, path)
    with pytest.raises(BadModel, match=r"which encoder.*Put the config.json"):
        load_model(path)
    smaller = {name: w for name, w in state.items() if "layer3.1" not in name}
    torch.save(smaller, path)
    with pytest.raises(BadModel, match="which encoder"):
        load_model(path)
    torch.save({n: w for n, w in state.items() if "running" not in n}, path)
    with pytest.raises(BadModel, match="no running statistics"):
        load_model(path)


WRONG = {
    "another network": ({"_model_class": "FPN"}, "says that it is a FPN"),
    "unknown encoder": ({"encoder_name": "resnet19"}, "with the encoder 'resnet19'"),
    "download": ({"encoder_name": "tu-hf-hub:some/one"}, "not one of a Unet"),
    "no encoder": ({"encoder_name": 5}, "not one of a Unet"),
    "other encoder": ({"encoder_name": "resnet34"}, "do not fit its network"),
    "widths": ({"decoder_channels": [10**9] * 5}, "not one of a Unet"),
    "depth": ({"encoder_depth": "5"}, "encoder_depth=5 cannot be"),
    "channels": ({"in_channels": -3}, "in_channels=-3"),
    "activation": ({"activation": "tanh"}, "activation 'tanh'"),
    "list": ({"activation": []}, r"activation '\[\]'"),
}


@pytest.mark.parametrize(("changes", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_config(changes, expected, unet, tmp_path):
    unet("resnet18", **SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(BadModel, match=expected) as caught:
        load_model(tmp_path)
    assert len(str(caught.value)) < 600


def test_a_forged_config_of_ours_claims_no_memory(unet, tmp_path):
    unet("resnet18", **SMALL).save_pretrained(tmp_path)
    network = load_model(tmp_path).network
    tensors = network.state_dict()
    for channels, expected in (
        ([4096] * 3, "not the widths"),
        ([16, 8], "do not fit its network|cannot make its network"),
        (3, "not one of a Unet"),
    ):
        told = network.config.to_dict()
        told["settings"]["decoder_channels"] = channels
        with pytest.raises(BadModel, match=expected):
            build_program(ProgramConfig.from_dict(told), tensors)


def test_a_config_that_cannot_be_read_is_done_without(unet, tmp_path):
    network = unet("resnet18", **SMALL)
    network.save_pretrained(tmp_path)
    for content in (b"\xff\xfe", b"[" * 50_000, b"[]"):
        (tmp_path / "config.json").write_bytes(content)
        assert_same(load_model(tmp_path), network)


@pytest.mark.parametrize("encoder", ["resnext101_32x48d", "tu-convnext_xxlarge"])
def test_a_forged_config_claims_no_gigabytes(encoder, unet, tmp_path):
    """Of 850 million weights, where the file has 3 million."""
    unet("resnet18", **SMALL).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    forged = json.dumps(told | {"encoder_name": encoder})
    (tmp_path / "config.json").write_text(forged, encoding="utf-8")
    start, before = time.process_time(), peak_memory()
    with pytest.raises(BadModel, match="do not fit its network"):
        load_model(tmp_path)
    assert time.process_time() - start < 3
    assert peak_memory() - before < 200 << 20


def peak_memory() -> int:
    """Return the most memory that this process has had, in bytes; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def test_without_the_library_it_says_what_to_install(unet, tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save(unet("resnet18", **SMALL).state_dict(), path)
    ours = save_model(load_model(path), tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    for file in (path, ours):
        with pytest.raises(BadModel, match=r'pip install "napari-unet\[smp\]"'):
            load_model(file)
    assert read_header(ours).config.kind == "smp"


def test_a_library_that_cannot_be_imported_is_told_of(unet, tmp_path, monkeypatch):
    """As where torchvision was built for another torch."""
    path = tmp_path / "weights.pt"
    torch.save(unet("resnet18", **SMALL).state_dict(), path)
    broken = tmp_path / "site" / "segmentation_models_pytorch"
    broken.mkdir(parents=True)
    text = "raise RuntimeError('operator torchvision::nms does not exist')"
    (broken / "__init__.py").write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "segmentation_models_pytorch")
    monkeypatch.syspath_prepend(broken.parent)
    with pytest.raises(BadModel, match=r"torchvision::nms does not exist.*\[smp\]"):
        load_model(path)


def test_the_random_numbers_of_others_stay(unet, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(unet("resnet18", **SMALL).state_dict(), path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(path)
    torch.testing.assert_close(torch.rand(3), expected)
