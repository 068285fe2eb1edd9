"""What read_image returns for intact files: pixels, axes, pixel size, notes."""

import hashlib
import os
import tempfile
import unicodedata
from pathlib import Path

import dask.array
import imagecodecs
import numpy as np
import PIL.Image
import psutil
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.errors import BadInput
from napari_unet.files import source
from napari_unet.files.images import list_images, read_image
from napari_unet.files.outputs import write_labels

random = np.random.default_rng(0)


@pytest.fixture
def little_memory(leave_memory):
    leave_memory(40_000)


DTYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8", "u8", "i8"]


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2).flatmap(
        lambda stack: st.tuples(
            *map(st.just, stack), st.integers(2, 70), st.integers(2, 70)
        )
    ),
    dtype=st.sampled_from(DTYPES),
    byteorder=st.sampled_from("<>"),
    bigtiff=st.booleans(),
    compression=st.sampled_from([None, "zlib", "lzw", "zstd", "packbits", "lzma"]),
    layout=st.sampled_from([{}, {"tile": (16, 32)}, {"rowsperstrip": 7}]),
    metadata=st.sampled_from([{}, None]),
    seed=st.integers(0, 99),
)
def test_whatever_tifffile_writes_comes_back(
    shape, dtype, byteorder, bigtiff, compression, layout, metadata, seed
):
    pixels = np.random.default_rng(seed).integers(
        0, 2 if dtype == "bool" else 99, shape
    )
    pixels = pixels.astype(dtype)
    if dtype == "bool":
        # Packed bits: tifffile writes them neither in tiles nor compressed.
        layout, compression = {}, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        tifffile.imwrite(
            path,
            pixels,
            byteorder=byteorder,
            bigtiff=bigtiff,
            compression=compression,
            photometric="minisblack",
            metadata=metadata,
            **layout,
        )
        image = read_image(path)
    stack = [n for n in shape[:-2] if n > 1]
    if metadata is None and stack:
        # Without metadata a TIFF is one list of pages.
        stack = [int(np.prod(stack))]
    assert image.data.shape == (*stack, *shape[-2:])
    assert image.axes == "TZYX"[-image.data.ndim :]
    assert image.data.dtype == np.dtype(dtype)
    assert image.data.dtype.isnative
    assert np.array_equal(image.data.reshape(shape), pixels)
    assert len(image.notes) == bool(stack)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.fixed_dictionaries({letter: st.integers(1, 4) for letter in "TZC"}),
    kind=st.sampled_from(["imagej", "ome"]),
    micrometres=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_axes_and_pixel_size_of_hyperstacks(sizes, kind, micrometres, seed):
    shape = (sizes["T"], sizes["Z"], sizes["C"], 9, 11)
    pixels = np.random.default_rng(seed).integers(0, 999, shape).astype("u2")
    if kind == "imagej":
        options = {
            "imagej": True,
            "resolution": (1 / micrometres, 2 / micrometres),
            "metadata": {
                "axes": "TZCYX",
                "unit": "um",
                "spacing": micrometres * 3,
            },
        }
    else:
        options = {
            "ome": True,
            "metadata": {
                "axes": "TZCYX",
                "PhysicalSizeX": micrometres * 1000,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": micrometres / 2,
                "PhysicalSizeZ": micrometres * 3,
            },
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        tifffile.imwrite(path, pixels, photometric="minisblack", **options)
        image = read_image(path)
    letters = [letter for letter in "TZC" if sizes[letter] > 1]
    assert image.axes == "".join(letters) + "YX"
    assert np.array_equal(image.data, pixels.squeeze())
    assert image.notes == ()
    expected = {"Y": micrometres / 2, "X": micrometres}
    if "Z" in letters:
        expected["Z"] = micrometres * 3
    assert image.pixel_size == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("unit", "resolution", "expected"),
    [
        ("micron", 4, 0.25),
        ("\\u00B5m", 4, 0.25),
        ("nm", 0.1, 0.01),
        ("mm", 1000, 1.0),
        ("cm", 20000, 0.5),
        ("pixel", 4, None),
        ("inch", 72, None),
        ("furlong", 4, None),
        (None, 4, None),
        ("um", 0, None),
    ],
)
def test_units_of_imagej(tmp_path, unit, resolution, expected):
    metadata = {"axes": "YX"} | ({"unit": unit} if unit else {})
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((5, 6), "u1"),
        imagej=True,
        resolution=(resolution, resolution),
        metadata=metadata,
    )
    sizes = {} if expected is None else {"Y": expected, "X": expected}
    assert read_image(tmp_path / "a.tif").pixel_size == pytest.approx(sizes)


