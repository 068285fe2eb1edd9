"""The library: names, the user's folder, and what is said of an unknown name."""

import shutil

import pytest
import torch

from napari_unet.errors import BadModel
from napari_unet.models import library
from napari_unet.models.checkpoint import model_sha256, read_model, save_model
from napari_unet.models.library import library_dir, list_models, load_model


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folder and one bundled model in folders of their own."""
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(library, "BUNDLED", bundled)
    monkeypatch.setenv("NAPARI_UNET_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def other(trained):
    other = trained()
    with torch.no_grad():
        other.network.head.bias += 1
    return other


def test_the_folder_is_where_the_variable_says(home):
    assert library_dir() == home / "models"
    assert not library_dir().exists()
    assert list_models() == {}


def test_without_the_variable_it_is_the_platforms(monkeypatch):
    monkeypatch.delenv("NAPARI_UNET_HOME", raising=False)
    assert library_dir().name == "models"
    assert "napari-unet" in str(library_dir())


def test_names_of_bundled_and_own_models(home, file):
    library_dir().mkdir(parents=True)
    shutil.copy(file, library_dir() / "zebra.safetensors")
    shutil.copy(file, library_dir() / "with.dots 1.2.safetensors")
    shutil.copy(file, library.BUNDLED / "ape.safetensors")
    (library_dir() / "notes.txt").write_text("no model")
    assert list(list_models()) == ["ape", "with.dots 1.2", "zebra"]
    for name in list_models():
        assert model_sha256(load_model(name)) == model_sha256(read_model(file))


def test_the_users_model_hides_the_bundled_one(home, file, other):
    library_dir().mkdir(parents=True)
    shutil.copy(file, library.BUNDLED / "nuclei.safetensors")
    assert model_sha256(load_model("nuclei")) == model_sha256(read_model(file))
    save_model(other, library_dir() / "nuclei")
    assert model_sha256(load_model("nuclei")) == model_sha256(other)


def test_a_path_is_a_path(home, file, other):
    library_dir().mkdir(parents=True)
    save_model(other, library_dir() / "small")
    assert model_sha256(load_model(file)) == model_sha256(read_model(file))
    assert model_sha256(load_model(str(file))) == model_sha256(read_model(file))
    assert model_sha256(load_model("small")) == model_sha256(other)


def test_an_unknown_name_lists_what_there_is(home, file):
    with pytest.raises(BadModel, match=r"no model 'cells' .*there are: none\)"):
        load_model("cells")
    for name in ("ape", "bee"):
        shutil.copy(file, library.BUNDLED / f"{name}.safetensors")
    with pytest.raises(BadModel, match=r"no model 'cells' .*there are: ape, bee\)"):
        load_model("cells")


def test_a_folder_of_that_name_is_no_model(home, tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(BadModel, match="no model 'cells'"):
        load_model("cells")


def test_a_missing_path_is_named(home, tmp_path):
    with pytest.raises(BadModel, match=r"missing\.safetensors.*Check the path"):
        load_model(tmp_path / "missing.safetensors")


def test_bundled_models_load():
    for path in library.BUNDLED.glob("*.safetensors"):
        model = read_model(path)
        assert model.passport.classes
        assert not model.network.training
