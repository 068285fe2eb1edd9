"""bioimage.io packages on the command line."""

import zipfile

import numpy as np
import pytest
import tifffile
import yaml
from cli_cases import call, threshold_model


@pytest.fixture
def run(capsys, own_library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threshold_model(tmp_path / "spots.safetensors", (0.5, 0.5))
    call(capsys, "models", "import", "spots.safetensors")
    return lambda *arguments: call(capsys, "models", *arguments)


def description(path):
    with zipfile.ZipFile(path) as archive:
        return yaml.safe_load(archive.read("rdf.yaml"))


def test_out_and_in_again(run, tmp_path):
    tifffile.imwrite("two.tif", np.zeros((2, 40, 30), np.uint16))
    told = run("export", "spots", "spots.zip", "--author", "Ada", "--author", "Grace")
    assert told == (0, "Exported to spots.zip\n", "")
    names = [author["name"] for author in description("spots.zip")["authors"]]
    assert names == ["Ada", "Grace"]
    # A folder, or a name without an ending, says nothing of the format.
    (tmp_path / "out").mkdir()
    result = run(
        *("export", "spots", "out", "--format", "bioimageio"),
        *("--license", "MIT", "--image", "two.tif"),
    )
    assert result.out == "Exported to out/spots.zip\n"
    assert description("out/spots.zip")["license"] == "MIT"
    assert run("export", "spots", "x", "--format", "bioimageio").out.endswith("x.zip\n")
    assert run("export", "spots", "spots.zip").code == 4
    assert run("import", "spots.zip", "--name", "again").out.startswith(
        "Imported as again: 2D  cell (objects)"
    )
    info = [run("info", name).out for name in ("spots", "again", "spots.zip")]
    assert info[0] == info[1] == info[2]


def test_mistakes(run):
    assert run("export", "spots", "given", "--license", "MIT") == (
        1,
        "",
        "Error: Authors, a license and an image are for bioimage.io packages: add "
        "--format bioimageio, or leave them out.\n",
    )
    wrong = run("export", "spots", "a.zip", "--license", "mine")
    assert (wrong.code, wrong.err.count("no license 'mine'")) == (1, 1)
    offline = run("import", "http://127.0.0.1:9/cells.zip")
    assert offline.code == 1
    assert "cannot be reached" in offline.err
    assert run("import", "missing.zip").code == 2
