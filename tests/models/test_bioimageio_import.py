"""Packages of others give here what they gave there, or are refused in words."""

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
from onnx_files import node, onnx_file, tensor, value_info
from packages import Written, make_image, npy, sigmoid
from PIL import Image

from napari_unet import load_model, predict
from napari_unet.errors import BadInput, BadModel, NeedsTrust
from napari_unet.models.bioimageio import import_package
from napari_unet.models.bioimageio_test import outputs_of
from napari_unet.models.library import import_model, list_models

REAL = (
    "bioimageio_unet2d_fixed_shape/v0_4.bioimageio.yaml",
    "bioimageio_unet2d_nuclei_broad",
    "bioimageio_unet2d_nuclei_broad/v0_4_0.bioimageio.yaml",
    "bioimageio_unet2d_nuclei_broad/v0_4_9.bioimageio.yaml",
)
ZERO_MEAN = {"id": "zero_mean_unit_variance", "kwargs": {"axes": ["y", "x"]}}


def standard(x, axes=(2, 3), eps=1e-6):
    return (x - x.mean(axes, keepdims=True)) / (x.std(axes, keepdims=True) + eps)


def by_percentiles(x, low=2, high=98, axes=(2, 3), eps=1e-6):
    a, b = np.percentile(x, [low, high], axis=axes, keepdims=True)
    return (x - a) / (b - a + eps)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# --- real packages ------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_real_packages_give_their_own_test_output(shared_data, name):
    if "nuclei_broad" in name:
        pytest.importorskip("onnxruntime")
    source = shared_data / "checkpoints" / name
    model = import_package(source)
    folder = source if source.is_dir() else source.parent
    image = np.load(folder / "test_input.npy")[0]
    wanted = np.load(folder / "test_output.npy")[0]
    outputs = outputs_of(model, model.passport.normalization, image)
    if "fixed_shape" in name:  # it has no sigmoid, and its description says so
        assert np.abs(outputs["none"] - wanted).max() <= 1e-4
        assert "its 0.5 becomes 0.62" in model.passport.description
        assert model.passport.threshold == pytest.approx(sigmoid(0.5))
    else:
        assert np.abs(outputs["sigmoid"] - wanted).max() <= 1e-4
        got = predict(image, model, axes="CYX", device="cpu", precision="float32")
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    passport = model.passport
    assert "Constantin Pape" in passport.description
    assert "10.1007/978-3-319-24574-4_28" in passport.citation
    picture = Image.open(io.BytesIO(base64.b64decode(passport.thumbnail)))
    assert max(picture.size) <= 128


# --- normalisation ------------------------------------------------------------

