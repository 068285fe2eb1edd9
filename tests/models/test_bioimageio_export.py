"""Our models as packages: the format's own library accepts, tests and runs them."""

import io
import json
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from originals import Segmentify
from PIL import Image

from napari_unet import Model, UNet, predict
from napari_unet.errors import BadInput, BadModel, BadOutput
from napari_unet.models.bioimageio import import_package
from napari_unet.models.bioimageio_export import export_package
from napari_unet.models.bioimageio_source import ENTRY, network_source
from napari_unet.models.bioimageio_test import outputs_of
from napari_unet.models.checkpoint import model_sha256, read_model, save_model
from napari_unet.models.foreign import recognise
from napari_unet.models.library import export_model, import_model
from napari_unet.models.model import ClassInfo, TrainingRecord
from napari_unet.models.normalize import Normalization
from napari_unet.network.receptive_field import receptive_field

pytestmark = [
    # Of bioimageio.spec and bioimageio.core.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Found mapping with 'source':UserWarning"),
]

NETWORKS = {
    "default": {},
    "paper": {"padding": "valid", "norm": None, "dropout": 0.5},
    "one output": {"num_classes": 1},
    "3D": {"ndim": 3, "depth": 1},
    "channels": {"in_channels": 3, "num_classes": 3},
    "group": {"norm": "group"},
    "nearest": {"upsampling": "nearest", "depth": 1},
    "unpool": {"upsampling": "unpool"},
    "3D valid": {"ndim": 3, "padding": "valid", "depth": 1},
}
NORMALIZATIONS = {
    "paper": Normalization(method="mean_std"),
    "one output": Normalization(method="fixed", lower=10, upper=200),
    "channels": Normalization(
        method="fixed", ranges=((0, 255), (5, 100), (0, 60)), clip=(0.0, None)
    ),
    "group": Normalization(method="fixed", lower=0, upper=1),
    "3D": Normalization(lower=0.5, upper=99, clip=(0.0, 1.0)),
}


def make(name) -> Model:
    """A network whose batch norms have seen data and whose outputs vary."""
    torch.manual_seed(1)
    network = UNet(**{"base_channels": 4, "depth": 2} | NETWORKS[name])
    config = network.config
    side = receptive_field(config).input_size(40)
    image = torch.randn(2, config.in_channels, *[side] * config.ndim)
    with torch.no_grad():
        network.train()(image)
        network.eval().head.weight *= 3
    model = Model(network)
    facts = {
        "name": "nuclei & Kerne µ/1",
        "version": "3",
        "description": "Finds nuclei: 1e5 of them.",
        "citation": "Some, One. A paper (2020). https://doi.org/10.1038/s41592-019-1.",
        "pixel_size": (0.5,) * config.ndim,
        "normalization": NORMALIZATIONS.get(name, Normalization()),
        "threshold": 0.4,
        "history": (
            TrainingRecord(
                date="2026-01-01",
                data="a: [b]",
                scores={"old a": 0.1, "a": 0.123456789},
            ),
        ),
        "thumbnail": "",
    }
    return Model(network, model.passport.model_copy(update=facts))


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    model = make(request.param)
    path = tmp_path_factory.mktemp("export") / "model.zip"
    export_package(model, path, authors=["Ada Lovelace"], license="CC-BY-4.0")
    return request.param, model, path


def core():
    return pytest.importorskip("bioimageio.core")


def test_round_trip(exported):
    _, model, path = exported
    again = import_package(path)
    assert again.passport == model.passport
    assert again.network.config == model.network.config
    wanted = model.network.state_dict()
    assert again.network.state_dict().keys() == wanted.keys()
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert model_sha256(again) == model_sha256(model)
    side = receptive_field(model.network.config).input_size(48)
    image = np.random.default_rng(0).normal(100, 30, [side] * model.ndim)
    image = np.stack([image] * len(model.passport.channels)).astype(np.float32)
    axes = "CZYX"[:1] + "ZYX"[-model.ndim :]
    both = [predict(image, m, axes=axes, device="cpu") for m in (model, again)]
    np.testing.assert_array_equal(*both)