@pytest.mark.parametrize(
    ("unit", "resolution", "expected"),
    [
        ("CENTIMETER", 20000, 0.5),
        ("INCH", 254000, 0.1),
        ("INCH", 72, None),
        ("INCH", 300, None),
        ("INCH", 1200, None),
        ("CENTIMETER", 118, None),
        ("NONE", 20000, None),
    ],
)
def test_resolution_of_plain_tiff_counts_only_for_microscopes(
    tmp_path, unit, resolution, expected
):
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((5, 6), "u1"),
        resolution=(resolution, resolution),
        resolutionunit=unit,
        metadata=None,
    )
    sizes = {} if expected is None else {"Y": expected, "X": expected}
    assert read_image(tmp_path / "a.tif").pixel_size == pytest.approx(sizes)


def test_colours_only_where_the_file_says_so(tmp_path):
    pixels = random.integers(0, 255, (20, 30, 3)).astype("u1")
    cases = {
        "contig": ("YXS", {"photometric": "rgb"}),
        "planar": ("YXS", {"photometric": "rgb", "planarconfig": "separate"}),
        "grey": ("CYX", {"photometric": "minisblack", "planarconfig": "contig"}),
        "lab": ("CYX", {"photometric": "cielab", "planarconfig": "contig"}),
    }
    for name, (axes, options) in cases.items():
        path = tmp_path / f"{name}.tif"
        data = np.moveaxis(pixels, -1, 0) if name == "planar" else pixels
        tifffile.imwrite(path, np.ascontiguousarray(data), metadata=None, **options)
        image = read_image(path)
        assert image.axes == axes, name
        expected = pixels if axes == "YXS" else np.moveaxis(pixels, -1, 0)
        assert np.array_equal(image.data, expected), name
        assert bool(image.notes) == (axes == "CYX"), name
    # Three planes or columns are not colours.
    tifffile.imwrite(tmp_path / "z.tif", pixels, photometric="minisblack")
    assert read_image(tmp_path / "z.tif").axes == "ZYX"


def test_unnamed_axes_and_the_users_own(tmp_path):
    pixels = random.integers(0, 255, (2, 3, 4, 5, 6)).astype("u1")
    for ndim, axes in [(2, "YX"), (3, "ZYX"), (4, "TZYX"), (5, "CTZYX")]:
        part = pixels[(0,) * (5 - ndim)]
        path = tmp_path / f"{ndim}.tif"
        tifffile.imwrite(path, part, photometric="minisblack", metadata={})
        image = read_image(path)
        assert image.axes == axes
        assert any(axes in note for note in image.notes) == (ndim > 2)
    image = read_image(tmp_path / "4.tif", axes="CTYX")
    assert (image.axes, image.notes) == ("CTYX", ())
    assert np.array_equal(image.data, pixels[0])
    with pytest.raises(BadInput, match=r"4 dimensions, 3×4×5×6 .*; give 4 letters"):
        read_image(tmp_path / "4.tif", axes="ZYX")
    for nonsense in ["ZZYX", "ABYX", "ZY", "zyx", ""]:
        with pytest.raises(BadInput, match="each dimension one of the letters"):
            read_image(tmp_path / "4.tif", axes=nonsense)
    tifffile.imwrite(
        tmp_path / "6.tif", np.zeros((2, 2, 2, 2, 5, 6), "u1"), photometric="minisblack"
    )
    with pytest.raises(BadInput, match="too many dimensions"):
        read_image(tmp_path / "6.tif")


def test_user_names_the_axis_of_a_calibrated_stack(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((3, 5, 6), "u1"),
        imagej=True,
        resolution=(2, 2),
        metadata={"axes": "ZYX", "unit": "um", "spacing": 4},
    )
    sizes = {"Z": 4, "Y": 0.5, "X": 0.5}
    assert read_image(tmp_path / "a.tif").pixel_size == sizes
    as_time = read_image(tmp_path / "a.tif", axes="TYX")
    assert as_time.axes == "TYX"
    assert as_time.pixel_size == {"Y": 0.5, "X": 0.5}


@pytest.mark.parametrize("dtype", ["c8", "c16"])
def test_complex_pixels_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((4, 5), dtype))
    with pytest.raises(BadInput, match="take the magnitude first"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "options",
    [
        {"imagej": True},
        {"ome": True, "metadata": {"axes": "ZCYX"}},
        {"compression": "zlib", "tile": (16, 16)},
        {"metadata": None},
    ],
)
def test_large_images_are_lazy_plane_by_plane(tmp_path, little_memory, options):
    pixels = random.integers(0, 999, (9, 2, 40, 50)).astype("u2")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", **options)
    image = read_image(path)
    assert isinstance(image.data, dask.array.Array)
    assert image.data.chunksize[-2:] == (40, 50)
    assert set(image.data.chunksize[:-2]) == {1}
    flat = pixels.reshape(image.data.shape)
    assert np.array_equal(image.data[..., 3:30, ::7].compute(), flat[..., 3:30, ::7])
    first = (slice(2, 4), *(0 for _ in image.data.shape[1:-2]), -1)
    assert np.array_equal(image.data[first].compute(), flat[first])
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(BadInput, match=r"a\.tif"):
        image.data.compute()


