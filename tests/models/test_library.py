"""The library: names, the user's folder, and what is said of an unknown name."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_unet.errors import BadInput, BadModel, BadOutput, UnetError
from napari_unet.models import library, trash
from napari_unet.models.checkpoint import (
    model_sha256,
    read_header,
    read_model,
    save_model,
)
from napari_unet.models.library import (
    correct_model,
    export_model,
    import_model,
    is_bundled,
    library_dir,
    list_models,
    load_model,
    name_problem,
    plain_name,
    rename_model,
)
from napari_unet.models.model import Model
from napari_unet.models.trash import list_removed, remove_model, restore_model


@pytest.fixture
def home(own_library, tmp_path, monkeypatch):
    """The user's folder and one bundled model in folders of their own."""
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(library, "BUNDLED", bundled)
    monkeypatch.chdir(tmp_path)
    return own_library.parent


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
        # What was fine-tuned from it, and batches made with it, know it by this.
        assert model_sha256(model) == read_header(path).sha256


# --- import, export, rename ---------------------------------------------------


@pytest.fixture
def filled(home, file):
    """A bundled model and one of the user."""
    shutil.copy(file, library.BUNDLED / "nuclei.safetensors")
    library_dir().mkdir(parents=True)
    shutil.copy(file, library_dir() / "mine.safetensors")
    return library_dir()


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_import_copies_and_leaves_the_source_alone(home, file, model):
    before = file.read_bytes()
    assert import_model(file) == "small"
    assert import_model(file) == "small-2"
    assert import_model(str(file), "cells") == "cells"
    assert file.read_bytes() == before
    assert list(list_models()) == ["cells", "small", "small-2"]
    loaded = load_model("cells")
    weights = loaded.network.state_dict()
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_an_unnamed_model_is_named_others_keep_their_hash(home, file, model, tmp_path):
    assert load_model(import_model(file)).passport.name == "small"
    named = Model(
        model.network, model.passport.model_copy(update={"name": "by others"})
    )
    other = save_model(named, tmp_path / "other")
    assert model_sha256(load_model(import_model(other))) == model_sha256(named)


def test_a_file_without_suffix_called_as_a_model_is_the_file(filled, other, tmp_path):
    shutil.move(save_model(other, tmp_path / "x"), tmp_path / "nuclei")
    got = import_model("nuclei")
    assert got == "nuclei-2"
    bias = load_model(got).network.head.bias
    assert torch.equal(bias, other.network.head.bias)


@pytest.mark.parametrize("name", ["mine", "Mine", "nuclei", "a/b", "", ".x", "x" * 101])
def test_names_that_cannot_be(filled, file, name):
    shutil.copy(file, filled / "third.safetensors")
    before = contents(filled)
    assert name_problem(name)
    with pytest.raises(BadInput):
        import_model(file, name)
    with pytest.raises(BadInput):
        rename_model("third", name)
    assert contents(filled) == before


def test_a_failed_import_leaves_nothing(filled, tmp_path, monkeypatch, file):
    before = contents(filled)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadModel):
        import_model(tmp_path / "bad.safetensors")

    def fail(model, path):
        raise BadOutput("The disk is full.")

    monkeypatch.setattr(library, "save_model", fail)
    with pytest.raises(BadOutput):
        import_model(file)
    assert contents(filled) == before


