"""The loop of corrections, on small parts of the real images."""

import csv

import numpy as np
import pytest
from skimage.io import imread, imsave


@pytest.fixture(scope="module")
def human_loop(load):
    return load("human_loop")


@pytest.fixture(scope="module")
def crops(shared_data, tmp_path_factory):
    """Three frames of each sequence, and four images of stained tissue, cut small."""
    folder = tmp_path_factory.mktemp("data")
    for sequence in ("01", "02"):
        for frame in ("t000", "t002", "t004"):
            for kind in ("images", "labels"):
                part = f"dic_hela/{sequence}/{kind}/{frame}.tif"
                cut(shared_data / part, folder / part)
    for part in ("train", "val"):
        with (shared_data / "dsb2018" / part / "index.csv").open() as file:
            rows = list(csv.DictReader(file))
        rows = [row for row in rows if row["kind"] == "rgb"][:2]
        rows.append(rows[0] | {"image": "not-there.png", "kind": "gray"})
        for row in rows[:2]:
            name = row["image"]
            for file in (f"images/{name}", f"labels/{name[:-4]}.tif"):
                file = f"dsb2018/{part}/{file}"
                cut(shared_data / file, folder / file)
        with (folder / "dsb2018" / part / "index.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def cut(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    image = imread(source)
    top, left = (side // 2 - 64 for side in image.shape[:2])
    part = image[top : top + 128, left : left + 128]
    imsave(target, part, check_contrast=False)


@pytest.mark.parametrize("images", ["dic_hela", "histology"])
def test_the_table_has_a_row_for_each_round(human_loop, crops, capsys, images):
    options = ["--steps", "2", "--rounds", "1,2", "--test-limit", "1"]
    human_loop.main([images, *options, "--data", str(crops)])
    title, _, _, *rows = capsys.readouterr().out.splitlines()
    assert title == f"{images}: AP at IoU 0.5 on 1 images never revealed"
    rows = [[float(cell) for cell in row.split()] for row in rows]
    assert [row[0] for row in rows] == [0, 1, 2]
    assert len(rows[0]) == 3
    assert rows[0][1] == rows[0][2]  # the model as it is
    for _, ap, steps, _, other_ap, other_steps, _ in rows[1:]:
        assert 0 <= ap <= 1
        assert 0 <= other_ap <= 1
        assert steps == other_steps == 2


def test_what_is_tested_on_is_never_revealed(human_loop, shared_data):
    for read, shape in (
        (human_loop.read_dic_hela, (512, 512)),
        (human_loop.read_histology, (256, 320, 3)),
    ):
        revealed, test = read(shared_data)
        assert min(len(revealed), len(test)) >= 8
        seen = {one.image.tobytes() for one in revealed}
        assert not any(one.image.tobytes() in seen for one in test)
        for one in (*revealed, *test):
            assert one.image.shape[: len(shape)] == shape
            assert one.labels.shape == shape[:2]
            assert np.any(one.labels)