MEANS = np.array([300.0, 500.0]).reshape(1, 2, 1, 1)
STDS = np.array([100.0, 250.0]).reshape(1, 2, 1, 1)
PREPROCESSING = {
    "none": (1, None, []),
    "mean of each channel": (2, standard, [ZERO_MEAN]),
    "mean of all channels": (
        2,
        lambda x: standard(x, (1, 2, 3)),
        [
            {
                "id": "zero_mean_unit_variance",
                "kwargs": {"axes": ["channel", "y", "x"]},
            }
        ],
    ),
    "a large eps": (
        1,
        lambda x: standard(x, eps=0.1),
        [
            {
                "id": "zero_mean_unit_variance",
                "kwargs": {"axes": ["y", "x"], "eps": 0.1},
            }
        ],
    ),
    "all axes by default": (
        2,
        lambda x: standard(x, (1, 2, 3)),
        [{"id": "zero_mean_unit_variance"}],
    ),
    "percentiles": (
        2,
        by_percentiles,
        [
            {
                "id": "scale_range",
                "kwargs": {
                    "axes": ["y", "x"],
                    "min_percentile": 2,
                    "max_percentile": 98,
                },
            }
        ],
    ),
    "percentiles, then limits": (
        1,
        lambda x: np.clip(by_percentiles(x, 5, 90), 0, 1),
        [
            {
                "id": "scale_range",
                "kwargs": {
                    "axes": ["channel", "y", "x"],
                    "min_percentile": 5,
                    "max_percentile": 90,
                },
            },
            {"id": "clip", "kwargs": {"min": 0.0, "max": 1.0}},
        ],
    ),
    "linear": (
        1,
        lambda x: x / 255 - 0.5,
        [{"id": "scale_linear", "kwargs": {"gain": 1 / 255, "offset": -0.5}}],
    ),
    "linear twice, then a limit": (
        1,
        lambda x: np.maximum(2 * (x / 255) - 1, 0),
        [
            {"id": "scale_linear", "kwargs": {"gain": 1 / 255}},
            {"id": "scale_linear", "kwargs": {"gain": 2.0, "offset": -1.0}},
            {"id": "clip", "kwargs": {"min": 0.0}},
        ],
    ),
    "linear by channel": (
        2,
        lambda x: (x - MEANS) / STDS,
        [
            {
                "id": "scale_linear",
                "kwargs": {
                    "axis": "channel",
                    "gain": (1 / STDS).ravel().tolist(),
                    "offset": (-MEANS / STDS).ravel().tolist(),
                },
            }
        ],
    ),
    "known means of channels": (
        2,
        lambda x: (x - MEANS) / STDS,
        [
            {
                "id": "fixed_zero_mean_unit_variance",
                "kwargs": {
                    "axis": "channel",
                    "mean": MEANS.ravel().tolist(),
                    "std": STDS.ravel().tolist(),
                },
            }
        ],
    ),
    "linear, then the mean": (
        1,
        standard,
        [{"id": "scale_linear", "kwargs": {"gain": 0.5}}, ZERO_MEAN],
    ),
}


@pytest.mark.parametrize("case", PREPROCESSING)
def test_normalisation_is_that_of_the_package(tmp_path, case):
    channels, before, steps = PREPROCESSING[case]
    written = Written(channels, before=before, after=sigmoid)
    content = written.content(steps, [{"id": "sigmoid"}])
    model = import_package(written.zip(tmp_path / "a.zip", content))
    # Also of an image that the package has not seen, by the engine.
    image = make_image(channels, seed=1, side=64)
    got = predict(image[0], model, axes="CYX", device="cpu", precision="float32")
    pixels = image if before is None else before(image.astype(np.float64))
    margin = 20  # where the edges have no influence
    wanted = sigmoid(run(written, pixels))[0]
    inside = (slice(None), slice(margin, -margin), slice(margin, -margin))
    np.testing.assert_allclose(got[inside], wanted[inside], atol=1e-4)


def run(written, pixels):
    import torch

    with torch.inference_mode():
        return written.network(torch.from_numpy(pixels.astype(np.float32))).numpy()


