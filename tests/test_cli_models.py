"""The commands of the library: import, export, rename, remove, restore."""

from datetime import date, timedelta

import pytest
import torch
from cli_cases import call, hashes, threshold_model, threshold_network

from napari_unet.models.checkpoint import read_model


@pytest.fixture
def library(own_library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return own_library


@pytest.fixture
def run(capsys, library):
    return lambda *arguments: call(capsys, "models", *arguments)


@pytest.fixture
def file(tmp_path):
    return threshold_model(tmp_path / "spots.safetensors", (0.5, 0.5))


def test_in_and_out_again(run, file, library, tmp_path):
    result = run("import", file)
    assert result == (0, "Imported as spots: 2D  cell (objects)  0.5 x 0.5 µm\n", "")
    assert run("import", file, "--name", "cells").out.startswith("Imported as cells: ")
    assert run("import", file).out.startswith("Imported as spots-2: ")
    assert run("export", "cells", "given").out == "Exported to given.safetensors\n"
    assert hashes(library)["cells.safetensors"] == hashes(tmp_path)["given.safetensors"]
    assert run("export", "cells", "given").code == 4
    assert run("export", "cells", "given", "--overwrite").code == 0
    assert run("export", "nuclei", library).code == 4


def test_a_program_is_converted_with_trust_only(run, library, tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"epoch": 3, "network": threshold_network()}, whole)
    refused = run("import", whole)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("Error: whole.pt cannot be used. It asks for napari_")
    assert refused.err.endswith(
        "`napari-unet models import --trust` takes them out of it.\n"
    )
    assert hashes(library) == {}
    result = run("import", whole, "--trust", "--name", "cells")
    assert result == (0, "Imported as cells: 2D  object (objects)\n", "")
    assert read_model(library / "cells.safetensors").network.config.depth == 1
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(whole.read_bytes()[:-9])
    assert run("import", damaged, "--trust").err.count("is incomplete") == 1


def test_rename_remove_restore(run, file, library):
    run("import", file, "--name", "cells")
    run("rename", "cells", "my cells")
    until = date.today() + timedelta(days=30)
    removed = run("remove", "my cells")
    assert removed.code == 0
    assert removed.out == (
        f"Removed my cells. Until {until} it comes back with: "
        "napari-unet models restore 'my cells'\n"
    )
    lines = run("list").out.splitlines()
    assert lines[-1] == f"my cells  removed  kept until {until}"
    assert run("restore", "my cells").out == "my cells is back in the library\n"
    assert read_model(library / "my cells.safetensors").passport.classes


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("import none.pt", 2, "Cannot read the checkpoint"),
        ("import spots.safetensors --name nuclei", 1, "There is a model 'nuclei'"),
        ("import spots.safetensors --name a/b", 1, "The name is also a file's"),
        ("export none out", 2, "There is no model 'none' in the library"),
        ("export nuclei none/out", 4, "Cannot write none/out.safetensors: the folder"),
        ("rename nuclei mine", 1, "'nuclei' came with napari-unet and stays"),
        ("rename none mine", 2, "There is no model 'none' in the library"),
        ("remove nuclei", 1, "'nuclei' came with napari-unet and stays"),
        ("remove none", 2, "There is no model 'none' in the library"),
        ("restore none", 2, "There is no removed model 'none'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_code(
    run, file, library, arguments, code, sentence
):
    result = run(*arguments.split())
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith(f"Error: {sentence}")
    assert result.err.count("\n") == 1
    assert hashes(library) == {}


@pytest.mark.parametrize("command", ["import", "export", "rename", "remove", "restore"])
def test_help_says_what_a_command_does(run, command):
    assert "Example: napari-unet models" in run(command, "--help").out
    assert run(command).code == 1
