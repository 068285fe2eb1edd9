"""All names are known, and are different, before anything runs."""

import os
import unicodedata
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import tifffile
from batch_cases import make_job, plan_batch, run
from cli_cases import squares, write_image
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from napari_unet.batch.checks import check_plan
from napari_unet.batch.plan import Item, name_key
from napari_unet.errors import BadInput, BadOutput, UnetError
from napari_unet.files.members import list_members, state_of
from napari_unet.steps import Progress


def write_ome_zarr(path, data):
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("0", data=data)
    axes = [{"name": name, "type": "space"} for name in "zyx"[-data.ndim :]]
    scale = [{"type": "scale", "scale": [1.0] * data.ndim}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": datasets}
    ]


def names(job):
    return {
        item.name: [path.relative_to(job.output).as_posix() for path in item.outputs]
        for item in plan_batch(job)
    }


def empty(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path


def test_results_are_named_like_the_images_in_natural_order(place):
    empty(place / "in", "a10.tif", "a2.png", "b.ome.tif", ".hidden.tif", "notes.txt")
    write_ome_zarr(place / "in" / "c.ome.zarr", squares())
    job = make_job(place)
    assert names(job) == {
        "a2.png": ["a2.tif"],
        "a10.tif": ["a10.tif"],
        "b.ome.tif": ["b.tif"],
        "c.ome.zarr": ["c.tif"],
    }
    assert list(names(job)) == ["a2.png", "a10.tif", "b.ome.tif", "c.ome.zarr"]
    told = make_job(place, format="ome.zarr", probabilities=True)
    assert names(told)["b.ome.tif"] == ["b.ome.zarr", "b_probabilities.ome.zarr"]


def test_subfolders_are_mirrored_only_if_wanted(place):
    empty(place / "in", "x/y/a.tif", "x/a.tif", "a.tif", ".git/a.tif")
    os.symlink(place / "in", place / "in" / "x" / "loop")
    assert list(names(make_job(place))) == ["a.tif"]
    assert names(make_job(place, recursive=True)) == {
        "a.tif": ["a.tif"],
        "x/a.tif": ["x/a.tif"],
        "x/y/a.tif": ["x/y/a.tif"],
    }


def test_a_pattern_chooses_by_name(place):
    empty(place / "in", "a_DAPI.tif", "a_gfp.tif", "sub/É_dapi.tif", "b_dapi.txt")
    job = make_job(place, pattern="*_dapi.tif", recursive=True)
    assert list(names(job)) == ["a_DAPI.tif", "sub/É_dapi.tif"]
    decomposed = unicodedata.normalize("NFD", "é_*")
    assert list(names(make_job(place, pattern=decomposed, recursive=True))) == [
        "sub/É_dapi.tif"
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "There are no images in the folder .*/in."),
        ({"pattern": "*.png"}, r"no images like \*.png in the folder"),
        ({"recursive": True}, "in the folder .*/in and its subfolders"),
        ({"input": Path("/none")}, "/none does not exist"),
    ],
)
def test_nothing_to_do(place, options, words):
    with pytest.raises(BadInput, match=words):
        plan_batch(make_job(place).model_copy(update=options))


def test_the_input_is_an_image(place):
    empty(place, "a.tif")
    write_ome_zarr(place / "b.zarr", squares())
    for name in ("a.tif", "b.zarr"):
        with pytest.raises(BadInput, match="is an image; give the folder"):
            plan_batch(make_job(place).model_copy(update={"input": place / name}))


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (["a.tif", "a.png"], {}, "a.png and a.tif would both be named a.tif"),
        (["a.tif", "A.tiff"], {}, "would both be named"),
        (["é.tif", "e\u0301.tif"], {}, "would both be named"),
        (["ß.tif", "ss.tif"], {}, "would both be named"),
        (["a.tif", "a_probabilities.tif"], {"probabilities": True}, "would both be"),
        (
            ["a.png", "a.tif/b.png"],
            {"recursive": True},
            "a.tif would be both a folder of results",
        ),
        (["report.html/a.tif"], {"recursive": True}, "report.html would be both"),
    ],
)
def test_names_that_would_collide(place, files, options, words):
    empty(place / "in", *files)
    with pytest.raises(BadInput, match=words):
        run(make_job(place, **options))
    assert not (place / "out").exists()