OLD = {
    "per_sample": (
        standard,
        {
            "name": "zero_mean_unit_variance",
            "kwargs": {"mode": "per_sample", "axes": "yx"},
        },
    ),
    "per_dataset": (
        standard,
        {
            "name": "zero_mean_unit_variance",
            "kwargs": {"mode": "per_dataset", "axes": "yx"},
        },
    ),
    "fixed": (
        lambda x: (x - 300) / 100,
        {
            "name": "zero_mean_unit_variance",
            "kwargs": {"mode": "fixed", "axes": "yx", "mean": 300, "std": 100},
        },
    ),
    "scale_linear": (
        lambda x: x / 100 - 1,
        {
            "name": "scale_linear",
            "kwargs": {"axes": "yx", "gain": [0.01], "offset": [-1.0]},
        },
    ),
    "scale_range": (
        by_percentiles,
        {
            "name": "scale_range",
            "kwargs": {
                "mode": "per_sample",
                "axes": "yx",
                "min_percentile": 2,
                "max_percentile": 98,
            },
        },
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_format_0_4(tmp_path, case):
    before, step = OLD[case]
    written = Written(before=before, after=sigmoid)
    content = written.content_0_4([step], [{"name": "sigmoid"}])
    model = import_package(written.folder(tmp_path / "package", content))
    assert model.passport.name == "By hand"
    told = "whole set of images" in model.passport.description
    assert told == (case == "per_dataset")


def test_volumes(tmp_path):
    steps = [{"id": "zero_mean_unit_variance", "kwargs": {"axes": ["z", "y", "x"]}}]
    written = Written(ndim=3, before=lambda x: standard(x, (2, 3, 4)), after=sigmoid)
    content = written.content(steps, [{"id": "sigmoid"}])
    for axis, size in zip(content["inputs"][0]["axes"][2:], (2, 500, 0.5), strict=True):
        unit = "nanometer" if size == 500 else "micrometer"
        axis |= {"scale": size, "unit": unit}
    for axis, known in zip(
        content["outputs"][0]["axes"], content["inputs"][0]["axes"], strict=True
    ):
        if known["type"] == "space":
            axis |= {"scale": known["scale"], "unit": known["unit"]}
    model = import_package(written.zip(tmp_path / "a.zip", content))
    assert model.ndim == 3
    assert model.passport.pixel_size == (2, 0.5, 0.5)
    assert model.passport.normalization.scope == "image"


def test_a_network_of_planes_normalises_each_plane_of_a_stack(tmp_path):
    written = Written(before=standard, after=sigmoid)
    content = written.content([ZERO_MEAN], [{"id": "sigmoid"}])
    model = import_package(written.zip(tmp_path / "a.zip", content))
    stack = np.concatenate([make_image()[0], 10 * make_image(seed=1)[0]])
    both = predict(stack, model, axes="ZYX", device="cpu", precision="float32")
    for plane, of_stack in zip(stack, both[0], strict=True):
        alone = predict(plane, model, axes="YX", device="cpu", precision="float32")
        np.testing.assert_allclose(of_stack, alone[0], atol=1e-6)


# --- outputs ------------------------------------------------------------------


def package(tmp_path, outputs, after, postprocessing, names=None):
    written = Written(outputs=outputs, before=standard, after=after)
    content = written.content([ZERO_MEAN], postprocessing)
    if names:
        content["outputs"][0]["axes"][1]["channel_names"] = names
    return written, import_package(written.zip(tmp_path / "a.zip", content))


def own(model):
    """What our engine gives for the test image."""
    image = make_image()[0, 0]
    return predict(
        image, model, axes="YX", device="cpu", precision="float32", tile_shape=(32, 32)
    )


def test_an_activation_inside_the_network_is_found_out(tmp_path):
    """A state dict does not say that its own program ends with a sigmoid."""
    _, model = package(tmp_path, 1, sigmoid, [])
    assert "bare output" not in model.passport.description
    assert model.passport.threshold == 0.5


def test_softmax_and_names_of_classes(tmp_path):
    _, model = package(
        tmp_path, 3, softmax, [{"id": "softmax"}], ["background", "nucleus", "cell"]
    )
    passport = model.passport
    assert [info.name for info in passport.classes] == ["background", "nucleus", "cell"]
    assert passport.classes[0].kind == "background"
    assert passport.channels == ("dye 0",)
    assert (passport.version, passport.threshold) == ("2.1", 0.5)
    assert passport.citation == "Ours doi:10.1000/182"
    assert passport.description.startswith("Finds what it finds. Imported")
    assert "By Ada, Grace. License: MIT." in passport.description


def test_the_background_comes_first(tmp_path):
    written, model = package(
        tmp_path, 3, softmax, [{"id": "softmax"}], ["nucleus", "cell", "background"]
    )
    names = [info.name for info in model.passport.classes]
    assert names == ["background", "nucleus", "cell"]
    wanted = softmax(written.bare)[0][[2, 0, 1]]
    centre = (slice(None), slice(14, 18), slice(14, 18))
    inside = own(model)[centre]
    assert np.abs(inside - wanted[centre]).max() < 0.2  # its context is mirrored
    assert "background" not in model.passport.description


def test_outputs_that_do_not_exclude_each_other_become_classes(tmp_path):
    """The commonest packages: foreground and boundary, each with its own sigmoid."""
    import torch

    written, model = package(
        tmp_path, 2, sigmoid, [{"id": "sigmoid"}], ["foreground", "boundary"]
    )
    kinds = {info.name: info.kind for info in model.passport.classes}
    assert kinds == {
        "background": "background",
        "foreground": "objects",
        "boundary": "background",
        "foreground and boundary": "background",
    }
    pixels = standard(written.image.astype(np.float64)).astype(np.float32)
    with torch.inference_mode():
        joint = model.network(torch.from_numpy(pixels)).softmax(dim=1).numpy()
    each = sigmoid(written.bare)
    np.testing.assert_allclose(joint[:, 1] + joint[:, 3], each[:, 0], atol=1e-5)
    np.testing.assert_allclose(joint[:, 2] + joint[:, 3], each[:, 1], atol=1e-5)
    assert "each combination" in model.passport.description


@pytest.mark.parametrize("inside", [True, False])
def test_the_same_of_an_onnx_network(inside, tmp_path):
    pytest.importorskip("onnxruntime")
    import torch

    made = Written(outputs=2, before=standard)
    pixels = standard(made.image.astype(np.float64)).astype(np.float32)
    kernel = np.array([1, -2], np.float32).reshape(2, 1, 1, 1)
    each = sigmoid(pixels * kernel.reshape(1, 2, 1, 1))
    last = [node("Sigmoid", ["c"], ["y"])] if inside else []
    nodes = [node("Conv", ["x", "w"], ["c" if inside else "y"]), *last]
    shapes = (value_info("x", [1, 1, None, None]), value_info("y", [1, 2, None, None]))
    graph = onnx_file(nodes, [tensor("w", kernel)], shapes[:1], shapes[1:])
    made.files |= {"out.npy": npy(each), "net.onnx": graph}
    content = made.content([ZERO_MEAN], [] if inside else [{"id": "sigmoid"}])
    content["weights"] = {"onnx": made.file("net.onnx") | {"opset_version": 17}}
    content["outputs"][0]["axes"][1]["channel_names"] = ["foreground", "boundary"]
    model = import_package(made.zip(tmp_path / "a.zip", content))
    names = [info.name for info in model.passport.classes]
    assert names[1:] == ["foreground", "boundary", "foreground and boundary"]
    with torch.inference_mode():
        joint = model.network(torch.from_numpy(pixels)).softmax(dim=1).numpy()
    np.testing.assert_allclose(joint[:, 1] + joint[:, 3], each[:, 0], atol=1e-5)
    np.testing.assert_allclose(joint[:, 2] + joint[:, 3], each[:, 1], atol=1e-5)


def test_a_threshold_is_taken_over(tmp_path):
    _, model = package(
        tmp_path,
        1,
        lambda x: (sigmoid(x) > 0.3).astype(np.float32),
        [{"id": "sigmoid"}, {"id": "binarize", "kwargs": {"threshold": 0.3}}],
    )
    assert model.passport.threshold == 0.3


def test_a_threshold_of_bare_outputs(tmp_path):
    _, model = package(
        tmp_path,
        1,
        lambda x: (x > 1.0).astype(np.float32),
        [{"id": "binarize", "kwargs": {"threshold": 1.0}}],
    )
    assert model.passport.threshold == pytest.approx(sigmoid(1.0))


# --- refusals -----------------------------------------------------------------


def refused(tmp_path, content_of, match, error=BadModel, **written):
    made = Written(**{"before": standard, "after": sigmoid} | written)
    content = made.content([ZERO_MEAN], [{"id": "sigmoid"}])
    content_of(content, made)
    with pytest.raises(error, match=match) as caught:
        import_package(made.zip(tmp_path / "a.zip", content))
    assert str(caught.value).startswith("a.zip cannot be imported. ")


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([{"id": "scale_linear", "kwargs": {"gain": -1.0}}], "bright into dark"),
        ([ZERO_MEAN, {"id": "scale_linear", "kwargs": {"gain": 2.0}}], "again after"),
        ([ZERO_MEAN, ZERO_MEAN], "twice"),
        (
            [ZERO_MEAN, {"id": "ensure_dtype", "kwargs": {"dtype": "uint8"}}],
            "rounds the normalised image to uint8",
        ),
        (
            [{"id": "zero_mean_unit_variance", "kwargs": {"axes": ["x"]}}],
            "every y by itself",
        ),
        (
            [{"id": "clip", "kwargs": {"min_percentile": 1, "max_percentile": 99}}],
            "at percentiles",
        ),
        ([{"id": "binarize", "kwargs": {"threshold": 3.0}}], "'binarize'"),
    ],
)
def test_normalisation_that_is_not_ours(tmp_path, steps, match):
    def change(content, _):
        content["inputs"][0]["preprocessing"] = steps

    refused(tmp_path, change, match)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([{"id": "scale_linear", "kwargs": {"gain": 255.0}}], "'scale_linear'"),
        (
            [{"id": "sigmoid"}, {"id": "ensure_dtype", "kwargs": {"dtype": "uint8"}}],
            "rounds its output",
        ),
        ([{"id": "softmax"}], "1 everywhere"),
    ],
)
def test_outputs_that_are_not_ours(tmp_path, steps, match):
    def change(content, _):
        content["outputs"][0]["postprocessing"] = steps

    refused(tmp_path, change, match)


