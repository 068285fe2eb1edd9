"""The benchmark of batches computes what it says, and counts it."""

import tifffile
from cli_cases import threshold_model

from napari_unet import load_model, segment
from napari_unet.files.images import read_image


def test_both_do_the_same_work(load, tmp_path):
    model = threshold_model(tmp_path / "m.safetensors")
    benchmark = load("batch_throughput")
    benchmark.measure(tmp_path, 5, 96, str(model), with_table=True)
    loaded = load_model(str(model))
    images = sorted(tmp_path.glob("in?/*.tif"))
    assert len(images) == 6  # two rounds of three
    found = set()
    for path in images:
        image = tifffile.imread(path)
        labels = read_image(
            tmp_path / path.parent.name.replace("in", "out") / path.name
        )
        expected = segment(image, loaded)
        assert (labels.data == expected).all()
        found.add((expected.tobytes(), int(expected.max())))
    assert len(found) == 3  # different images, the same in both rounds
    assert max(count for _, count in found) > 5


def test_it_compares_both(load, tmp_path, capsys):
    model = threshold_model(tmp_path / "m.safetensors")
    ratio = load("batch_throughput").main(
        ["--files", "5", "--side", "64", "--model", str(model), "--measure"]
    )
    told = capsys.readouterr().out
    assert told.startswith("6 files of 64 x 64 uint16, model ")
    assert f"the batch reaches {ratio:.0%} of the engine's own rate" in told