def test_the_format_is_valid_with_all_its_files(exported):
    """Hashes, test images against their axes, cover, documentation."""
    core()
    from bioimageio.spec import InvalidDescr, ValidationContext, load_description

    with ValidationContext(disable_cache=True, log_warnings=False):
        descr = load_description(exported[2])
    assert not isinstance(descr, InvalidDescr), descr.get_reason()


def speckle(model, side):
    """Grey values for a model, as others take them: with a batch axis."""
    shape = (1, len(model.passport.channels), *[side] * model.ndim)
    return np.random.default_rng(0).gamma(2, 30, shape).astype(np.float32)


@contextmanager
def opened_by_library(path):
    core()
    from bioimageio.core import create_prediction_pipeline
    from bioimageio.spec import ValidationContext, load_description

    with ValidationContext(disable_cache=True, log_warnings=False):
        yield create_prediction_pipeline(load_description(path))


def values(sample):
    (member,) = sample.members.values()
    return member.to_numpy()[0]


HEAVY = ("3D", "nearest", "unpool", "3D valid")


@pytest.mark.parametrize(
    "exported",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY))
        for name in NETWORKS
        if name != "group"  # see the next test
    ],
    indirect=True,
)
def test_others_get_what_we_predict(exported):
    """Run by the format's own library, beyond what its other edges change."""
    name, model, path = exported
    field = receptive_field(model.network.config)
    image = speckle(model, field.input_size(152 if model.ndim == 2 else 44))
    with opened_by_library(path) as pipeline:
        from bioimageio.core import predict as run

        results = []
        # Of a whole image, that library takes the statistics with mirrored edges.
        with_edges = model.passport.normalization.method != "fixed" and not field.shrink
        if not with_edges:
            results.append(values(run(model=pipeline, inputs=image)))
        if not field.shrink and name != "channels":
            blocks = run(model=pipeline, inputs=image, blocksize_parameter=2)
            results.append(values(blocks))
    axes = "C" + "ZYX"[-model.ndim :]
    ours = predict(image[0], model, axes=axes, device="cpu", precision="float32")
    assert ours.std() > 0.01
    margin = field.shrink or max(field.halo)
    inside = (slice(None), *[slice(margin, -margin)] * model.ndim)
    for theirs in results:
        theirs = theirs if field.shrink else theirs[inside]
        np.testing.assert_allclose(theirs, ours[inside], atol=1e-4)


def test_others_get_what_the_network_gives_where_tiles_would_change_it(tmp_path):
    model = make("group")
    export_package(model, tmp_path / "a.zip")
    image = speckle(model, 60)
    with opened_by_library(tmp_path / "a.zip") as pipeline, pipeline:
        from bioimageio.core.digest_spec import create_sample_for_model

        sample = create_sample_for_model(pipeline.model_descr, inputs=image)
        result = pipeline.predict_sample_without_blocking(
            sample, skip_input_padding=True, skip_output_cropping=True
        )
    ours = outputs_of(model, model.passport.normalization, image[0])["softmax"]
    np.testing.assert_allclose(values(result), ours, atol=1e-4)


def check_by_library(path):
    bioimageio = core()
    from bioimageio.spec import ValidationContext

    with ValidationContext(disable_cache=True, log_warnings=False):
        summary = bioimageio.test_model(path)
    assert summary.status == "passed", summary.format()


@pytest.mark.slow
def test_the_librarys_own_test_passes(exported):
    check_by_library(exported[2])


def test_the_librarys_own_test_passes_on_the_smallest(tmp_path):
    export_package(make("one output"), tmp_path / "a.zip")
    check_by_library(tmp_path / "a.zip")


# --- what is in it ------------------------------------------------------------


def opened(path):
    with zipfile.ZipFile(path) as archive:
        content = yaml.safe_load(archive.read("rdf.yaml"))
        return content, {name: archive.read(name) for name in archive.namelist()}


