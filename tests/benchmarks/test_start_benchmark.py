"""The benchmark of starting measures what it says."""

import warnings

from napari_unet import load_model, segment


def test_a_click_finds_the_objects(load, make_napari_viewer, tmp_path, monkeypatch):
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path))
    benchmark = load("start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of napari's own start
        viewer = make_napari_viewer()
    result = benchmark.click(viewer, 320)
    image = benchmark.sample(320)
    assert viewer.layers["nuclei"].data.shape == image.shape == (320, 320)
    assert result.objects == segment(image, load_model("nuclei")).max() > 20
    parts = (result.dock, result.model, result.pixels, result.network)
    assert min(parts) > 0
    assert result.longest_pause <= result.pixels
    assert viewer.layers["nuclei objects"].scale.tolist() == [0.325, 0.325]


def test_napari_starts_without_what_is_hidden(load):
    plugins = load("start").in_child("napari", "napari-unet")["plugins"]
    assert "napari" in plugins
    assert "napari-unet" not in plugins


def test_both_take_turns(load):
    turns = []

    def take(name, seconds):
        turns.append(name)
        return seconds / len(turns)

    pair = load("start").compare(lambda: take("ours", 12), lambda: take("bare", 12), 2)
    assert turns == ["ours", "bare"] * 3
    assert pair.ours == [4, 2.4]  # the first round does not count
    assert pair.bare == [3, 2]
    assert round(pair.added, 3) == 0.4
    assert "adds 400 ms, 1.20 times" in str(pair)