def test_caller_says_what_is_lazy(tmp_path):
    """Whatever the free memory is: results must not depend on it."""
    pixels = np.zeros((3, 40, 50), "u2")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    write_labels(tmp_path / "a.ome.zarr", pixels, axes="ZYX", pixel_size={})
    for name in ["a.tif", "a.ome.zarr"]:
        eager = read_image(tmp_path / name, max_bytes=pixels.nbytes)
        assert isinstance(eager.data, np.ndarray)
        lazy = read_image(tmp_path / name, max_bytes=pixels.nbytes - 1)
        assert isinstance(lazy.data, dask.array.Array)
        assert np.array_equal(lazy.data.compute(), eager.data)


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from(
        [
            *({"tile": (16, 32)}, {"tile": (32, 16), "compression": "zlib"}),
            *({"rowsperstrip": 7}, {"rowsperstrip": 7, "compression": "lzw"}),
            *({"tile": (16, 16), "compression": "jpeg"}, {"bigtiff": True}),
            *({"imagej": True}, {"byteorder": ">"}, {"ome": True}),
            {"ome": True, "tile": (16, 16), "compression": "zlib"},
            {"tile": (16, 16), "predictor": True, "compression": "zstd"},
            {"rowsperstrip": 8, "compression": "jpeg"},
        ]
    ),
    is_rgb=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(40, 70), st.integers(40, 70)),
    seed=st.integers(0, 999),
)
def test_large_planes_are_lazy_in_parts(layout, is_rgb, shape, seed):
    """A slide scanner's plane is larger than the memory."""
    chance = np.random.default_rng(seed)
    pixels = chance.integers(0, 255, shape + (3,) * is_rgb).astype("u1")
    photometric = "rgb" if is_rgb else "minisblack"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "LARGE_PLANE_BYTES", 300)
        patch.setattr(source, "PIECE_SIDE", 20)
        path = Path(folder) / "a.tif"
        tifffile.imwrite(path, pixels, photometric=photometric, **layout)
        whole, lazy = read_image(path), read_image(path, max_bytes=300)
        assert isinstance(lazy.data, dask.array.Array)
        assert len(lazy.data.chunks[lazy.axes.index("Y")]) > 1
        assert np.array_equal(whole.data, tifffile.imread(path).squeeze())
        assert np.array_equal(lazy.data.compute(), whole.data)
        for _ in range(3):
            key = tuple(
                slice(*sorted(chance.integers(0, n, 2)), int(chance.integers(1, 4)))
                for n in whole.data.shape
            )
            assert np.array_equal(lazy.data[key].compute(), whole.data[key])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(BadInput, match=r"a\.tif"):
            lazy.data.compute()


def test_part_of_a_large_plane_reads_only_its_tiles(tmp_path, monkeypatch):
    pixels = random.integers(0, 999, (320, 480)).astype("u2")
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(32, 32), compression="zlib")
    monkeypatch.setattr(source, "LARGE_PLANE_BYTES", 1000)
    monkeypatch.setattr(source, "PIECE_SIDE", 64)
    image = read_image(tmp_path / "a.tif", max_bytes=1000)
    assert image.data.chunksize == (64, 64)
    read, real = [], tifffile.FileHandle.read
    monkeypatch.setattr(
        tifffile.FileHandle, "read", lambda *args: read.append(args[1:]) or real(*args)
    )
    part = image.data[40:60, 100:120].compute()
    assert np.array_equal(part, pixels[40:60, 100:120])
    assert sum(size[0] for size in read if size) < 20_000


def test_one_plane_beyond_the_memory_is_refused_with_numbers(tmp_path, little_memory):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((300, 300), "u2"))
    with pytest.raises(BadInput, match=r"180 kB.*20 kB"):
        read_image(tmp_path / "a.tif")
    PIL.Image.fromarray(np.zeros((300, 300), "u1")).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"300×300"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_photos(tmp_path, suffix):
    grey = random.integers(0, 255, (13, 17)).astype("u1")
    colour = random.integers(0, 255, (13, 17, 3)).astype("u1")
    for pixels, axes in [(grey, "YX"), (colour, "YXS")]:
        path = tmp_path / f"a.{suffix}"
        PIL.Image.fromarray(pixels).save(path)
        image = read_image(path)
        with PIL.Image.open(path) as reference:
            assert np.array_equal(image.data, np.asarray(reference))
        assert suffix == "jpg" or np.array_equal(image.data, pixels)
        assert (image.axes, image.pixel_size, image.notes) == (axes, {}, ())


