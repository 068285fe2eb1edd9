"""Damaged, incomplete and forged TIFFs: an error or all of the image."""

import logging
import struct
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from child_reader import needs_limits, read_in_child

from napari_unet.errors import BadInput
from napari_unet.files.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 999, (6, 24, 33)).astype("u2")

LAYOUTS = {
    "plain": {"metadata": None},
    "plain one by one": {"metadata": None, "contiguous": False},
    "shaped": {},
    "shaped zlib": {"compression": "zlib"},
    "imagej": {"imagej": True},
    "imagej zlib": {"imagej": True, "compression": "zlib"},
    "ome": {"ome": True},
    "ome zlib": {"ome": True, "compression": "zlib"},
    "ome tiled lzw": {"ome": True, "compression": "lzw", "tile": (16, 16)},
    "tiled zstd": {"compression": "zstd", "tile": (16, 16)},
    "strips packbits": {"compression": "packbits", "rowsperstrip": 5},
    "bigtiff": {"bigtiff": True},
    "one header": {"imagej": True, "truncate": True},
    "one shaped header": {"truncate": True},
    "big endian": {"byteorder": ">", "metadata": None},
    "tiled jpeg": {"compression": "jpeg", "tile": (16, 16)},
}


def write(path: Path, pixels: np.ndarray = PIXELS, **options) -> bytes:
    """Write a file in one of the layouts and return its bytes."""
    writer = {
        key: options.pop(key)
        for key in ("imagej", "ome", "bigtiff", "byteorder")
        if key in options
    }
    if options.get("compression") == "jpeg":
        pixels = pixels.astype("u1")
    pages = [pixels] if options.pop("contiguous", True) else list(pixels)
    with tifffile.TiffWriter(path, **writer) as tiff:
        for page in pages:
            tiff.write(page, photometric="minisblack", **options)
    return path.read_bytes()


def cut_points(size: int) -> list[int]:
    """Return the lengths to cut a file to: random ones, and both ends."""
    random = np.random.default_rng(size)
    points = {*range(0, 20, 4), *range(size - 8, size, 2)}
    return sorted(points | {int(n) for n in random.integers(0, size, 25)})


def test_corpus_is_large_enough(tmp_path):
    sizes = [len(write(tmp_path / "a.tif", **dict(o))) for o in LAYOUTS.values()]
    assert sum(len(cut_points(size)) for size in sizes) >= 500


@pytest.mark.parametrize("silenced", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cut_file_is_never_read_in_part(tmp_path, caplog, layout, silenced):
    """More than 500 files; tifffile alone reads every second one wrong in silence."""
    path = tmp_path / "a.tif"
    whole = write(path, **dict(LAYOUTS[layout]))
    intact, expected = read_image(path), tifffile.imread(path)
    assert np.array_equal(intact.data, expected)
    assert layout == "tiled jpeg" or np.array_equal(expected, PIXELS)
    logger = logging.getLogger("tifffile")
    level, disabled = logger.level, logger.disabled
    if silenced:
        # Programs do this to be rid of tifffile's warnings.
        logger.setLevel(logging.CRITICAL)
        logger.disabled = True
        logging.disable()
    try:
        messages = []
        for length in cut_points(len(whole)):
            path.write_bytes(whole[:length])
            try:
                image = read_image(path)
            except BadInput as error:
                messages.append(str(error))
            else:
                assert image.axes == intact.axes, length
                assert np.array_equal(image.data, expected), length
        assert len(messages) > 20
        assert all(message.startswith("a.tif") for message in messages)
        if silenced:
            assert logger.level == logging.CRITICAL
            assert logger.disabled
            logger.critical("silenced as before")
        assert caplog.records == []
    finally:
        logger.setLevel(level)
        logger.disabled = disabled
        logging.disable(logging.NOTSET)


def test_nobody_hears_what_we_report(tmp_path, caplog):
    path = tmp_path / "a.tif"
    path.write_bytes(write(path, metadata=None)[:7000])
    with caplog.at_level(logging.DEBUG), pytest.raises(BadInput):
        read_image(path)
    assert caplog.records == []
    # What other threads and other users of tifffile log is not taken.
    logging.getLogger("tifffile").warning("someone else's")
    assert [record.getMessage() for record in caplog.records] == ["someone else's"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"II",
        b"II*\0",
        b"II*\0\x08\0\0\0",
        b"II*\0\x00\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0" + bytes(8),
        b"II*\0\x08\0\0\0" + bytes(100),
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"BM",
        b"GIF89a",
        b"%PDF-1.7",
        b"\0" * 1000,
    ],
)
def test_no_image_at_all(tmp_path, content):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"^a\.tif"):
        read_image(path)