def test_another_result_is_refused(tmp_path):
    def change(content, made):
        made.files["out.npy"] = npy(np.roll(sigmoid(made.bare), 1, axis=2))
        content["outputs"][0]["test_tensor"] = made.file("out.npy")

    refused(tmp_path, change, "another result here: it differs by up to 0")


def test_a_deviation_above_the_limit_is_refused_and_below_not(tmp_path):
    for number, (off, fits) in enumerate([(2e-4, False), (5e-5, True)]):
        made = Written(
            before=standard, after=lambda x, off=off: sigmoid(x) + np.float32(off)
        )
        content = made.content([ZERO_MEAN], [{"id": "sigmoid"}])
        path = made.zip(tmp_path / f"{number}.zip", content)
        if fits:
            import_package(path)
        else:
            with pytest.raises(
                BadModel, match=r"up to 0\.0002, and 0\.0001 is allowed"
            ):
                import_package(path)


def test_several_inputs(tmp_path):
    def change(content, _):
        content["inputs"].append(content["inputs"][0] | {"id": "second"})

    refused(tmp_path, change, r"2 inputs \(raw, second\)")


def test_other_axes(tmp_path):
    def change(content, made):
        for info in (content["inputs"][0], content["outputs"][0]):
            info["axes"] = [info["axes"][i] for i in (0, 2, 3, 1)]
        made.files["in.npy"] = npy(np.moveaxis(made.image, 1, -1))
        content["inputs"][0]["test_tensor"] = made.file("in.npy")

    refused(tmp_path, change, "batch, y, x, channel; napari-unet runs")


