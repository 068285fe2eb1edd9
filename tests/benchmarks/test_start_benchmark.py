"""The benchmark of starting measures what it says."""

import sys
import warnings

import pytest

from napari_unet import load_model, segment

pytest.importorskip("resource", reason="the benchmark needs a Unix")


def test_a_click_finds_the_objects(
    load, make_napari_viewer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path))
    benchmark = load("start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of napari's own start
        viewer = make_napari_viewer()
    result = benchmark.click(viewer, 320)
    image = benchmark.sample(320)
    assert viewer.layers["nuclei"].data.shape == image.shape == (320, 320)
    assert result.objects == segment(image, load_model("nuclei")).max() > 20
    waited = result.pixels.waited, result.network.waited
    assert min(result.dock, result.model, *waited) > 0
    assert result.longest_pause <= result.pixels.waited
    assert result.pixels.processor > 0
    benchmark.report_clicks([result], [result], 320)
    assert f"to {result.objects} objects" in capsys.readouterr().out
    assert viewer.layers["nuclei objects"].scale.tolist() == [0.325, 0.325]


def test_a_dock_is_opened_and_loaded(load, make_napari_viewer, tmp_path, monkeypatch):
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of napari's own start
        viewer = make_napari_viewer()
    opened = load("start").open_dock(viewer, "Models")
    assert "Models (napari-unet)" in viewer.window.dock_widgets
    assert opened.dock.waited > 0
    assert opened.dock.processor > 0
    assert opened.pause > 0


def test_napari_starts_without_what_is_hidden(load):
    plugins = load("start").in_child("napari", "napari-unet")["plugins"]
    assert "napari" in plugins
    assert "napari-unet" not in plugins


def test_both_take_turns(load):
    benchmark, turns = load("start"), []

    def take(name, seconds):
        turns.append(name)
        return benchmark.Spent(2 * seconds / len(turns), seconds / len(turns))

    pair = benchmark.compare(lambda: take("ours", 12), lambda: take("bare", 6), 2)
    assert turns == ["ours", "bare"] * 3
    # The first round does not count.
    assert [spent.processor for spent in pair.ours] == [4, 2.4]
    assert [spent.processor for spent in pair.bare] == [1.5, 1]
    assert pair.least("waited") == (4800, 2000)
    assert "adds 1400,  2.40 times" in str(pair)


def test_it_measures_another_process(load):
    loop = "import time\nwhile time.process_time() < 0.2: pass"
    spent = load("start").spent_on([sys.executable, "-c", loop])
    assert spent.waited > 0.2
    assert spent.processor > 0.19