def test_what_others_are_told(tmp_path):
    model = make("paper")
    path = tmp_path / "a.zip"
    export_package(model, path, authors=["Ada", "Grace"], license="MIT")
    content, files = opened(path)
    assert content["name"] == "nuclei   Kerne   1"
    assert [author["name"] for author in content["authors"]] == ["Ada", "Grace"]
    assert (content["license"], content["version"]) == ("MIT", "3")
    dois = [entry["doi"] for entry in content["cite"]]
    assert dois == ["10.1038/s41592-019-1", "10.1007/978-3-319-24574-4_28"]
    field = receptive_field(model.network.config)
    y = content["inputs"][0]["axes"][2]
    assert y["size"] == {"min": field.input_size(1), "step": 4}
    assert (y["scale"], y["unit"]) == (0.5, "micrometer")
    out = content["outputs"][0]["axes"][2]
    assert out["size"]["offset"] == -2 * field.shrink
    assert "halo" not in out
    readme = files["README.md"].decode()
    assert "# Validation" in readme
    assert "a 0.123" in readme
    picture = Image.open(io.BytesIO(files["cover.png"]))
    assert picture.size == (512, 256)
    weights = torch.load(io.BytesIO(files["weights.pt"]), weights_only=True)
    assert weights.keys() == model.network.state_dict().keys()


def test_the_halo_of_padded_networks(tmp_path):
    model = make("default")
    export_package(model, tmp_path / "a.zip")
    content, _ = opened(tmp_path / "a.zip")
    out = content["outputs"][0]["axes"][2]
    assert out["halo"] % 4 == 0
    assert out["halo"] >= max(receptive_field(model.network.config).halo)
    assert content["inputs"][0]["axes"][2]["size"]["min"] > 2 * out["halo"]
    assert content["authors"] == [{"name": "unknown"}]


def test_a_test_image_of_ones_own(tmp_path):
    model = make("default")
    image = np.random.default_rng(3).gamma(2, 30, (1, 300, 40))
    export_package(model, tmp_path / "a.zip", image=image)
    _, files = opened(tmp_path / "a.zip")
    tested = np.load(io.BytesIO(files["test_input.npy"]))[0, 0]
    side = len(tested)
    start = (300 - side) // 2
    np.testing.assert_array_equal(
        tested[:, :40], image[0, start : start + side].astype(np.float32)
    )
    import_package(tmp_path / "a.zip")
    with pytest.raises(BadInput, match=r"shape \(2, 9, 9\); the model takes 1"):
        export_package(model, tmp_path / "b.zip", image=np.zeros((2, 9, 9)))


