"""The family tree: who was fine-tuned from whom, also after names and facts change."""

import shutil

import pytest

from napari_unet.errors import BadModel
from napari_unet.models import library
from napari_unet.models.checkpoint import model_sha256, read_header, save_model
from napari_unet.models.description import facts, summary
from napari_unet.models.family import family_trees, history
from napari_unet.models.library import (
    correct_model,
    library_dir,
    load_model,
    rename_model,
)
from napari_unet.models.model import Model, TrainingRecord
from napari_unet.models.trash import remove_model, restore_model


@pytest.fixture
def family(own_library, tmp_path, monkeypatch, trained):
    """Fine-tuned in this order: nuclei > cells > best, nuclei > other; and alone."""
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(library, "BUNDLED", bundled)
    library_dir().mkdir(parents=True)
    base = trained()
    save_model(base, bundled / "nuclei")
    save_model(named(trained(), "alone"), library_dir() / "alone")
    fine_tune("nuclei", "cells")
    fine_tune("nuclei", "other")
    fine_tune("cells", "best")
    return library_dir()


def named(model: Model, name: str) -> Model:
    return Model(model.network, model.passport.model_copy(update={"name": name}))


def fine_tune(parent: str, name: str) -> None:
    """Save a child as fine-tuning does, with its record."""
    model = load_model(parent)
    record = TrainingRecord(
        date="2026-11-20",
        data="2 annotated images",
        steps=40,
        scores={"F1@0.5": 0.78, "old F1@0.5": 0.61},
        parent_sha256=model_sha256(model),
    )
    update = {
        "name": name,
        "history": (*model.passport.history, record),
        "former_sha256": (),
    }
    child = Model(model.network, model.passport.model_copy(update=update))
    save_model(child, library_dir() / name)


def shape(branches):
    return {branch.entry.name: shape(branch.children) for branch in branches}


WHOLE = {"alone": {}, "nuclei": {"cells": {"best": {}}, "other": {}}}


def test_children_are_below_what_they_were_fine_tuned_from(family):
    assert shape(family_trees()) == WHOLE


def test_history_is_what_came_before_and_after(family):
    ancestors, branch = history("cells")
    assert ancestors == ("nuclei",)
    assert shape([branch]) == {"cells": {"best": {}}}
    assert history("best")[0] == ("nuclei", "cells")
    assert history("nuclei")[0] == ()
    with pytest.raises(BadModel, match="no model 'x'"):
        history("x")


def test_the_tree_follows_names_and_facts(family):
    rename_model("cells", "kidney")
    assert shape(family_trees())["nuclei"] == {"kidney": {"best": {}}, "other": {}}
    correct_model("kidney", {"citation": "me"})
    correct_model("kidney", {"citation": "me and others"})
    assert shape(family_trees())["nuclei"] == {"kidney": {"best": {}}, "other": {}}
    fine_tune("kidney", "newest")
    children = shape(family_trees())["nuclei"]["kidney"]
    assert children == {"best": {}, "newest": {}}


def test_the_nearest_ancestor_that_is_there_counts(family):
    remove_model("cells")
    assert shape(family_trees())["nuclei"] == {"best": {}, "other": {}}
    restore_model("cells")
    assert shape(family_trees()) == WHOLE


def test_a_file_that_cannot_be_used_says_why(family):
    (family / "bad.safetensors").write_bytes(b"nothing")
    (bad,) = [b.entry for b in family_trees() if b.entry.name == "bad"]
    assert bad.header is None
    assert bad.problem.startswith("bad.safetensors is not a napari-unet checkpoint")


def test_a_copy_belongs_to_the_same_parent_and_is_no_parent_itself(family):
    shutil.copy(family / "cells.safetensors", family / "copy.safetensors")
    tree = shape(family_trees())["nuclei"]
    assert tree == {"cells": {"best": {}}, "copy": {}, "other": {}}


def test_files_that_claim_to_be_their_own_ancestors_are_listed_all_the_same(family):
    for name, parent in (("cells", "best"), ("other", "other")):
        model = load_model(name)
        record = TrainingRecord(
            date="2026-11-20",
            data="forged",
            parent_sha256=read_header(family / f"{parent}.safetensors").sha256,
        )
        passport = model.passport.model_copy(update={"history": (record,)})
        save_model(Model(model.network, passport), family / name)
    names = set()

    def collect(branches):
        for branch in branches:
            names.add(branch.entry.name)
            collect(branch.children)

    collect(family_trees())
    assert names == {"alone", "nuclei", "cells", "other", "best"}


def test_the_passport_in_words(family):
    told = dict(facts(read_header(family / "best.safetensors")))
    assert told["Finds"] == "object (objects)"
    assert told["Intensities"] == "percentiles 1 to 99.8 become 0 to 1"
    assert told["Trained"].endswith("annotated images; held-out scores: F1 0.61 → 0.78")
    assert "Citation" not in told
    assert "Pixel size" not in told


def test_a_summary_is_short(family, trained):
    save_model(trained(num_classes=19), family / "many")
    assert summary(read_header(family / "many.safetensors")) == (
        "2D  class 1 (region), class 2 (region), class 3 (region) and 15 more"
    )
