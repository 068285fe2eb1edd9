"""Real files: all intact ones are read right, no hostile one does harm."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from child_reader import needs_limits, read_in_child

from napari_unet.errors import BadInput
from napari_unet.files.images import read_image

# Valid files that we refuse, and why.
REFUSED = {
    # YCbCr with subsampled colours outside of JPEG: tifffile cannot decode it.
    "12monkeys__planar-yuv410-jpeg-uncompressed.tif": "chroma subsampling",
    "12monkeys__planar-yuv420-jpeg-lzw.tif": "chroma subsampling",
    "12monkeys__planar-yuv420-jpeg-uncompressed.tif": "chroma subsampling",
    "12monkeys__planar-yuv422-bt601-lzw.tif": "chroma subsampling",
    "12monkeys__planar-yuv422-bt601-uncompressed.tif": "chroma subsampling",
    "12monkeys__planar-yuv422-jpeg-uncompressed.tif": "chroma subsampling",
    # The JPEG of TIFF 6.0, withdrawn in 1995.
    "libtiff__ojpeg_zackthecat_subsamp22_single_strip.tiff": "Not a JPEG file",
}

# Axes that the contents of the files call for, where they are not plain.
AXES = {
    "12monkeys__BigTIFFSubIFD4.tif": "ZYXS",
    "12monkeys__colormap-with-extrasamples.tif": "CYX",
    "12monkeys__extra-channels.tif": "CYX",
    "12monkeys__flower-separated-planar-08.tif": "CYX",
    "12monkeys__planar-yuv444-jpeg-lzw.tif": "CYX",
    "imagetiff__cmyk-3c-32b-float.tiff": "CYX",
    "imagetiff__extra_bits_gray_8b.tiff": "CYX",
    "pillow__multipage.tiff": "ZYX",
    "pillow__tiff_tiled_cmyk_jpeg.tif": "CYX",
    "tlnagy__shapes_tiled_multi.tif": "ZYXS",
    "master/multifile-Z1.ome.tiff": "ZYX",
    "multi-channel.ome.tif": "CYX",
    "time-series.ome.tif": "TYX",
    "z-series.ome.tif": "ZYX",
    "TSeries-camp-005_Cycle00001_Ch1_000001.ome.tif": "TCYX",
    "xyc_16bit__nuclei_tubulin_crop.tif": "CYX",
    "xyc_16bit__nup_nuclei.tif": "CYX",
    "xyt_8bit__em_fly_eye.tif": "TYX",
    "xyz_8bit__nucleus.tif": "ZYX",
    "xyzc_16bit__spots.tif": "ZCYX",
}

PIXEL_SIZES = {
    "xyzc_16bit__spots.tif": {"Z": 0.4, "Y": 0.0941345, "X": 0.0941345},
    "xy_8bit__em_mitochondria_er.tif": {"Y": 0.008, "X": 0.008},
    "xy_16bit_labels__nuclei.tif": {"Y": 0.35, "X": 0.35},
    "xy_12bit__saturated_plant.tif": {"Y": 2.485923, "X": 2.485923},
    "batch_process__xy_8bit__mitocheck_incenp_t1.tif": {"Y": 0.1, "X": 0.1},
    "xyz_8bit__nucleus.tif": {},
    "imagetiff__predictor-3-rgb-f32.tif": {},
}

# libtiff converts these to RGB; tifffile's values are checked all the same.
CONVERTED_BY_LIBTIFF = {
    "12monkeys__flower-separated-planar-08.tif",
    "12monkeys__planar-yuv444-jpeg-lzw.tif",
    "imagetiff__cmyk-3c-32b-float.tiff",
    "pillow__tiff_tiled_cmyk_jpeg.tif",
}


def intact_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for part in ("tiff_unusual", "imagej_dims")
        for path in (folder / part).rglob("*.tif*")
    )


def without_nan(pixels: np.ndarray) -> np.ndarray:
    return np.nan_to_num(pixels) if pixels.dtype.kind == "f" else pixels


def same_up_to_one_move(left: np.ndarray, right: np.ndarray) -> bool:
    """Compare arrays of which one may have its samples in another place."""
    places = range(right.ndim)
    moved = [np.moveaxis(right, i, j) for i in places for j in places]
    same = (m.shape == left.shape and np.array_equal(m, left) for m in moved)
    return left.dtype == right.dtype and any(same)


def test_intact_files_have_the_pixels_of_the_reference_readers(shared_data):
    paths = intact_files(shared_data)
    assert len(paths) > 120
    wrong, by_libtiff = [], 0
    for path in paths:
        if path.name in REFUSED:
            with pytest.raises(BadInput, match=REFUSED[path.name]):
                read_image(path)
            continue
        image = read_image(path)
        with tifffile.TiffFile(path) as tiff:
            reference = tiff.series[0].asarray()
        plain = "YXS" if reference.ndim == 3 else "YX"
        key = f"{path.parent.name}/{path.name}"
        if image.axes != AXES.get(key, AXES.get(path.name, plain)):
            wrong.append((key, "axes", image.axes))
        reference, data = without_nan(reference), without_nan(image.data)
        if not same_up_to_one_move(data, reference):
            wrong.append((key, "tifffile", image.data.shape))
        # libtiff is another implementation; it reads the first page.
        if path.name in CONVERTED_BY_LIBTIFF:
            continue
        first = without_nan(imagecodecs.tiff_decode(path.read_bytes(), index=0))
        if data.size > first.size:
            data = data.reshape(-1, *first.shape)[0]
        by_libtiff += 1
        if not same_up_to_one_move(data, first):
            wrong.append((key, "libtiff", first.shape))
    assert wrong == []
    assert by_libtiff > 100


def test_pixel_sizes_of_real_files(shared_data):
    found = {
        path.name: read_image(path).pixel_size
        for path in intact_files(shared_data)
        if path.name in PIXEL_SIZES
    }
    assert found.keys() == PIXEL_SIZES.keys()
    for name, expected in PIXEL_SIZES.items():
        assert found[name] == pytest.approx(expected, rel=1e-5), name


def test_notes_on_parts_of_larger_images(shared_data):
    folder = shared_data / "tiff_unusual" / "ome" / "multiples" / "master"
    whole = read_image(folder / "multifile-Z1.ome.tiff")
    assert (whole.axes, whole.data.shape, whole.notes) == ("ZYX", (5, 24, 18), ())
    for z in range(2, 6):
        part = read_image(folder / f"multifile-Z{z}.ome.tiff")
        assert np.array_equal(part.data, whole.data[z - 1])
        assert "multifile-Z1.ome.tiff" in part.notes[0]


def test_other_real_images_are_read_without_notes(shared_data):
    """Whole folders of ordinary data: no false alarm."""
    count = 0
    for folder in ["dic_hela", "phase_t98g", "stardist_sample", "ovules3d"]:
        for path in sorted((shared_data / folder).rglob("*.tif*")):
            image = read_image(path)
            assert np.array_equal(image.data, tifffile.imread(path)), path
            assert all("name all its axes" in note for note in image.notes), path
            count += 1
    assert count > 50


@needs_limits
def test_hostile_files_do_no_harm(shared_data):
    results = read_in_child(shared_data / "tiff_hostile")
    assert len(results) > 100
    for name, result in results.items():
        message = result["outcome"]
        assert result["s"] < 3, name
        assert message == "read" or message.startswith(name), message
        assert "Traceback" not in message
        assert "\n" not in message
        assert len(message) < 400
    refused = sum(result["outcome"] != "read" for result in results.values())
    assert refused > 80
    assert max(result["kB"] for result in results.values()) < 300_000


@needs_limits
def test_forged_headers_are_refused_with_numbers_before_memory_is_taken(tmp_path):
    words = {}
    for width in (60_000, 400_000):
        for compression in ("none", "zlib", "lzw", "zstd", "packbits"):
            name = f"{width}-{compression}.tif"
            write_forged(tmp_path / name, width, compression)
            words[name] = f"{width}×{width}"
            assert (tmp_path / name).stat().st_size < 300
    words["60000-none.tif"] = "7.2 GB"
    words["400000-none.tif"] = "320 GB"
    # zstd has no highest ratio: the image could be constant, so memory decides.
    del words["60000-zstd.tif"], words["400000-zstd.tif"]
    results = read_in_child(tmp_path)
    for name, result in results.items():
        assert result["outcome"].startswith(name)
        assert words.get(name, "") in result["outcome"]
        assert result["kB"] < 300_000, name


def write_forged(path: Path, width: int, compression: str) -> None:
    """Write a tiny file whose header claims a square of 16-bit pixels."""
    tifffile.imwrite(
        path,
        np.zeros((4, 4), "u2"),
        compression=None if compression == "none" else compression,
        metadata=None,
        software=False,
    )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages.first.tags
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            if tags[name].dtype != tifffile.DATATYPE.LONG:
                tags[name].overwrite(width, dtype="I")
            else:
                tags[name].overwrite(width)
