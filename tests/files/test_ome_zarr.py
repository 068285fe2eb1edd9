"""OME-Zarr of both versions: what is in it, and what it must not do."""

import json
import math
import os
import pickle
from pathlib import Path

import dask.array
import numcodecs
import numpy as np
import pytest
import zarr

from napari_unet.errors import BadInput
from napari_unet.files.images import read_image

PIXELS = np.random.default_rng(0).integers(1, 999, (2, 3, 20, 30)).astype("u2")

AXES = [
    {"name": "c", "type": "channel"},
    {"name": "z", "type": "space", "unit": "micrometer"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "nanometer"},
]


def scale(*factors: float) -> dict:
    return {"coordinateTransformations": [{"type": "scale", "scale": list(factors)}]}


def write(path: Path, version: str = "0.5", pixels: np.ndarray = PIXELS, **options):
    """Write a two-level image; the metadata are those of the specification."""
    zarr_format = 3 if version == "0.5" else 2
    axes = options.pop("axes", AXES)
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    datasets = []
    for level in (0, 1):
        step = 2**level
        array = group.create_array(
            str(level),
            data=pixels[..., ::step, ::step],
            chunks=(1,) * (pixels.ndim - 2) + (8, 16),
            **options,
        )
        assert array.ndim == len(axes)
        factors = (1, 2.0, 0.5 * step, 250.0 * step)[-pixels.ndim :]
        datasets.append({"path": str(level), **scale(*factors)})
    image = {"axes": axes, "datasets": datasets, "name": "image"}
    image |= scale(*(1, 1, 2, 1)[-pixels.ndim :])
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [{**image, "version": "0.4"}]
    return group


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("0.4", {}),
        ("0.4", {"compressors": numcodecs.LZ4()}),
        ("0.4", {"compressors": None}),
        ("0.5", {}),
        ("0.5", {"shards": (1, 1, 16, 32)}),
        ("0.5", {"compressors": None}),
        ("0.5", {"compressors": zarr.codecs.GzipCodec()}),
    ],
)
def test_finest_level_axes_and_pixel_size(tmp_path, version, options):
    write(tmp_path / "a.zarr", version, **options)
    image = read_image(tmp_path / "a.zarr")
    assert np.array_equal(image.data, PIXELS)
    assert image.data.dtype == PIXELS.dtype
    assert image.axes == "CZYX"
    assert image.pixel_size == pytest.approx({"Z": 2, "Y": 1, "X": 0.25})
    assert image.notes == ()
    part = read_image(tmp_path / "a.zarr", axes="TZYX")
    assert part.axes == "TZYX"
    with pytest.raises(BadInput, match="4 dimensions"):
        read_image(tmp_path / "a.zarr", axes="YX")


