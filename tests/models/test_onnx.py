import re
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hostile_onnx import IMAGE, ONE, RESULT, heavy_onnx, hostile_onnx, small
from onnx_files import DOUBLE, INT64, node, onnx_file, tensor, unet_file, value_info

from napari_unet.errors import BadModel
from napari_unet.inference.predict import predict
from napari_unet.models import onnx as onnx_models
from napari_unet.models.checkpoint import model_sha256, read_header, save_model
from napari_unet.models.description import facts
from napari_unet.models.library import import_model, load_model
from napari_unet.models.onnx import import_onnx
from napari_unet.models.onnx_graph import follow, read_graph
from napari_unet.network.program import build_program
from napari_unet.network.receptive_field import receptive_field

CASES = [
    # options of the network, sides of the input, its config
    ({}, (None, None), {"alignment": 4, "fixed_shape": None}),
    ({"depth": 3}, ("h", "w"), {"alignment": 8, "fixed_shape": None}),
    ({"norm": None}, (64, 64), {"fixed_shape": (64, 64), "shrink": 0}),
    ({"in_channels": 3}, (48, 80), {"fixed_shape": (48, 80)}),
    ({"num_classes": 1}, (None, 64), {"fixed_shape": (256, 64), "num_classes": 1}),
    ({"ndim": 3, "depth": 1}, (None,) * 3, {"alignment": 2}),
    ({"ndim": 3, "depth": 1}, (8, 32, 16), {"fixed_shape": (8, 32, 16)}),
]


def network_of(trained, **options):
    return trained(**({"depth": 2, "base_channels": 3} | options)).network


@pytest.mark.parametrize(("options", "sides", "expected"), CASES)
def test_gives_what_the_original_gives(options, sides, expected, trained):
    network = network_of(trained, **options)
    model = import_onnx(unet_file(network, sides), "cells")
    config = model.network.config
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.outputs == "logits"
    assert config.in_channels == network.config.in_channels
    assert config.num_classes == network.config.num_classes
    shape = config.fixed_shape or (24,) * config.ndim
    image = torch.randn(1, config.in_channels, *shape)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.network(image), network(image), atol=1e-5, rtol=1e-5
        )


def test_the_context_is_that_of_the_layers(trained):
    """No less than what the same network has by our own count, and little more."""
    for depth in (1, 2, 3):
        network = network_of(trained, depth=depth)
        graph = read_graph(unet_file(network))
        found, field = follow(graph, "x"), receptive_field(network.config)
        assert found.alignment == field.alignment
        assert max(field.before, field.after) <= found.reach
        assert found.reach <= max(field.before, field.after) + 2**depth
        assert found.width == network.config.base_channels


def test_sides_that_layers_do_not_tell_are_tried(trained):
    """A fold of 1024 pixels pools nothing, and 64 x 65 are no multiple of it."""
    sizes = tensor("s", np.array([0, 0, -1, 1024], np.int64))
    shape = node("Shape", ["x"], ["n"])
    nodes = [
        node("Reshape", ["x", "s"], ["r"]),
        shape,
        node("Reshape", ["r", "n"], ["y"]),
    ]
    image, result = ([value_info(n, [1, 3, None, None])] for n in "xy")
    model = import_onnx(onnx_file(nodes, [sizes], image, result), "folded")
    assert model.network.config.alignment == 16
    told = import_onnx(unet_file(network_of(trained)), "told", halo=9)
    assert told.network.config.halo == 9


@pytest.mark.parametrize(("last", "classes"), [("Sigmoid", 1), ("Softmax", 3)])
def test_a_last_sigmoid_or_softmax_is_seen(last, classes, trained):
    network = network_of(trained, num_classes=classes)
    model = import_onnx(unet_file(network, last=last), "cells")
    assert model.network.config.outputs == "probabilities"
    assert "probabilities already" in model.passport.description


def exported(*nodes, weights=(), classes=3, outputs=None):
    """A 1x1 convolution from "x" to "c", and what follows."""
    kernel = np.array([1.0, -2.0, 0.5, 3.0], np.float32)[:classes].reshape(-1, 1, 1, 1)
    first = node("Conv", ["x", "w"], ["c"])
    result = [value_info("y", [1, outputs or classes, None, None])]
    return onnx_file([first, *nodes], [tensor("w", kernel), *weights], IMAGE, result)