def test_nothing_there_and_a_folder(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(BadInput, match="is a folder without an image"):
        read_image(tmp_path)


def forge(path: Path, **tags: int) -> None:
    """Overwrite tags of the first page."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in tags.items():
            tiff.pages.first.tags[name].overwrite(value)


@pytest.mark.parametrize("axis", ["ImageWidth", "ImageLength"])
@pytest.mark.parametrize("layout", ["plain", "shaped zlib"])
def test_zero_length_axis(tmp_path, axis, layout):
    write(tmp_path / "a.tif", PIXELS[0], **dict(LAYOUTS[layout]))
    forge(tmp_path / "a.tif", **{axis: 0})
    with pytest.raises(BadInput):
        read_image(tmp_path / "a.tif")


def test_zero_length_axis_is_named(tmp_path):
    write(tmp_path / "a.tif", PIXELS[0], metadata=None)
    forge(tmp_path / "a.tif", ImageLength=0)
    with pytest.raises(BadInput, match="axis Y has length 0"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "layout", ["plain one by one", "imagej zlib", "ome", "tiled zstd"]
)
@pytest.mark.parametrize("page", [0, 3, 5])
@pytest.mark.parametrize("value", [0, 2**31])
def test_pixels_that_are_not_in_the_file(tmp_path, layout, page, value):
    """One strip or tile of one page has no place, or one behind the end."""
    path = tmp_path / "a.tif"
    write(
        path,
        **dict(LAYOUTS[layout]),
        **({"contiguous": False} if layout == "plain" else {}),
    )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages.get(page, cache=False, aspage=True).tags
        tag = tags["TileOffsets" if "tiled" in layout else "StripOffsets"]
        places = tag.value if isinstance(tag.value, tuple) else (tag.value,)
        tag.overwrite((value, *places[1:]))
    with pytest.raises(BadInput):
        read_image(path)


def test_declared_planes_of_imagej_are_counted(tmp_path):
    path = tmp_path / "a.tif"
    for pixels in (PIXELS[:1], PIXELS[:3]):
        whole = write(path, pixels, imagej=True, metadata={"axes": "ZYX"})
        assert b"images=" in whole
        count = len(pixels)
        path.write_bytes(whole.replace(b"images=%d" % count, b"images=9"))
        with pytest.raises(BadInput, match=f"declares 9 plane.*has {count}"):
            read_image(path)


def test_stack_with_an_odd_page_is_refused(tmp_path):
    """An OME header promises pages of one kind; one is smaller."""
    path = tmp_path / "a.tif"
    write(path, ome=True, compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = tiff.pages.get(3, cache=False, aspage=True)
        page.tags["ImageWidth"].overwrite(30)
    with pytest.raises(BadInput, match="24×30 uint16 lies in a stack of 24×33"):
        read_image(path)


def test_damaged_description_is_a_note(tmp_path):
    """A tag without which the pixels are still right does not stop the user."""
    path = tmp_path / "a.tif"
    write(path, metadata=None, software="a program of some name")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages.first.tags["Software"]
        tiff.filehandle.seek(tag.offset + 8)
        tiff.filehandle.write(struct.pack("<I", 2**31))
    image = read_image(path)
    assert np.array_equal(image.data, PIXELS)
    assert any("metadata" in note and "305" in note for note in image.notes)


def test_damaged_image_description_is_refused(tmp_path):
    """Without its description an ImageJ stack would lose its axes."""
    path = tmp_path / "a.tif"
    write(path, imagej=True, compression="zlib", metadata={"axes": "TYX"})
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages.first.tags["ImageDescription"]
        tiff.filehandle.seek(tag.offset + 8)
        tiff.filehandle.write(struct.pack("<I", 2**31))
    with pytest.raises(BadInput, match="damaged"):
        read_image(path)


def ome_set(folder: Path) -> Path:
    """Write an OME-TIFF of two files, a header each."""
    names, urns = ["a.ome.tif", "b.ome.tif"], [f"urn:uuid:{n * 36}" for n in "12"]
    for name, urn in zip(names, urns, strict=True):
        planes = "".join(
            f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1">'
            f'<UUID FileName="{other}">{uuid}</UUID></TiffData>'
            for z, (other, uuid) in enumerate(zip(names, urns, strict=True))
        )
        xml = (
            '<?xml version="1.0"?><OME '
            'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{urn}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            'DimensionOrder="XYZCT" Type="uint16" SizeX="33" SizeY="24" SizeC="1" '
            f'SizeT="1" SizeZ="2"><Channel ID="Channel:0:0"/>{planes}</Pixels></Image>'
            "</OME>"
        )
        tifffile.imwrite(
            folder / name, PIXELS[names.index(name)], description=xml, metadata=None
        )
    return folder / names[0]


def replace(path: Path, old: str, new: str) -> None:
    """Replace a part of an OME header, which keeps its length."""
    content = path.read_bytes()
    assert old.encode() in content
    with tifffile.TiffFile(path) as tiff:
        xml = tiff.ome_metadata
    tifffile.tiffcomment(path, xml.replace(old, new).encode())


def test_ome_of_several_files(tmp_path):
    image = read_image(ome_set(tmp_path))
    assert (image.axes, image.notes) == ("ZYX", ())
    assert np.array_equal(image.data, PIXELS[:2])


def test_ome_with_a_missing_file(tmp_path):
    first = ome_set(tmp_path)
    (tmp_path / "b.ome.tif").unlink()
    with pytest.raises(BadInput, match=r"2 files .* 1 of them .*'b\.ome\.tif'"):
        read_image(first)


def test_ome_with_a_damaged_companion(tmp_path):
    first = ome_set(tmp_path)
    companion = tmp_path / "b.ome.tif"
    for length in (0, 100, 1000, 2000):
        companion.write_bytes(companion.read_bytes()[:length] or b"")
        with pytest.raises(BadInput):
            read_image(first)
        ome_set(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../b.ome.tif", "/tmp/b.ome.tif", "..\\b.ome.tif", "C:\\b.tif", "C:b.tif", "x/b"],
)
def test_ome_that_refers_elsewhere(tmp_path, name, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    first = ome_set(inner)
    (inner / "b.ome.tif").rename(tmp_path / "b.ome.tif")
    replace(first, 'FileName="b.ome.tif"', f'FileName="{name}"')
    with pytest.raises(BadInput, match="in another folder"):
        read_image(first)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_ome_that_refers_to_a_folder(tmp_path, name):
    first = ome_set(tmp_path)
    replace(first, 'FileName="b.ome.tif"', f'FileName="{name}"')
    with pytest.raises(BadInput, match="are missing"):
        read_image(first)


def test_ome_renamed_single_file(tmp_path):
    """The header may call the file by the name it had before."""
    xml_name = tmp_path / "old.ome.tif"
    write(xml_name, ome=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(xml_name) as tiff:
        xml = tiff.ome_metadata
    urn = xml.partition('UUID="')[2].partition('"')[0]
    own = f'><UUID FileName="old.ome.tif">{urn}</UUID></TiffData></Pixels>'
    tifffile.tiffcomment(xml_name, xml.replace("/></Pixels>", own).encode())
    path = xml_name.rename(tmp_path / "new.ome.tif")
    image = read_image(path)
    assert (image.axes, image.notes) == ("ZYX", ())
    assert np.array_equal(image.data, PIXELS)


FORGERIES = [
    ('SizeZ="2"', 'SizeZ="3"'),
    ('SizeZ="2"', 'SizeZ="99999999"'),
    ('SizeZ="2"', 'SizeZ="0"'),
    ('SizeZ="2"', 'SizeZ="-2"'),
    ('SizeZ="2"', 'SizeZ="1e3"'),
    ('SizeT="1"', 'SizeT="99999999"'),
    ('FirstZ="1"', 'FirstZ="99999999"'),
    ('FirstZ="1"', 'FirstZ="7"'),
    ('FirstZ="1" IFD="0"', 'FirstZ="1" IFD="9"'),
    ('PlaneCount="1"', 'PlaneCount="99999999"'),
    ('PlaneCount="1"', 'PlaneCount="4"'),
    ('DimensionOrder="XYZCT"', 'DimensionOrder="XYZ"'),
    ("</OME>", ""),
    ('<?xml version="1.0"?>', '<!DOCTYPE a [<!ENTITY b "c">]>'),
    (
        "</Image>",
        '</Image><StructuredAnnotations><XMLAnnotation ID="A" '
        'Namespace="openmicroscopy.org/omero/dimension/modulo"><Value><Modulo>'
        '<ModuloAlongZ Type="phase" Start="0" End="1e8" Step="1"/></Modulo>'
        "</Value></XMLAnnotation></StructuredAnnotations>",
    ),
]


@pytest.mark.parametrize(("old", "new"), FORGERIES)
def test_forged_ome_headers(tmp_path, old, new):
    first = ome_set(tmp_path)
    replace(first, old, new)
    with pytest.raises(BadInput, match=r"^a\.ome\.tif"):
        read_image(first)


@needs_limits
def test_forged_ome_headers_take_no_memory(tmp_path):
    ome_set(tmp_path)
    template = (tmp_path / "a.ome.tif").read_bytes()
    for number, (old, new) in enumerate(FORGERIES):
        path = tmp_path / f"{number}.ome.tif"
        path.write_bytes(template)
        replace(path, old, new)
    results = read_in_child(tmp_path)
    assert sum(result["outcome"] != "read" for result in results.values()) == len(
        FORGERIES
    )
    for result in results.values():
        assert result["kB"] < 100_000
        assert result["s"] < 2
        # The header is refused, not the attempt to do what it says.
        assert "fit into memory" not in result["outcome"]


def test_other_threads_do_not_disturb(tmp_path, caplog):
    """What tifffile says to another thread is about another file."""
    path = tmp_path / "a.tif"
    write(path)
    stop = threading.Event()

    def complain() -> None:
        while not stop.is_set():
            logging.getLogger("tifffile").error("invalid page offset 7")

    other = threading.Thread(target=complain)
    other.start()
    try:
        # A busy machine may not let the other thread run for a while.
        deadline = time.monotonic() + 30
        reads = 0
        while reads < 20 or (len(caplog.records) <= 20 and time.monotonic() < deadline):
            assert np.array_equal(read_image(path).data, PIXELS)
            reads += 1
    finally:
        stop.set()
        other.join()
    assert len(caplog.records) > 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cut_file_is_refused_before_its_first_plane_is_computed(
    tmp_path, layout, leave_memory
):
    path = tmp_path / "a.tif"
    whole = write(path, **dict(LAYOUTS[layout]))
    path.write_bytes(whole[: len(whole) // 2])
    leave_memory(10_000)
    with pytest.raises(BadInput, match=r"^a\.tif"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_cut_photo_is_never_read_in_part(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray((PIXELS[0] % 256).astype("u1")).save(path)
    whole, intact = path.read_bytes(), read_image(path).data
    refused = 0
    for length in cut_points(len(whole)):
        path.write_bytes(whole[:length])
        try:
            image = read_image(path)
        except BadInput:
            refused += 1
        else:
            assert np.array_equal(image.data, intact), length
    assert refused > 20