@pytest.mark.parametrize("dtype", ["bool", "i1", "u1", ">u2", "f2", "f4", ">f8", "i8"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_dtypes(tmp_path, dtype, version):
    pixels = (PIXELS % 2).astype(dtype)
    write(tmp_path / "a.zarr", version, pixels)
    image = read_image(tmp_path / "a.zarr")
    assert np.array_equal(image.data, pixels)
    assert image.data.dtype == np.dtype(dtype).newbyteorder("=")


def test_missing_levels(tmp_path):
    path = tmp_path / "a.zarr"
    write(path, "0.4")
    (path / "0" / ".zarray").unlink()
    image = read_image(path)
    assert np.array_equal(image.data, PIXELS[..., ::2, ::2])
    assert image.pixel_size == pytest.approx({"Z": 2, "Y": 2, "X": 0.5})
    assert "level 1 is used" in image.notes[0]
    (path / "1" / ".zarray").unlink()
    with pytest.raises(BadInput, match="none of its 2 resolution levels"):
        read_image(path)


def test_units_are_needed_for_a_pixel_size(tmp_path):
    axes = [
        {**axis, "unit": "parsec"} if axis["name"] == "y" else axis for axis in AXES
    ]
    axes[3] = {"name": "x", "type": "space"}
    write(tmp_path / "a.zarr", axes=axes)
    assert read_image(tmp_path / "a.zarr").pixel_size == {"Z": 2}


def test_real_image_and_its_labels(shared_data):
    path = shared_data / "ome_zarr" / "plate_well_B03_mip.zarr"
    image = read_image(path)
    assert image.axes == "CYX"
    assert image.pixel_size == pytest.approx({"Y": 1.3, "X": 1.3})
    array = zarr.open_array(path / "2", mode="r")
    assert np.array_equal(image.data, array[:, 0])
    labels = read_image(path / "labels" / "nuclei")
    assert labels.axes == "YX"
    assert labels.data.dtype.kind == "u"
    assert labels.data.max() > 10


def test_large_images_are_lazy(tmp_path, leave_memory):
    write(tmp_path / "a.zarr")
    leave_memory(5000)
    image = read_image(tmp_path / "a.zarr")
    assert isinstance(image.data, dask.array.Array)
    assert image.data.dtype == PIXELS.dtype
    assert np.array_equal(image.data[1, :, 3:9].compute(), PIXELS[1, :, 3:9])
    damage(tmp_path / "a.zarr" / "0" / "c")
    with pytest.raises(BadInput, match=r"a\.zarr"):
        image.data.compute()
    leave_memory(100)
    with pytest.raises(BadInput, match="one chunk needs 256 bytes"):
        read_image(tmp_path / "a.zarr")


def damage(folder: Path) -> None:
    """Cut one chunk of an array in half."""
    chunk = sorted(path for path in folder.rglob("*") if path.is_file())[-1]
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_damaged_chunk(tmp_path, version, compressed):
    options = {} if compressed else {"compressors": None}
    write(tmp_path / "a.zarr", version, **options)
    damage(tmp_path / "a.zarr" / "0" / ("c" if version == "0.5" else ""))
    with pytest.raises(BadInput, match=r"^a\.zarr"):
        read_image(tmp_path / "a.zarr")


@pytest.mark.parametrize("max_bytes", [None, 0], ids=["in memory", "lazy"])
def test_chunks_that_are_not_stored_are_told(tmp_path, max_bytes):
    write(tmp_path / "a.zarr")
    chunk = tmp_path / "a.zarr" / "0" / "c" / "0" / "0" / "0" / "0"
    chunk.unlink()
    image = read_image(tmp_path / "a.zarr", max_bytes=max_bytes)
    assert not np.asarray(image.data[0, 0, :8, :16]).any()
    assert "1 of 36 chunks are not stored" in image.notes[0]


class Gadget:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def poison(path: Path, version: str, canary: Path, **changes) -> None:
    """Replace parts of an array's metadata, and its chunks by a pickle."""
    write(path, version)
    file = path / "0" / ("zarr.json" if version == "0.5" else ".zarray")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for chunk in (path / "0").rglob("*"):
        if chunk.is_file() and chunk != file and not chunk.name.startswith("."):
            chunk.write_bytes(pickle.dumps(Gadget(canary)))


SHARD = {
    "name": "sharding_indexed",
    "configuration": {
        "chunk_shape": [1, 1, 8, 16],
        "codecs": [{"name": "numcodecs.pickle", "configuration": {}}],
        "index_codecs": [{"name": "bytes"}],
    },
}


@pytest.mark.parametrize(
    ("version", "changes", "words"),
    [
        ("0.4", {"compressor": {"id": "pickle"}}, "codec 'pickle'"),
        ("0.4", {"filters": [{"id": "pickle"}]}, "codec 'pickle'"),
        ("0.4", {"filters": [{"id": "pickle"}], "dtype": "|O"}, "codec 'pickle'"),
        ("0.4", {"filters": [{"id": "vlen-utf8"}], "dtype": "|O"}, "'vlen-utf8'"),
        ("0.4", {"dtype": "|O", "compressor": None}, r"kind '\|O'"),
        ("0.4", {"dtype": "<U5"}, "kind '<U5'"),
        ("0.4", {"dtype": "<M8[ns]"}, "kind '<M8"),
        ("0.4", {"dtype": [["a", "<u2"]]}, "structured"),
        ("0.4", {"dtype": "<c8"}, "take the magnitude first"),
        ("0.5", {"codecs": [{"name": "numcodecs.pickle"}]}, "codec 'pickle'"),
        ("0.5", {"codecs": [SHARD]}, "codec 'pickle'"),
        ("0.5", {"codecs": ["pickle"]}, "codec 'pickle'"),
        ("0.5", {"codecs": None}, "codec 'none'"),
        ("0.5", {"data_type": "string"}, "kind 'string'"),
        ("0.5", {"data_type": "complex64"}, "take the magnitude first"),
        ("0.5", {"data_type": {"name": "struct"}}, "structured"),
    ],
)
def test_nothing_is_run_and_no_chunk_read(
    tmp_path, monkeypatch, version, changes, words
):
    # As in older versions of numcodecs, so that it is our refusal that is tested;
    # the gadget is our own and only makes a folder.
    monkeypatch.setattr(
        numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False
    )
    canary = tmp_path / "canary"
    poison(tmp_path / "a.zarr", version, canary, **changes)
    with pytest.raises(BadInput, match=words):
        read_image(tmp_path / "a.zarr")
    assert not canary.exists()
    # The trap is a live one: the codec that the file asks for would run it.
    numcodecs.get_codec({"id": "pickle"}).decode(pickle.dumps(Gadget(canary)))
    assert canary.exists()


@pytest.mark.parametrize("outside", ["../secret", "/secret", "..", "0/../../secret"])
def test_paths_outside_are_refused(tmp_path, outside):
    write(tmp_path / "secret")
    write(tmp_path / "a.zarr", "0.4")
    file = tmp_path / "a.zarr" / ".zattrs"
    attributes = json.loads(file.read_text())
    attributes["multiscales"][0]["datasets"][0]["path"] = outside
    file.write_text(json.dumps(attributes))
    with pytest.raises(BadInput, match="outside its own folder"):
        read_image(tmp_path / "a.zarr")


def test_links_outside_are_refused(tmp_path):
    write(tmp_path / "secret", "0.4")
    write(tmp_path / "a.zarr", "0.4")
    (tmp_path / "a.zarr" / "0").rename(tmp_path / "old")
    (tmp_path / "a.zarr" / "0").symlink_to(tmp_path / "secret" / "0")
    with pytest.raises(BadInput, match="outside its own folder"):
        read_image(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**6, 10**6, 20, 30], "chunks": [10**6, 10**6, 8, 16]},
        {"shape": [2, 3, 0, 30]},
        {"shape": [2, 3, 20]},
        {"shape": "a"},
        {"chunks": [0, 0, 0, 0]},
        {"zarr_format": 9},
    ],
)
def test_forged_array_metadata(tmp_path, change):
    write(tmp_path / "a.zarr", "0.4")
    file = tmp_path / "a.zarr" / "0" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=r"^a\.zarr"):
        read_image(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "null",
        '{"multiscales": []}',
        '{"multiscales": [{}]}',
        '{"multiscales": [{"datasets": []}]}',
        '{"multiscales": [{"datasets": [{"path": "0"}], "axes": 5}]}',
        '{"multiscales": [{"datasets": [{"path": "0"}], "axes": ["y", "x"]}]}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_forged_group_metadata(tmp_path, content):
    write(tmp_path / "a.zarr", "0.4")
    (tmp_path / "a.zarr" / ".zattrs").write_text(content, encoding="latin-1")
    with pytest.raises(BadInput, match=r"a\.zarr"):
        read_image(tmp_path / "a.zarr")


def test_collection_names_its_images(tmp_path):
    zarr.open_group(tmp_path / "plate.zarr", mode="w", zarr_format=2)
    write(tmp_path / "plate.zarr" / "A" / "1" / "0", "0.4")
    with pytest.raises(BadInput, match="for example A/1/0"):
        read_image(tmp_path / "plate.zarr")


def test_scale_that_is_no_number(tmp_path):
    write(tmp_path / "a.zarr", "0.4")
    file = tmp_path / "a.zarr" / ".zattrs"
    for factor in ("0", "-1", "NaN", "1e999"):
        text = file.read_text().replace("250.0", factor)
        (tmp_path / "a.zarr" / ".zattrs").write_text(text)
        size = read_image(tmp_path / "a.zarr").pixel_size
        assert all(math.isfinite(value) and value > 0 for value in size.values())
        write(tmp_path / "a.zarr", "0.4")