def test_another_architecture(tmp_path):
    import torch

    def change(content, made):
        target = io.BytesIO()
        torch.save(torch.nn.Linear(2, 2).state_dict(), target)
        made.files["weights.pt"] = target.getvalue()
        content["weights"]["pytorch_state_dict"] |= made.file("weights.pt")

    refused(tmp_path, change, "None of its layers is known")


def test_no_weights_for_us(tmp_path):
    def change(content, made):
        weights = made.file("weights.pt") | {"tensorflow_version": "2.1"}
        content["weights"] = {"tensorflow_saved_model_bundle": weights}

    refused(tmp_path, change, r"no weights .*\(tensorflow_saved_model_bundle\)")


def test_an_invalid_description(tmp_path):
    def change(content, _):
        del content["inputs"][0]["axes"]

    refused(tmp_path, change, r"format 0\.5\.0\) is not valid: .*axes")


def test_the_output_of_another_model(tmp_path):
    def change(content, _):
        content["inputs"][0]["output_of"] = "affable-shark"

    refused(tmp_path, change, "output of another model")


def test_without_test_images_the_user_is_told(tmp_path):
    made = Written(before=standard, after=sigmoid)
    content = made.content([ZERO_MEAN], [{"id": "sigmoid"}])
    for info in (*content["inputs"], *content["outputs"]):
        del info["test_tensor"]
    model = import_package(made.zip(tmp_path / "a.zip", content))
    assert "no test images" in model.passport.description


