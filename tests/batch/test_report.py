"""The report and the tables say what happened, to people and to programs."""

import csv
import io
import shutil
from html import escape
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from batch_cases import make_job, run, run_well
from cli_cases import squares, threshold_model, write_image
from PIL import Image

from napari_unet.batch.job import SegmentSettings
from napari_unet.batch.report import MOST_PICTURES, describe_methods
from napari_unet.batch.tables import find_outliers
from napari_unet.batch.thumbnail import OUTLINE, make_thumbnail
from napari_unet.files.images import ImageFile
from napari_unet.models.library import load_model


class Page(HTMLParser):
    """Checks that every tag is closed, and collects texts and links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_needs_nothing_else_and_runs_nothing(place):
    shutil.rmtree(place / "in")
    for name in ("<script>alert(1)<∕script>.tif", '" onload="x.tif', "&amp;.tif"):
        write_image(place / "in" / name, squares(1))
    (place / "in" / "<b>bad.tif").write_bytes(b"no image")
    report = run(make_job(place, measure=True))
    text = report.report.read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "b>bad.tif"})
    assert page.texts.count("&amp;.tif") == 2
    outside = [link for link in page.links if not link.startswith("data:image/jpeg;")]
    assert outside == ["measurements.csv", "summary.csv"]
    order = [text.index(f"<h2>{title}") for title in ("Failed", "Pictures", "Settings")]
    assert order == sorted(order)
    assert len(page.links) == 2 + 3
    assert any("0.5, as recommended" in told for told in page.texts)


def test_settings_are_put_in_words(place):
    settings = SegmentSettings(channels=(0,), split_touching=True)
    pixel_size = {"Y": 0.5, "X": 0.25}
    job = make_job(place, settings=settings, pixel_size=pixel_size)
    texts = Page(run_well(job).report.read_text()).texts
    told = dict(pairwise(texts))
    assert told["channels"] == "0"
    assert told["pixel size"] == "Y 0.5 µm, X 0.25 µm"
    assert told["split touching"] == "yes"


def test_the_methods_sentence_names_what_matters(place):
    report = run_well(make_job(place))
    model = load_model(report.job.model)
    told = describe_methods(report.job, model)
    for words in (
        "napari-unet 0.",
        "Ronneberger et al. 2015",
        "2D model threshold, version 1",
        report.job.model_sha256,
        "probability threshold of 0.5",
        "torch 2.",
        "MICCAI 2015",
    ):
        assert words in told
    assert escape(told) in report.report.read_text()


def test_not_more_pictures_than_a_browser_likes(place, monkeypatch):
    monkeypatch.setattr("napari_unet.batch.report.MOST_PICTURES", 4)
    shutil.rmtree(place / "in")
    for i in range(9):
        write_image(place / "in" / f"a{i}.tif", squares(4 if i == 7 else 1))
    page = Page(run_well(make_job(place)).report.read_text())
    names = [text for text in page.texts if text.endswith(".tif")][:4]
    assert names == ["a7.tif", "a0.tif", "a3.tif", "a6.tif"]
    assert "4 of 9 images." in page.texts
    assert MOST_PICTURES == 200


@pytest.mark.parametrize(
    ("values", "far"),
    [
        ([], []),
        ([1, 2, 900], []),
        ([5, 5, 5, 5, 6], []),
        ([5, 5, 5, 5, 8], []),
        ([5, 5, 5, 5, 9], [4]),
        ([100, 102, 98, 101, 99, 0], [5]),
        ([100, 110, 90, 120, 80], []),
        ([100, 110, 90, 120, 80, 200], [5]),
    ],
)
def test_outliers_are_far_from_the_median(values, far):
    assert [i for i, out in enumerate(find_outliers(values, 1)) if out] == far


def test_the_summary_flags_what_is_unusual(place):
    shutil.rmtree(place / "in")
    for i in range(6):
        write_image(place / "in" / f"{i}.tif", squares(4 if i == 2 else 0, (40, 60)))
    run_well(make_job(place))
    with open(place / "out" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["outlier"] for row in rows] == [
        *("", "", "objects and area covered", "", "", "")
    ]
    assert rows[0]["mean_area_px"] == ""
    assert rows[2]["mean_area_px"] == "64.0"


def test_measurements_of_all_files_in_one_table(place):
    stack = np.stack([squares(1), squares(2)])
    write_image(place / "in" / "=movie.tif", stack, "TYX")
    run_well(make_job(place, measure=True))
    with open(place / "out" / "measurements.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["frame"], row["label"]) for row in rows] == [
        ("'=movie.tif", "0", "1"),
        ("'=movie.tif", "1", "2"),
        ("'=movie.tif", "1", "3"),
        ("a0.tif", "", "1"),
        ("a1.tif", "", "1"),
        ("a1.tif", "", "2"),
        *(("a2.tif", "", str(i)) for i in (1, 2, 3)),
    ]
    assert {row["area_px"] for row in rows} == {"64"}
    assert {row["area_um2"] for row in rows} == {"16.0"}
    assert {row["mean_intensity"] for row in rows} == {"1000.0"}


def test_measurements_name_the_channels_as_the_file_does(place):
    shutil.rmtree(place / "in")
    (place / "in").mkdir()
    planes = np.stack([squares(2), squares(1) // 2])
    for name, options in (
        ("a.ome.tif", {"Channel": {"Name": ["DAPI", "=GFP,\n2"]}}),
        ("b.ome.tif", {}),
    ):
        tifffile.imwrite(
            place / "in" / name,
            planes,
            ome=True,
            photometric="minisblack",
            metadata={"axes": "CYX", **options},
        )
    run_well(make_job(place, measure=True, settings={"channels": (0,)}))
    with open(place / "out" / "measurements.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["a.ome.tif"] * 2 + ["b.ome.tif"] * 2
    assert rows[0]["mean_intensity_DAPI"] == rows[2]["mean_intensity_0"] == "1000.0"
    assert rows[0]["mean_intensity_=GFP, 2"] == rows[2]["mean_intensity_1"] == "500.0"
    assert rows[0]["mean_intensity_0"] == rows[2]["mean_intensity_DAPI"] == ""
    assert not any(name.startswith("=") for name in rows[0])


def test_volumes_have_volumes(place):
    threshold_model(place / "m.safetensors", ndim=3)
    shutil.rmtree(place / "in")
    stack = np.stack([squares(1)] * 8)
    write_image(place / "in" / "z.tif", stack, "ZYX", spacing=2.0)
    run_well(make_job(place, measure=True))
    with open(place / "out" / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["mean_volume_vx"] == "512.0"
    assert row["mean_volume_um3"] == "256.0"


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((40, 60), "YX"),
        ((60, 40), "XY"),
        ((3, 40, 60), "CYX"),
        ((5, 3, 40, 60), "TCYX"),
        ((5, 40, 60), "ZYX"),
        ((40, 60, 4), "YXS"),
        ((600, 900), "YX"),
        ((1, 2), "YX"),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "bool"])
def test_thumbnails_of_all_shapes(shape, axes, dtype):
    data = np.zeros(shape, dtype)
    left = "".join(axis for axis in axes if axis not in "CS")
    lengths = dict(zip(axes, shape, strict=True))
    labels = np.zeros([lengths[axis] for axis in left], np.uint32)
    labels[..., : lengths["X"] // 2] = 1
    if dtype == "float32":
        data[...] = np.nan
    elif dtype == "float64":
        data[...] = np.linspace(0, 1e200, data.size).reshape(shape)
    picture = Image.open(
        io.BytesIO(make_thumbnail(ImageFile(data, axes), labels, left))
    )
    step = -(-max(lengths["Y"], lengths["X"]) // 256)
    assert picture.size == (-(-lengths["X"] // step), -(-lengths["Y"] // step))
    if axes != "XY" and lengths["X"] > 2:
        columns = np.asarray(picture)[
            picture.size[1] // 2, lengths["X"] // step // 2 - 2 :
        ]
        distance = abs(columns[:4].astype(int) - OUTLINE).max(axis=1)
        assert distance.min() < 130
