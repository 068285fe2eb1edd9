"""A job survives its file; what is wrong with one is said in words."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_unet.batch.job import BatchJob, SegmentSettings
from napari_unet.errors import BadInput

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
NAME = TEXT.filter(lambda text: text and not set(text) & {"/", "\\"})
SETTINGS = st.builds(
    SegmentSettings,
    threshold=st.none() | st.floats(0, 1),
    minimal_size=st.none() | st.integers(0, 10**9),
    split_touching=st.none() | st.booleans(),
    channels=st.none() | st.lists(st.integers(0, 9), max_size=4).map(tuple),
    precision=st.sampled_from(["auto", "float32"]),
    test_time_augmentation=st.booleans(),
    device=TEXT,
    tile=st.none() | st.integers(1, 4096),
)
JOBS = st.builds(
    BatchJob,
    input=NAME.map(lambda name: Path("/data") / name),
    output=NAME.map(lambda name: Path("/out") / name),
    model=st.sampled_from(["nuclei", "/models/my model.safetensors"]),
    model_sha256=st.sampled_from(["", "0a" * 32]),
    pattern=st.none() | NAME,
    recursive=st.booleans(),
    axes=st.none() | st.sampled_from(["ZYX", "CYX"]),
    pixel_size=st.none()
    | st.dictionaries(st.sampled_from("ZYX"), st.floats(1e-6, 1e6), min_size=1),
    settings=SETTINGS,
    format=st.sampled_from(["tif", "ome.tif", "ome.zarr"]),
    probabilities=st.booleans(),
    measure=st.booleans(),
    versions=st.dictionaries(TEXT, TEXT, max_size=3),
)


@given(job=JOBS)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=30,
)
def test_what_is_saved_is_loaded(tmp_path, job):
    path = job.save(tmp_path / "job.yaml")
    assert BatchJob.load(path) == job


@pytest.mark.skipif(os.name != "posix", reason="names that are not text")
def test_names_that_are_not_text_survive(tmp_path):
    folder = Path(os.fsdecode(b"/data/\xff\xfe images"))
    job = BatchJob(input=folder, output=tmp_path, model="m")
    assert BatchJob.load(job.save(tmp_path / "job.yaml")).input == folder


def test_relative_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text(
        "batch_job: 1\ninput: ../in\noutput: out\nmodel: models/m.safetensors\n"
    )
    monkeypatch.chdir("/")
    job = BatchJob.load(tmp_path / "job.yaml")
    assert job.input == tmp_path / "../in"
    assert job.output == tmp_path / "out"
    assert job.model == str(tmp_path / "models/m.safetensors")


def test_a_name_in_the_library_is_no_path(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "batch_job: 1\ninput: in\noutput: out\nmodel: nuclei\n"
    )
    assert BatchJob.load(tmp_path / "job.yaml").model == "nuclei"


GOOD = "batch_job: 1\ninput: in\noutput: out\nmodel: nuclei\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a batch job"),
        ("[1, 2]", "is not a batch job"),
        ("just words", "is not a batch job"),
        ("input: in\noutput: out\nmodel: m\n", "no line 'batch_job: 1'"),
        (GOOD.replace("1", "2"), "written by a newer napari-unet; update"),
        (GOOD.replace("1", "one"), "no line 'batch_job: 1'"),
        ("batch_job: 1\ninput: in\n", "output: field required"),
        (GOOD + "colour: red\n", "colour: extra inputs are not permitted"),
        (GOOD + "pattern: a/b\n", "pattern: it is compared with names of files"),
        (GOOD + "pattern: *.tif\n", "line 5: .*needs quotes"),
        (GOOD + "format: png\n", "format: input should be 'tif'"),
        (GOOD + "pixel_size: {Y: .nan}\n", "pixel_size.Y: input should be"),
        (GOOD + "pixel_size: {W: 1}\n", "pixel_size.W"),
        (GOOD + "model_sha256: ../../x\n", "model_sha256: string should match"),
        (GOOD + "settings: {threshold: 2}\n", "settings.threshold: input should be"),
        (GOOD + "settings: {tile: 0}\n", "settings.tile: input should be"),
        (GOOD + "measure: perhaps\n", "measure: input should be a valid boolean"),
        (GOOD + "axes: 2020-01-01\n", "axes: input should be a valid string"),
        (GOOD + "axes: !!python/object/apply:os.system ['true']\n", "not a job that"),
        (GOOD + "measure: [\n", "is not a job that can be read"),
        (BOMB + GOOD, "line 2: it refers to another part"),
        ("[" * 200_000, "is not a job that can be read"),
        ("#" * 1_000_001, "too large"),
        ("batch_job: 1\n\x00", "is not a job that can be read"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        BatchJob.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        BatchJob.load(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="Cannot read the job"):
        BatchJob.load(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"batch_job: 1\nmodel: \xff\n")
    with pytest.raises(BadInput, match="is not a job that can be read"):
        BatchJob.load(tmp_path / "a.yaml")


def test_the_fingerprint_depends_on_what_the_results_depend_on():
    job = BatchJob(input="in", output="out", model="m")

    def changed(**options):
        other = job.model_copy(update=options)
        return other.fingerprint(is_exact=True) != job.fingerprint(is_exact=True)

    assert not changed(input=Path("x"), output=Path("y"), pattern="*", recursive=True)
    assert not changed(settings=SegmentSettings(device="cpu", tile=64))
    assert changed(settings=SegmentSettings(threshold=0.25))
    assert changed(settings=SegmentSettings(precision="float32"))
    for option in (
        {"model_sha256": "1" * 64},
        {"axes": "ZYX"},
        {"pixel_size": {"Y": 1.0}},
        {"format": "ome.tif"},
        {"probabilities": True},
        {"measure": True},
        {"versions": {"torch": "3"}},
    ):
        assert changed(**option), option


def test_the_tile_size_counts_only_for_models_whose_result_depends_on_it():
    job = BatchJob(input="in", output="out", model="m")
    other = job.model_copy(update={"settings": SegmentSettings(tile=64)})
    assert other.fingerprint(is_exact=True) == job.fingerprint(is_exact=True)
    assert other.fingerprint(is_exact=False) != job.fingerprint(is_exact=False)
