"""The benchmark of inference computes what it says."""

import numpy as np
import torch


def test_all_ways_find_the_same_classes(load, capsys):
    benchmark = load("inference")
    rows = benchmark.main(["--side", "272", "--model", "nuclei"])
    told = capsys.readouterr().out
    assert told.startswith("272 x 272 uint16, 1.9 M weights, ")
    assert [row.name for row in rows[:4]] == [
        "MONAI, float32",
        "MONAI, 16-bit autocast",
        "napari-unet, float32",
        "napari-unet",
    ]
    monai, monai16, exact, ours = (row.classes for row in rows[:4])
    assert 0.05 < np.mean(exact) < 0.95
    # One window each: but for what MONAI pads with zeros at the edges, the same.
    assert np.mean(monai[100:-100, 100:-100] == exact[100:-100, 100:-100]) > 0.9999
    assert np.mean(ours == exact) >= 0.999
    assert np.mean(monai16 == exact) > 0.9
    assert "napari-unet is " in told


def test_the_raw_forward_runs_the_same_network(load):
    benchmark = load("inference")
    model = benchmark.trained(4, 2, steps=1)
    assert model.passport.history[-1].steps == 1
    executor = benchmark.make_executor(model.network, torch.device("cpu"), False)
    assert benchmark.raw_seconds(np.zeros((64, 64)), executor, "cpu") > 0