AXES = tensor("a", np.array([1], np.int64))
BOUNDS = [tensor(n, np.array([v], np.int64)) for n, v in (("s", 1), ("e", 3))]
SOFTMAXES = {
    # As torch exports it for older versions of ONNX.
    "between turns": exported(
        node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]),
        node("Softmax", ["t"], ["p"], axis=3),
        node("Transpose", ["p"], ["y"], perm=[0, 3, 1, 2]),
    ),
    "as its formula": exported(
        node("Exp", ["c"], ["p"]),
        node("ReduceSum", ["p", "a"], ["t"]),
        node("Div", ["p", "t"], ["y"]),
        weights=[AXES],
    ),
    "without background": exported(
        node("Softmax", ["c"], ["p"], axis=1),
        node("Slice", ["p", "s", "e", "a"], ["y"]),
        weights=[AXES, *BOUNDS],
        outputs=2,
    ),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_that_is_not_the_last_operator_is_seen(name):
    model = import_onnx(SOFTMAXES[name], "cells")
    assert model.network.config.outputs == "probabilities"
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 16)).astype(np.float32)
    given = model.network(torch.from_numpy(image)).numpy()[0]
    bare = np.exp(image[0] * np.array([1, -2, 0.5])[:, None, None])
    wanted = (bare / bare.sum(axis=0))[-len(given) :]
    np.testing.assert_allclose(given, wanted, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_sigmoids_that_do_not_exclude_each_other_become_classes(classes, tmp_path):
    model = import_onnx(
        exported(node("Sigmoid", ["c"], ["y"]), classes=classes), "cells"
    )
    names = [info.name for info in model.passport.classes]
    assert names[:4] == ["background", "output 1", "output 2", "output 1 and output 2"]
    assert len(names) == model.network.config.num_classes == 2**classes
    assert "may hold in the same pixel" in model.passport.description
    again = load_model(save_model(model, tmp_path / "ours"))
    image = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    found = predict(image, again, device="cpu")
    pixels = again.passport.normalization.fit(image[None]).apply(image[None])
    for bit in range(classes):
        holds = [n for n in range(2**classes) if n >> bit & 1]
        wanted = 1 / (1 + np.exp(-pixels[0] * [1, -2, 0.5][bit]))
        np.testing.assert_allclose(found[holds].sum(axis=0), wanted, atol=1e-5)


def test_more_sigmoids_are_told_of():
    content = exported(node("Sigmoid", ["c"], ["y"]), classes=4)
    model = import_onnx(content, "cells")
    assert model.network.config.num_classes == 4
    said = model.passport.description
    assert "do not exclude each other; the first one is taken for the background" in (
        said
    )


def test_combinations_that_cannot_be_are_refused():
    model = import_onnx(exported(node("Sigmoid", ["c"], ["y"]), classes=2), "cells")
    forged = replace(model.network.config, num_classes=5)
    with pytest.raises(BadModel, match="damaged"):
        build_program(forged, model.network.state_dict())


def test_convolutions_without_padding_need_a_fixed_size():
    nodes = [node("Conv", ["x", "w"], ["y"])]
    weights = [tensor("w", np.ones((1, 1, 5, 5), np.float32))]
    image, result = [value_info("x", [1, 1, 20, 20])], [value_info("y", [1, 1, 16, 16])]
    model = import_onnx(onnx_file(nodes, weights, image, result), "valid")
    config = model.network.config
    assert (config.fixed_shape, config.shrink) == ((20, 20), 2)
    with pytest.raises(BadModel, match=r"64 x 65.*fixed input size"):
        import_onnx(onnx_file(nodes, weights, IMAGE, RESULT), "valid")


def test_a_file_of_ours_keeps_it(trained, tmp_path):
    (tmp_path / "their.onnx").write_bytes(unet_file(network_of(trained)))
    model = load_model(tmp_path / "their.onnx")
    assert model.passport.name == "their"
    path = save_model(model, tmp_path / "ours")
    again = load_model(path)
    assert again.passport == model.passport
    assert again.network.config == model.network.config
    assert model_sha256(again) == model_sha256(model) == read_header(path).sha256
    image = torch.randn(1, 1, 32, 40)
    torch.testing.assert_close(again.network(image), model.network(image))
    told = dict(facts(read_header(path)))
    assert told["Network"] == "2D, an ONNX network, which runs as it is"
    assert "depends a little on the tile size" in told["Tiles"]


@pytest.mark.usefixtures("own_library")
def test_into_the_library(trained, tmp_path):
    (tmp_path / "cells.onnx").write_bytes(unet_file(network_of(trained), (64, 64)))
    assert import_model(tmp_path / "cells.onnx") == "cells"
    model = load_model("cells")
    assert model.network.config.fixed_shape == (64, 64)
    assert "cannot be fine-tuned" in model.passport.description


def test_the_real_file_gives_its_test_output(shared_data):
    folder = shared_data / "checkpoints" / "bioimageio_unet2d_nuclei_broad"
    model = load_model(folder / "weights.onnx")
    image = np.load(folder / "test_input.npy").astype(np.float32)
    image = (image - image.mean()) / (image.std() + 1e-6)
    with torch.inference_mode():
        found = model.network(torch.from_numpy(image)).sigmoid().numpy()
    np.testing.assert_allclose(found, np.load(folder / "test_output.npy"), atol=1e-5)


def file_of(
    nodes=None, image=(1, 1, None, None), result=(1, 1, None, None), more=(), **kinds
) -> bytes:
    nodes = nodes or [node("Conv", ["x", "w"], ["y"])]
    inputs = [value_info("x", image, kinds.get("takes", 1)), *more]
    outputs = [value_info("y", result, kinds.get("gives", 1))]
    return onnx_file(nodes, [tensor("w", ONE)], inputs, outputs)


def unfit():
    other = value_info("z", [1, 1, None, None])
    yield "two inputs", file_of([node("Add", ["x", "z"], ["y"])], more=[other]), "2 inp"
    double = file_of([node("Relu", ["x"], ["y"])], takes=DOUBLE, gives=DOUBLE)
    yield "double", double, "not float32"
    plane = file_of([node("Relu", ["x"], ["y"])], (1, 64, 64), (1, 64, 64))
    yield "no channels", plane, "float.* of 3 axes"
    last = file_of([node("Relu", ["x"], ["y"])], (1, 64, 64, 3), (1, 64, 64, 3))
    yield "channels last", last, "channels last"
    several = file_of(image=(4, 1, 64, 64), result=(4, 1, 64, 64))
    yield "batch", several, "4 images at once"
    unknown = file_of([node("Relu", ["x"], ["y"])], (1, None, None, None))
    yield "unknown channels", unknown, "how many channels"
    classes = [node("ArgMax", ["x"], ["y"], axis=1)]
    yield "labels", file_of(classes, gives=INT64), "gives tensor.int64"
    half = [node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])]
    yield "smaller", file_of(half), "32 x 33 pixels of 64 x 66"
    one = [node("GlobalAveragePool", ["x"], ["y"])]
    yield "one number", file_of(one, result=(1, 1, 1, 1)), "as many as the image has"
    missing = [node("Conv", ["x", "nothing"], ["y"])]
    yield "incomplete", file_of(missing), "onnxruntime refuses"
    channels = [node("Conv", ["x", "w"], ["y"], group=7)]
    yield "contradictory", file_of(channels), "onnxruntime refuses|network failed"


