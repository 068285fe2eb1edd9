"""How the channels of an image are called, where its file says so."""

import json

import numpy as np
import pytest
import tifffile

from napari_unet.files.images import read_image
from napari_unet.files.measurements import measure
from napari_unet.files.outputs import write_probabilities

PLANES = np.zeros((2, 16, 24), np.uint16)


def write_ome(path, names, planes=PLANES, axes="CYX"):
    metadata = {"axes": axes, "Channel": {"Name": names}}
    tifffile.imwrite(
        path, planes, ome=True, metadata=metadata, photometric="minisblack"
    )
    return path


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (["DAPI", "GFP"], ("DAPI", "GFP")),
        (["", "GFP"], ("0", "GFP")),
        (["", ""], ()),
        (["a\n b", "µ" * 100], ("a b", "µ" * 60)),
    ],
)
def test_ome_tiff(tmp_path, told, names):
    image = read_image(write_ome(tmp_path / "a.ome.tif", told))
    assert image.axes == "CYX"
    assert image.channel_names == names


def test_names_belong_to_the_axis_of_the_file(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", ["DAPI", "GFP"])
    assert read_image(path, "ZYX").channel_names == ()
    assert read_image(path, "CYX").channel_names == ("DAPI", "GFP")
    # A stack of which a part was told to be the channels.
    stack = write_ome(
        tmp_path / "b.ome.tif", ["DAPI", "GFP"], np.zeros((2, 2, 9, 9), "u1"), "TCYX"
    )
    assert read_image(stack, "CTYX").channel_names == ()
    one = write_ome(tmp_path / "c.ome.tif", ["DAPI"], PLANES[0], "YX")
    assert read_image(one).channel_names == ()


def test_ome_zarr(tmp_path):
    path = tmp_path / "a.ome.zarr"
    probabilities = np.zeros((2, 16, 24), np.float32)
    write_probabilities(
        path,
        probabilities,
        axes="CYX",
        pixel_size={},
        class_names=["no", "cell"],
    )
    assert read_image(path).channel_names == ("no", "cell")
    told = json.loads((path / ".zattrs").read_text())
    for channels in (None, "x", [{}], [1, 2], [{"label": 3}, {}]):
        told["omero"] = {"channels": channels}
        (path / ".zattrs").write_text(json.dumps(told))
        assert read_image(path).channel_names == ()


def test_other_files_name_no_channels(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PLANES, imagej=True, metadata={"axes": "CYX"})
    image = read_image(path)
    assert (image.axes, image.channel_names) == ("CYX", ())


def test_they_head_the_columns(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", ["DAPI", "=1+1"])
    image = read_image(path)
    table = measure(
        np.ones((16, 24), np.uint8),
        image.data,
        label_axes="YX",
        image_axes=image.axes,
        channel_names=image.channel_names,
    )
    assert [name for name in table if name.startswith("mean_")] == [
        "mean_intensity_DAPI",
        "mean_intensity_=1+1",
    ]