def test_png_depths_and_colour_tables(tmp_path):
    deep = random.integers(0, 65535, (13, 17, 4)).astype("u2")
    for channels, axes in [(1, "YX"), (3, "YXS"), (4, "YXS")]:
        pixels = np.ascontiguousarray(deep[..., :channels])
        pixels = pixels[..., 0].copy() if channels == 1 else pixels
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
        image = read_image(tmp_path / "a.png")
        assert np.array_equal(image.data, pixels)
        assert image.axes == axes
    bits = random.integers(0, 2, (13, 17)).astype(bool)
    PIL.Image.fromarray(bits).save(tmp_path / "bits.png")
    assert np.array_equal(read_image(tmp_path / "bits.png").data, bits)
    indices = PIL.Image.fromarray(random.integers(0, 3, (13, 17)).astype("u1"), "P")
    indices.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    indices.save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert (image.axes, len(image.notes)) == ("YX", 1)
    assert np.array_equal(image.data, (np.asarray(indices) + 1) * 10)
    indices.putpalette([10, 10, 10, 20, 20, 99, 30, 30, 30])
    indices.save(tmp_path / "colour.png")
    image = read_image(tmp_path / "colour.png")
    assert np.array_equal(image.data, np.asarray(indices.convert("RGB")))
    both = np.stack([np.asarray(indices)] * 2, axis=-1)
    PIL.Image.fromarray(both, "LA").save(tmp_path / "alpha.png")
    image = read_image(tmp_path / "alpha.png")
    assert (image.axes, len(image.notes)) == ("YX", 1)
    assert np.array_equal(image.data, both[..., 0])


NAMES = [
    "ß.tif",
    "ファイル.tif",
    unicodedata.normalize("NFC", "Zürich.tif"),
    unicodedata.normalize("NFD", "Zürich.tif"),
    "🔬 cells.tif",
    "a b  c.tif",
    "%41#?.tif",
    "'\"`$(ls).tif",
    "-rf.tif",
    "trailing..tif",
    "n" * 251 + ".tif",
    "no suffix",
]


@pytest.mark.parametrize("name", NAMES)
def test_names(tmp_path, name):
    pixels = random.integers(0, 999, (4, 5)).astype("u2")
    for options in [{}, {"ome": True}]:
        tifffile.imwrite(tmp_path / name, pixels, **options)
        image = read_image(tmp_path / name)
        assert np.array_equal(image.data, pixels)
        assert image.path == tmp_path / name


def test_inputs_are_neither_written_nor_left_open(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.arange(20, dtype="u1").reshape(4, 5), ome=True)
    os.utime(path, (1e9, 1e9))
    digest = hashlib.sha256(path.read_bytes()).digest()
    path.chmod(0o400)
    opened = len(psutil.Process().open_files())
    read_image(path)
    assert hashlib.sha256(path.read_bytes()).digest() == digest
    assert path.stat().st_mtime == 1e9
    assert [child.name for child in tmp_path.iterdir()] == ["a.tif"]
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadInput):
        read_image(path)
    assert len(psutil.Process().open_files()) == opened


def test_list_images(tmp_path):
    for name in ["a10.tif", "a2.TIF", "a1.ome.tiff", "b.png", "B1.jpg"]:
        (tmp_path / name).write_text("")
    for name in [".hidden.tif", "a.tif.part", ".a.tif.x.part", "notes.txt", "a.csv"]:
        (tmp_path / name).write_text("")
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr" / "zarr.json").write_text("{}")
    found = [path.name for path in list_images(tmp_path)]
    assert found == ["a1.ome.tiff", "a2.TIF", "a10.tif", "B1.jpg", "b.png", "c.zarr"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    assert list_images(tmp_path / "c.zarr") == [tmp_path / "c.zarr"]
    assert list_images(tmp_path / "folder.tif") == []
    with pytest.raises(BadInput, match="does not exist"):
        list_images(tmp_path / "missing")


def test_an_image_whose_link_leads_nowhere_is_not_left_out(tmp_path):
    link = tmp_path / "on another disk.tif"
    link.symlink_to(tmp_path / "gone.tif")
    (tmp_path / "notes").symlink_to(tmp_path / "gone")
    assert list_images(tmp_path) == [link]
    with pytest.raises(BadInput, match="does not exist"):
        read_image(link)


@given(st.lists(st.text("ab019²٣.", min_size=1, max_size=8), max_size=8, unique=True))
def test_natural_order_is_total(stems):
    with tempfile.TemporaryDirectory() as folder:
        for stem in stems:
            (Path(folder) / f"x{stem}.tif").write_text("")
        found = list_images(folder)
    assert len(found) == len(stems)