def scripted(made):
    """TorchScript weights of the package's network."""
    import torch

    target = io.BytesIO()
    torch.jit.save(torch.jit.trace(made.network, torch.zeros(1, 1, 32, 32)), target)
    return target.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_needs_consent(tmp_path):
    made = Written(before=standard, after=sigmoid)
    made.files["script.pt"] = scripted(made)
    content = made.content([ZERO_MEAN], [{"id": "sigmoid"}])
    content["weights"] = {
        "torchscript": made.file("script.pt") | {"pytorch_version": "2.1"}
    }
    path = made.zip(tmp_path / "a.zip", content)
    with pytest.raises(NeedsTrust, match=r"a\.zip cannot be imported"):
        import_package(path)
    model = import_package(path, trust=True)
    np.testing.assert_allclose(
        own(model)[0, 14:18, 14:18], sigmoid(made.bare)[0, 0, 14:18, 14:18], atol=0.2
    )


# --- in the program -----------------------------------------------------------


@pytest.mark.usefixtures("own_library")
def test_the_library_and_load_model_take_packages(tmp_path):
    made = Written(before=standard, after=sigmoid)
    content = made.content([ZERO_MEAN], [{"id": "sigmoid"}])
    for source in (
        made.zip(tmp_path / "a.zip", content),
        made.folder(tmp_path / "folder", content),
        tmp_path / "folder" / "rdf.yaml",
    ):
        assert load_model(source).passport.name == "By hand"
    assert import_model(tmp_path / "a.zip") == "By hand"
    assert import_model(tmp_path / "folder", "other") == "other"
    again = load_model("By hand")
    np.testing.assert_array_equal(own(again), own(load_model(tmp_path / "a.zip")))
    assert {"By hand", "other"} <= list_models().keys()


def test_without_the_library_the_user_is_told(tmp_path, monkeypatch):
    made = Written()
    path = made.zip(tmp_path / "a.zip", made.content())
    monkeypatch.setitem(sys.modules, "bioimageio", None)
    with pytest.raises(BadInput, match=r'pip install "napari-unet\[bioimageio\]"'):
        import_package(path)


def test_importing_packages_writes_nothing_outside_and_imports_late(tmp_path):
    made = Written(before=standard, after=sigmoid)
    content = made.content([ZERO_MEAN], [{"id": "sigmoid"}])
    path = made.zip(tmp_path / "a.zip", content)
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "import sys, napari_unet, napari_unet.cli, napari_unet.models.library as l\n"
        "assert 'bioimageio' not in sys.modules\n"
        f"l.load_model({str(path)!r})\n"
        "assert 'bioimageio.core' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"HOME": str(home), "TMPDIR": str(tmp_path), "PATH": ""},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert not list(home.rglob("*"))
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"a.zip", "home"}
