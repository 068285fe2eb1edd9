import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from napari_unet.errors import BadInput, BadModel
from napari_unet.inference.tiling import centred_input_box, tile_grid
from napari_unet.network.config import UNetConfig, config_from_dict
from napari_unet.network.program import build_program
from napari_unet.network.program_config import ProgramConfig, settings_of
from napari_unet.network.receptive_field import receptive_field

SIDES = st.integers(1, 300)
SETTINGS = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.integers() | st.text() | st.lists(st.integers()),
    max_size=3,
)


@st.composite
def configs(draw, *, is_fixed=None):
    ndim = draw(st.sampled_from([2, 3]))
    fixed, shrink = None, 0
    if draw(st.booleans()) if is_fixed is None else is_fixed:
        shrink = draw(st.integers(0, 40))
        fixed = tuple(2 * shrink + draw(SIDES) for _ in range(ndim))
    return ProgramConfig(
        kind=draw(st.sampled_from(["onnx", "smp"])),
        in_channels=draw(st.integers(1, 9)),
        num_classes=draw(st.integers(1, 9)),
        ndim=ndim,
        alignment=draw(st.sampled_from([1, 8, 32])),
        minimum=draw(st.integers(1, 100)),
        fixed_shape=fixed,
        shrink=shrink,
        halo=draw(st.integers(0, 200)),
        outputs=draw(st.sampled_from(["logits", "probabilities"])),
        settings=settings_of(draw(SETTINGS)),
    )


@given(configs())
def test_a_config_survives_its_file(config):
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    for name, value in config.settings:
        assert again.option(name) == value


@given(configs(is_fixed=False), st.integers(1, 500))
def test_input_sides_are_legal(config, at_least):
    side = receptive_field(config).input_size(at_least)
    assert side >= max(at_least, config.minimum)
    assert side % config.alignment == 0
    assert side - max(at_least, config.minimum, config.alignment) < config.alignment


@given(st.data())
def test_tiles_of_one_shape_fit_with_their_context(data):
    config = data.draw(configs(is_fixed=True))
    starts = [data.draw(st.integers(0, 100)) for _ in range(config.ndim)]
    region = [slice(a, a + data.draw(st.integers(1, 700))) for a in starts]
    beyond = data.draw(st.sampled_from([0, 50]))
    shape = config.tile_shape(region, [part.stop + beyond for part in region])
    assume(min(config.output_shape) >= config.alignment)
    tiles = tile_grid(region, shape, config.alignment)
    index = data.draw(st.integers(0, len(tiles) - 1))
    overlap = [
        min(n, side // 2) for n, side in zip(config.overlaps, shape, strict=True)
    ]
    kept = tiles[index].grown(overlap, region)
    start, stop, offset = centred_input_box(kept, config)
    for axis in range(config.ndim):
        assert stop[axis] - start[axis] == config.fixed_shape[axis]
        assert (start[axis] + config.shrink) % config.alignment == 0
        assert start[axis] + config.shrink + offset[axis] == kept.start[axis]
        assert offset[axis] >= 0
        assert offset[axis] + kept.shape[axis] <= config.output_shape[axis]


WRONG = {
    "kind": "torchscript",
    "in_channels": 0,
    "num_classes": 10**9,
    "ndim": 4,
    "alignment": 2.0,
    "minimum": True,
    "fixed_shape": [64],
    "shrink": 5,
    "halo": -1,
    "outputs": "masks",
    "base_channels": "64",
    "settings": ["output"],
    "code": "import os",
}


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_a_wrong_config_is_refused(name, value):
    values = ProgramConfig("onnx", 1, 2).to_dict() | {name: value}
    with pytest.raises(BadModel, match=name):
        config_from_dict(values)


@pytest.mark.parametrize("sides", [[64, -1], [64, "64"], [8, 64], [1 << 40, 64]])
def test_a_wrong_shape_is_refused(sides):
    values = ProgramConfig("onnx", 1, 2).to_dict()
    with pytest.raises(BadModel, match="fixed_shape"):
        config_from_dict(values | {"fixed_shape": sides, "shrink": 4})


def test_a_u_net_has_no_kind():
    config = UNetConfig(depth=2)
    assert config_from_dict(config.to_dict()) == config


def test_only_square_tiles_are_turned():
    flat = ProgramConfig("onnx", 1, 2, fixed_shape=(64, 96))
    flat.check_turned(False)
    with pytest.raises(BadInput, match=r"64 x 96 pixels only.*averaging"):
        flat.check_turned(True)
    volume = ProgramConfig("onnx", 1, 2, ndim=3, fixed_shape=(16, 96, 96))
    volume.check_turned(True)


@pytest.mark.parametrize("kind", ["onnx", "smp"])
def test_without_its_tensors_there_is_no_program(kind):
    settings = settings_of({"encoder_name": "https://host/model"})
    config = ProgramConfig(kind, 1, 2, settings=settings)
    with pytest.raises(BadModel, match="Get the file again"):
        build_program(config, {})