def test_a_probability_name_that_is_free_without_probabilities(place):
    empty(place / "in", "a.tif", "a_probabilities.tif")
    assert len(names(make_job(place))) == 2


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("in", {}, "would lie in the same folder"),
        ("in/../in", {}, "would lie in the same folder"),
        ("link", {}, "would lie in the same folder"),
        ("in/out", {"recursive": True}, "lies inside the folder of the images"),
        ("link/deep/out", {"recursive": True}, "lies inside the folder of the images"),
        (".", {}, "The folder of the images lies inside the output"),
        ("in/a.zarr", {}, "lies inside the image"),
        ("in/a.zarr/deep", {}, "lies inside the image"),
        ("file", {}, "is not a folder"),
        ("file/deep", {}, "is not a folder"),
    ],
)
def test_folders_that_would_mix(place, output, options, words):
    empty(place, "in/a.tif", "file")
    (place / "in" / "a.tif").unlink()
    write_ome_zarr(place / "in" / "a.zarr", squares())
    os.symlink(place / "in", place / "link")
    job = make_job(place, **options).model_copy(update={"output": place / output})
    with pytest.raises(BadOutput, match=words):
        run(job)


def test_an_output_that_is_not_searched_may_lie_inside_the_input(place):
    write_image(place / "in" / "a.tif", squares())
    job = make_job(place).model_copy(update={"output": place / "in" / "out"})
    assert names(job) == {"a.tif": ["a.tif"]}
    check_plan(plan_batch(job), job.output, overwrite=False)


def test_names_that_are_too_long(place):
    empty(place / "in", "x" * 251 + ".tif")
    check_plan(plan_batch(make_job(place)), place / "out", overwrite=False)
    for options in ({"format": "ome.tif"}, {"probabilities": True}):
        with pytest.raises(BadOutput, match="the name is too long"):
            run(make_job(place, **options))


def test_existing_results_are_refused(place):
    empty(place, "in/a.tif", "out/a.tif")
    with pytest.raises(BadOutput, match="exists already; use --overwrite"):
        run(make_job(place))
    # Nobody knows what it is: there is no journal to go on from.
    with pytest.raises(BadOutput, match="exists already; use --overwrite"):
        run(make_job(place), resume=True)
    (place / "out" / "a.tif").unlink()
    os.link(place / "in" / "a.tif", place / "out" / "a.tif")
    with pytest.raises(BadOutput, match="is one of the images"):
        run(make_job(place), overwrite=True)


# --- the law -----------------------------------------------------------------------

# Few letters, so that names often collide.
LETTERS = st.sampled_from(["a", "A", "é", "e\u0301", "ß", "ss", "_probabilities", "İ"])
STEMS = st.lists(LETTERS, min_size=1, max_size=3).map("".join)
SUFFIXES = st.sampled_from([".tif", ".tiff", ".png", ".ome.tif", ".ome.zarr"])
FILES = st.builds(str.__add__, STEMS, SUFFIXES)
PATHS = st.builds(
    "/".join,
    st.lists(STEMS | FILES, max_size=2).flatmap(
        lambda folders: FILES.map(lambda name: [*folders, name])
    ),
)