def test_the_source_needs_torch_alone(tmp_path):
    """Run where napari-unet cannot be imported, with the network of others, too."""
    (tmp_path / "unet.py").write_text(network_source())
    configs = [make(name).network.config.to_dict() for name in NETWORKS]
    configs.append(recognise(Segmentify().state_dict()).network.config.to_dict())
    for number, config in enumerate(configs):
        torch.manual_seed(number)
        network = UNet(**config).eval()
        torch.save(network.state_dict(), tmp_path / f"{number}.pt")
        side = receptive_field(network.config).input_size(36)
        image = torch.randn(
            1, network.config.in_channels, *[side] * network.config.ndim
        )
        with torch.inference_mode():
            np.save(tmp_path / f"{number}-in.npy", image.numpy())
            np.save(tmp_path / f"{number}-out.npy", network(image).numpy())
    program = f"""
import sys, json
sys.modules["napari_unet"] = None
import numpy as np, torch
from unet import {ENTRY}
torch.set_num_threads(1)
for number, config in enumerate(json.loads(sys.stdin.read())):
    network = {ENTRY}(**config).eval()
    network.load_state_dict(torch.load(f"{{number}}.pt", weights_only=True))
    with torch.inference_mode():
        got = network(torch.from_numpy(np.load(f"{{number}}-in.npy"))).numpy()
    assert (got == np.load(f"{{number}}-out.npy")).all(), config
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(configs),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_network_that_is_being_trained(tmp_path):
    """It is exported as it predicts, and goes on as it was."""
    torch.manual_seed(0)
    model = Model(UNet(depth=1, base_channels=2, dropout=0.5))
    assert model.network.training
    export_package(model, tmp_path / "a.zip")
    assert model.network.training
    again = import_package(tmp_path / "a.zip")
    assert not again.network.training
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name


def test_networks_of_others_with_their_own_widths(tmp_path):
    torch.manual_seed(0)
    model = recognise(Segmentify().state_dict())
    export_package(model, tmp_path / "a.zip")
    again = import_package(tmp_path / "a.zip")
    assert again.passport == model.passport
    assert again.network.config == model.network.config


# --- refusals, and the library ------------------------------------------------


def test_what_cannot_be_exported(tmp_path):
    model = make("default")
    path = tmp_path / "a.zip"
    with pytest.raises(BadInput, match="no license 'free for all'"):
        export_package(model, path, license="free for all")
    with pytest.raises(BadOutput):
        export_package(model, tmp_path / "missing" / "a.zip")
    damaged = model.passport.model_copy(update={"thumbnail": "AAAA"})
    with pytest.raises(BadModel, match="thumbnail"):
        export_package(Model(model.network, damaged), path)
    assert not list(tmp_path.iterdir())


def test_networks_that_run_as_they_are_cannot_be_rebuilt(tmp_path, shared_data):
    pytest.importorskip("onnxruntime")
    folder = shared_data / "checkpoints" / "bioimageio_unet2d_nuclei_broad"
    model = import_package(folder)
    with pytest.raises(BadModel, match="ONNX network, which runs as it is"):
        export_package(model, tmp_path / "a.zip")
    saved = read_model(save_model(model, tmp_path / "a"))
    assert saved.passport == model.passport


def test_a_changed_passport_or_config_in_a_package_is_refused(tmp_path):
    export_package(make("default"), tmp_path / "a.zip")
    content, files = opened(tmp_path / "a.zip")

    def changed(**own):
        content["config"]["napari_unet"] |= own
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
            archive.writestr("rdf.yaml", yaml.safe_dump(content))
        return tmp_path / "b.zip"

    del files["rdf.yaml"]
    whole = dict(content["config"]["napari_unet"])
    for own, match in (
        ({"passport": {"nonsense": 1}}, "passport is damaged"),
        ({"config": {"depth": "deep"}}, "depth"),
        ({"config": whole["config"] | {"depth": 3}}, "do not fit its network"),
        ({"config": whole["config"] | {"base_channels": 4096}}, "do not fit"),
        (
            {"passport": whole["passport"] | {"normalization": {"method": "mean_std"}}},
            "another result here",
        ),
    ):
        with pytest.raises(BadModel, match=match):
            import_package(changed(**(whole | own)))


@pytest.mark.usefixtures("own_library")
def test_the_library_exports_packages(tmp_path):
    model = make("default")
    import_model(save_model(model, tmp_path / "cells.safetensors"))
    path = export_model("cells", tmp_path / "out.zip", authors=["Ada"])
    assert path == tmp_path / "out.zip"
    with pytest.raises(BadOutput, match="exists already"):
        export_model("cells", path)
    export_model("cells", path, overwrite=True)
    assert import_model(path, "again") == "again"
    files = [
        read_model(f"{tmp_path}/home/models/{n}.safetensors")
        for n in ("cells", "again")
    ]
    assert model_sha256(files[0]) == model_sha256(files[1])


def test_classes_and_their_names(tmp_path):
    model = make("channels")
    names = ("background", "nuclei", "cytoplasm")
    classes = tuple(
        ClassInfo(name=name, kind="background" if not i else "region")
        for i, name in enumerate(names)
    )
    passport = model.passport.model_copy(update={"classes": classes})
    export_package(Model(model.network, passport), tmp_path / "a.zip")
    content, _ = opened(tmp_path / "a.zip")
    assert content["outputs"][0]["axes"][1]["channel_names"] == list(names)


def test_without_our_own_notes_the_same_facts_are_read(tmp_path):
    """As of a package that another program has written again."""
    model = make("channels")
    export_package(model, tmp_path / "a.zip", authors=["Ada"], license="MIT")
    content, files = opened(tmp_path / "a.zip")
    del content["config"]
    files["rdf.yaml"] = yaml.safe_dump(content).encode()
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    again = import_package(tmp_path / "b.zip")
    mine, theirs = model.passport, again.passport
    assert theirs.channels == mine.channels
    assert theirs.pixel_size == mine.pixel_size
    assert [c.name for c in theirs.classes] == [c.name for c in mine.classes]
    image = speckle(model, 64)[0]
    both = [predict(image, m, axes="CYX", device="cpu") for m in (model, again)]
    np.testing.assert_allclose(*both, atol=1e-5)