@pytest.mark.parametrize(
    ("content", "expected"),
    [pytest.param(content, text, id=name) for name, content, text in unfit()],
)
def test_other_networks_are_refused(content, expected):
    with pytest.raises(BadModel, match=expected) as caught:
        import_onnx(content, "other")
    assert len(str(caught.value)) < 500


def test_what_is_hostile_is_refused_before_onnxruntime_sees_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert read_graph(small()).nodes
    for name, content, expected in hostile_onnx():
        start = time.perf_counter()
        with pytest.raises(BadModel) as caught:
            import_onnx(content, "hostile")
        assert re.search(expected, str(caught.value)), (name, caught.value)
        assert time.perf_counter() - start < 2, name


@pytest.mark.parametrize(
    "content", [pytest.param(content, id=name) for name, content in heavy_onnx()]
)
def test_what_computes_without_measure_is_refused(content):
    start = time.perf_counter()
    with pytest.raises(BadModel):
        import_onnx(content, "heavy")
    assert time.perf_counter() - start < 10


def test_what_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(onnx_models, "TRIAL_SECONDS", 0.2)
    kernel = np.zeros((16, 16, 31, 31), np.float32)
    weights = [tensor("v", kernel[:, :1]), tensor("w", kernel), tensor("u", kernel[:1])]
    nodes, last = [node("Conv", ["x", "v"], ["c0"], pads=[15] * 4)], "c0"
    for step in range(1, 200):
        nodes.append(node("Conv", [last, "w"], [f"c{step}"], pads=[15] * 4))
        last = f"c{step}"
    nodes.append(node("Conv", [last, "u"], ["y"], pads=[15] * 4))
    start = time.perf_counter()
    with pytest.raises(BadModel, match="seconds for a small image"):
        import_onnx(onnx_file(nodes, weights, IMAGE, RESULT), "slow")
    assert time.perf_counter() - start < 5


def test_a_damaged_file_is_refused_or_another_network(trained):
    """Cut or changed at any place, it never does more than raise `BadModel`."""
    content = unet_file(network_of(trained, depth=1, base_channels=2))
    random = np.random.default_rng(0)
    places = random.choice(len(content), 60, replace=False)
    for place in places:
        with pytest.raises(BadModel):
            import_onnx(content[:place], "cut")
    read, messages = 0, []
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(random.integers(8))
        try:
            import_onnx(bytes(flipped), "flipped")
            read += 1  # a weight, or a name
        except BadModel as error:
            messages.append(str(error))
    assert read
    assert messages
    assert max(map(len, messages)) < 500


def test_without_onnxruntime_it_says_what_to_install(trained, tmp_path, monkeypatch):
    path = tmp_path / "their.onnx"
    path.write_bytes(unet_file(network_of(trained)))
    ours = save_model(load_model(path), tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for file in (path, ours):
        with pytest.raises(BadModel, match=r'pip install "napari-unet\[onnx\]"'):
            load_model(file)
    assert read_header(ours).config.kind == "onnx"  # the library lists it


def test_a_forged_file_of_ours_is_checked_too(trained, tmp_path):
    model = import_onnx(unet_file(network_of(trained)), "cells")
    content = next(c for name, c, _ in hostile_onnx() if name == "ONNX outside")
    model.network.graph = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    path = save_model(model, tmp_path / "forged")
    with pytest.raises(BadModel, match="in another file"):
        load_model(path)
