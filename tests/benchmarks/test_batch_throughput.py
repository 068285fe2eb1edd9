"""The benchmark of batches runs and counts what it says."""

from cli_cases import threshold_model


def test_it_compares_both(load, tmp_path, capsys):
    model = threshold_model(tmp_path / "m.safetensors")
    ratio = load("batch_throughput").main(
        ["--files", "5", "--side", "64", "--model", str(model), "--measure"]
    )
    assert ratio > 0
    told = capsys.readouterr().out
    assert told.startswith("6 files of 64 x 64 uint16, model ")
    assert "of the engine's own rate" in told