def test_a_killed_import_leaves_no_model_and_its_rest_is_swept(filled, file):
    code = (
        "import os, signal, sys\n"
        "from napari_unet.models import library\n"
        "library.move_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "library.import_model(sys.argv[1], 'cells')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (filled / "cells.safetensors").unlink()  # its name, reserved a moment before
    assert list(list_models()) == ["mine", "nuclei"]
    assert len(list(filled.iterdir())) == 2  # with what the import has left
    import_model(file, "cells")
    names = sorted(path.name for path in filled.iterdir())
    assert names == ["cells.safetensors", "mine.safetensors"]


def test_of_two_imports_at_once_both_arrive_under_names_of_their_own(filled, file):
    """Each either gets a name of its own or is refused; none replaces another."""

    def bring(_):
        try:
            return import_model(file)
        except BadInput:
            return None

    with ThreadPoolExecutor(4) as pool:
        names = [name for name in pool.map(bring, range(12)) if name]
    assert len(names) == len(set(names)) >= 1
    assert set(list_models()) == {*names, "mine", "nuclei"}
    for name in names:
        load_model(name)


def test_export_is_a_copy_that_is_never_written_over_another_file(filled, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    written = export_model("mine", out / "given.v2")
    assert written == out / "given.v2.safetensors"
    assert written.read_bytes() == (filled / "mine.safetensors").read_bytes()
    assert export_model("nuclei", out) == out / "nuclei.safetensors"
    (out / "nuclei.safetensors").write_text("something else")
    with pytest.raises(BadOutput, match="exists already"):
        export_model("nuclei", out)
    assert (out / "nuclei.safetensors").read_text() == "something else"
    export_model("nuclei", out, overwrite=True)
    assert read_model(out / "nuclei.safetensors").passport.classes


def test_export_says_why_it_cannot(filled, tmp_path):
    with pytest.raises(BadModel, match="no model 'cells'"):
        export_model("cells", tmp_path / "x")
    with pytest.raises(BadOutput, match="the folder does not exist"):
        export_model("mine", tmp_path / "none" / "x")
    for folder in (filled, library.BUNDLED):
        with pytest.raises(BadOutput, match="is the library itself"):
            export_model("mine", folder / "x", overwrite=True)
    (filled / "mine.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadModel):
        export_model("mine", tmp_path / "x")
    assert not (tmp_path / "x.safetensors").exists()


def test_rename_keeps_the_hash(filled, file):
    before = model_sha256(load_model("mine"))
    rename_model("mine", "cells")
    assert list(list_models()) == ["cells", "nuclei"]
    assert model_sha256(load_model("cells")) == before
    rename_model("cells", "Cells")
    assert list(list_models()) == ["Cells", "nuclei"]


def test_what_came_with_the_program_stays(filled):
    before = contents(library.BUNDLED)
    assert is_bundled("nuclei")
    assert not is_bundled("mine")
    for change in (
        lambda: rename_model("nuclei", "cells"),
        lambda: remove_model("nuclei"),
        lambda: correct_model("nuclei", {"citation": "me"}),
    ):
        with pytest.raises(BadInput, match="came with napari-unet"):
            change()
    assert contents(library.BUNDLED) == before


@given(text=st.text(max_size=300))
def test_a_plain_name_is_plain(text):
    name = plain_name(text)
    assert name == "" or not library._FORBIDDEN.search(name)
    assert name == name.strip(" .")
    assert len(name.encode()) <= 80


def test_an_imported_file_may_have_any_name(home, file, tmp_path):
    name = "ünïcode " * 20
    odd = shutil.copy(file, tmp_path / f"{name}.safetensors")
    for _ in range(2):
        assert load_model(import_model(odd)).passport.classes


# --- facts --------------------------------------------------------------------


def test_facts_are_corrected_in_the_copy(filled, file):
    weights = load_model("mine").network.state_dict()
    first = read_header(filled / "mine.safetensors").sha256
    correct_model("mine", {"pixel_size": (0.5, 0.5), "citation": "Me, 2026"})
    second = read_header(filled / "mine.safetensors").sha256
    model = load_model("mine")
    assert model.passport.pixel_size == (0.5, 0.5)
    assert model.passport.citation == "Me, 2026"
    assert model.passport.former_sha256 == (first,)
    assert model_sha256(model) == second != first
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    correct_model("mine", {"object_diameter": 12.0})
    assert load_model("mine").passport.former_sha256 == (first, second)


def test_facts_that_stay_the_same_change_nothing(filled):
    before = contents(filled)
    correct_model("mine", {"citation": "", "object_diameter": None})
    assert contents(filled) == before


@pytest.mark.parametrize(
    "facts",
    [
        {"pixel_size": "large"},
        {"pixel_size": (0.5, 0.5, 0.5)},
        {"classes": ()},
        {"normalization": {"method": "guess"}},
        {"colour": "red"},
    ],
)
def test_facts_that_cannot_be(filled, facts):
    before = contents(filled)
    with pytest.raises(UnetError):
        correct_model("mine", facts)
    assert contents(filled) == before


# --- the trash ----------------------------------------------------------------


def test_what_is_removed_comes_back(filled):
    before = contents(filled)
    removed = remove_model("mine")
    assert list(list_models()) == ["nuclei"]
    assert list(list_removed()) == ["mine"]
    assert read_model(removed.path).passport.classes
    with pytest.raises(BadModel, match="no model 'mine'"):
        remove_model("mine")
    restore_model("mine")
    assert contents(filled) == before
    with pytest.raises(BadModel, match=r"no removed model 'mine' \(there are: none\)"):
        restore_model("mine")


def test_the_last_one_of_a_name_comes_back_and_replaces_nothing(filled, other):
    remove_model("mine")
    save_model(other, filled / "mine")
    remove_model("mine")
    restore_model("mine")
    assert model_sha256(load_model("mine")) == model_sha256(other)
    with pytest.raises(BadInput, match="There is a model 'mine'"):
        restore_model("mine")
    rename_model("mine", "newer")
    restore_model("mine")
    assert list(list_models()) == ["mine", "newer", "nuclei"]
    assert list_removed() == {}


def test_the_trash_keeps_for_30_days(filled, file, monkeypatch):
    now, day = time.time_ns(), 24 * 3600 * 10**9
    shutil.copy(file, filled / "old.safetensors")
    monkeypatch.setattr(trash.time, "time_ns", lambda: now - 29 * day)
    remove_model("mine")
    monkeypatch.setattr(trash.time, "time_ns", lambda: now - 31 * day)
    shutil.copy(file, filled / "older.safetensors")
    remove_model("older")
    (filled / "trash" / "notes.txt").write_text("not of the library")
    monkeypatch.setattr(trash.time, "time_ns", lambda: now)
    assert list(list_removed()) == ["mine", "older"]
    remove_model("old")
    assert list(list_removed()) == ["mine", "old"]
    assert (filled / "trash" / "notes.txt").exists()


def test_a_library_that_cannot_be_written(filled, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "no")

    before = contents(filled)
    monkeypatch.setattr(library.os, "replace", refuse)
    for change in (
        lambda: remove_model("mine"),
        lambda: rename_model("mine", "cells"),
    ):
        with pytest.raises(BadOutput, match="you are not allowed to write there"):
            change()
    assert contents(filled) == before