@given(
    paths=st.lists(PATHS, min_size=1, max_size=6, unique=True),
    kind=st.sampled_from(["tif", "ome.tif", "ome.zarr"]),
    probabilities=st.booleans(),
)
@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=100)
def test_no_two_results_are_ever_one_file(
    tmp_path, monkeypatch, paths, kind, probabilities
):
    """What the plan lets pass is injective on every file system."""
    folder = tmp_path / "in"
    job = make_job(tmp_path, format=kind, probabilities=probabilities, recursive=True)
    found = {folder / path: [] for path in paths}

    def find_steps(job):
        yield Progress(0, 1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("napari_unet.batch.plan._find_in_folder_steps", find_steps)
        items = plan_batch(job)
    try:
        check_plan(items, job.output, overwrite=False)
    except UnetError:
        assume(False)
    keys = [
        name_key(target.relative_to(job.output).as_posix())
        for item in items
        for target in item.outputs
    ]
    assert len(set(keys)) == len(keys) == len(items) * (1 + probabilities)
    parents = {str(parent) for key in keys for parent in PurePosixPath(key).parents}
    assert not parents & set(keys)
    for item in items:
        assert all(path.is_relative_to(job.output) for path in item.outputs)


# --- images of several files -------------------------------------------------------

UUIDS = [f"urn:uuid:{i:08d}-0000-4000-8000-000000000000" for i in range(9)]


def write_set(folder, count=3, stem="t", master=False, suffix=".ome.tif"):
    """An OME-TIFF of a file for each time point; with ``master`` one describes all."""
    folder.mkdir(parents=True, exist_ok=True)
    planes = [squares(i + 1) for i in range(count)]
    files = [f"{stem}{i}{suffix}" for i in range(count)]
    blocks = "".join(
        f'<TiffData FirstT="{i}" FirstZ="0" FirstC="0" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{files[i]}">{UUIDS[i]}</UUID></TiffData>'
        for i in range(count)
    )
    height, width = planes[0].shape
    schema = 'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
    for i, name in enumerate(files):
        xml = (
            f'<?xml version="1.0"?><OME {schema} UUID="{UUIDS[i]}"><Image ID="Image:0">'
            f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16"'
            f' SizeX="{width}" SizeY="{height}" SizeZ="1" SizeC="1" SizeT="{count}">'
            '<Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
            f"{blocks}</Pixels></Image></OME>"
        )
        if master and i:
            xml = (
                f'<?xml version="1.0"?><OME {schema} UUID="{UUIDS[i]}"><BinaryOnly '
                f'MetadataFile="{files[0]}" UUID="{UUIDS[0]}"/></OME>'
            )
        tifffile.imwrite(
            folder / name, planes[i], description=xml.encode(), metadata=None
        )
    return np.stack(planes)


@pytest.mark.parametrize("suffix", [".ome.tif", ".tif", "_w1.TIFF"])
@pytest.mark.parametrize("master", [False, True])
def test_a_set_of_files_is_one_image(place, master, suffix):
    from napari_unet.files.images import read_image

    stack = write_set(place / "in", master=master, suffix=suffix)
    write_image(place / "in" / "alone.ome.tif", squares())
    first = f"t0{suffix}"
    assert list(names(make_job(place))) == ["alone.ome.tif", first]
    np.testing.assert_array_equal(read_image(place / "in" / first).data, stack)
    assert [path.name for path in list_members(place / "in" / first)] == [
        f"t{i}{suffix}" for i in range(3)
    ]


def test_a_change_in_any_file_of_a_set_is_a_change(place):
    write_set(place / "in")
    first = place / "in" / "t0.ome.tif"
    before = state_of(list_members(first))
    os.utime(place / "in" / "t2.ome.tif", ns=(0, before[1] + 10**9))
    assert state_of(list_members(first)) == (before[0], before[1] + 10**9)
    (item,) = plan_batch(make_job(place))
    assert item.state == (before[0], before[1] + 10**9)


def test_files_that_only_claim_to_belong_together_are_all_done(place):
    # The header of t0 names t1, which is another image by now.
    write_set(place / "in", count=2)
    write_image(place / "in" / "t1.ome.tif", squares(3))
    assert list(names(make_job(place))) == ["t0.ome.tif", "t1.ome.tif"]


def test_a_renamed_file_is_an_image_of_its_own(place):
    write_set(place / "in", count=1)
    (place / "in" / "t0.ome.tif").rename(place / "in" / "other.ome.tif")
    write_set(place / "in", count=1)
    assert list(names(make_job(place))) == ["other.ome.tif", "t0.ome.tif"]


def test_a_set_with_a_missing_file_is_not_split(place):
    write_set(place / "in")
    (place / "in" / "t1.ome.tif").unlink()
    assert list(names(make_job(place))) == ["t0.ome.tif", "t2.ome.tif"]


def test_a_chunk_of_a_zarr_is_a_part_of_it(place):
    write_ome_zarr(place / "in" / "a.zarr", squares())
    image = place / "in" / "a.zarr"
    size, _ = state_of(list_members(image))
    chunk = next(path for path in image.rglob("*") if path.name == "0.0")
    chunk.write_bytes(b"x" + chunk.read_bytes())
    assert state_of(list_members(image))[0] == size + 1
    assert plan_batch(make_job(place))[0].state[0] == size + 1
    assert state_of(list_members(place / "none")) == (0, 0)


def test_an_item_names_its_files():
    item = Item("a", Path("a"), Path("b"), None)
    assert item.outputs == [Path("b")]
