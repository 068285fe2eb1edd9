"""What the metadata of a TIFF promises: planes, companion files, pixel size."""

from __future__ import annotations

import math
import ntpath
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import tifffile

MICROMETRES = {
    "m": 1e6,
    "meter": 1e6,
    "dm": 1e5,
    "cm": 1e4,
    "centimeter": 1e4,
    "mm": 1e3,
    "millimeter": 1e3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "pm": 1e-6,
    "picometer": 1e-6,
    "å": 1e-4,
    "angstrom": 1e-4,
    "in": 25400.0,
    "inch": 25400.0,
    "inches": 25400.0,
}

# No file that we could read has more; it bounds what a forged header can cost.
MAX_PLANES = 1_000_000
MAX_XML_CHARACTERS = 100_000_000

# Plain TIFFs state print resolutions (72 to 1200 dpi are 353 to 21 µm) far more
# often than a microscope's: only finer ones are believed.
PLAUSIBLE_MICROMETRES = (0.0001, 20.0)


def micrometres(unit: object) -> float | None:
    """Return how many micrometres a unit has, or None for none that we know."""
    # ImageJ escapes µ, and Unicode has two letters for it.
    text = str(unit).strip().replace("\\u00B5", "µ").replace("\u03bc", "µ")
    return MICROMETRES.get(text.lower())


def _size(value: object, factor: float | None) -> float | None:
    """Return a positive finite size in micrometres, or None."""
    try:
        size = float(value) * factor  # type: ignore[arg-type, operator]
    except (TypeError, ValueError):
        return None
    return size if math.isfinite(size) and size > 0 else None


def _known(**sizes: float | None) -> dict[str, float]:
    return {letter: size for letter, size in sizes.items() if size is not None}


@dataclass(frozen=True)
class OmeFile:
    """The part of an OME-XML header that decides what is read.

    Parameters
    ----------
    images : int
        How many images the header describes.
    planes : int
        How many TIFF planes the first of them promises at least.
    pixel_size : dict
        Of the first image, in micrometres.
    part_of : str
        Name of the file with the real header, where this one only refers to it.
    channel_names : tuple of str
        Of the first image, "" for a channel without a name.
    """

    images: int = 0
    planes: int = 0
    pixel_size: dict[str, float] = field(default_factory=dict)
    part_of: str = ""
    channel_names: tuple[str, ...] = ()


def read_ome(xml: str, path: Path) -> OmeFile:
    """Check an OME-XML header before tifffile acts on it.

    tifffile opens every file that the header names, wherever it lies, fills those
    it does not find with zeros, and allocates as many planes as are declared.

    Parameters
    ----------
    xml : str
        The header.
    path : Path
        The file it comes from.

    Returns
    -------
    OmeFile
        What it says.

    Raises
    ------
    BadInput
        When it names files outside the folder or missing ones, or is malformed.
    """
    if len(xml) > MAX_XML_CHARACTERS or "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise BadInput(
            f"{path.name}: its OME-XML header is not one that a microscope writes; "
            "save the image again as OME-TIFF."
        )
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise BadInput(
            f"{path.name}: its OME-XML header is damaged ({error}); save the image "
            "again as OME-TIFF."
        ) from error
    for element in _find(root, "BinaryOnly"):
        return OmeFile(part_of=element.attrib.get("MetadataFile", "another file"))
    _check_companions(root, path)
    _check_annotations(root, path)
    images = list(_find(root, "Image"))
    pixels = [next(_find(image, "Pixels"), None) for image in images]
    described = [p for p in pixels if p is not None]
    for element in described:
        _check_sizes(path, element.attrib)
    if not described:
        return OmeFile()
    return OmeFile(
        images=len(images),
        planes=_planes(described[0]),
        pixel_size=_ome_pixel_size(described[0].attrib),
        channel_names=tuple(
            channel.attrib.get("Name", "") for channel in _find(described[0], "Channel")
        ),
    )


def _find(parent: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Yield the children of a name in whatever version of the OME schema."""
    return (e for e in parent if str(e.tag).rpartition("}")[2] == name)


def _check_sizes(path: Path, attributes: dict[str, str]) -> None:
    """Refuse an image of impossible size before tifffile makes lists for it."""
    planes = 1
    for axis in "XYZCT":
        value = attributes.get(f"Size{axis}", "1")
        if not re.fullmatch(r"\d{1,9}", value) or int(value) < 1:
            raise BadInput(
                f"{path.name}: its OME-XML header declares an axis {axis} of length "
                f"{value[:20]!r}."
            )
        planes *= int(value) if axis in "ZCT" else 1
    order = attributes.get("DimensionOrder", "")
    if planes > MAX_PLANES or sorted(order) != sorted("XYZCT"):
        raise BadInput(
            f"{path.name}: its OME-XML header declares {planes} planes in the order "
            f"{order[:20]!r}; save the image again as OME-TIFF."
        )


def _check_companions(root: ElementTree.Element, path: Path) -> None:
    """Refuse files elsewhere, and missing ones: tifffile would read zeros."""
    own = root.attrib.get("UUID")
    names = {
        element.attrib.get("FileName", "")
        for element in root.iter()
        if str(element.tag).rpartition("}")[2] == "UUID"
        and (own is None or element.text != own)
    }
    for name in sorted(names):
        # ntpath knows both separators and drive letters.
        if ntpath.basename(name) != name or ntpath.splitdrive(name)[0] or "\0" in name:
            raise BadInput(
                f"{path.name} refers to the file {name[:200]!r} in another folder, "
                "which is not followed; put all its files into one folder."
            )
    missing = [
        name
        for name in sorted(names)
        if name in ("", ".", "..") or not (path.parent / name).is_file()
    ]
    if missing:
        raise BadInput(
            f"{path.name} is one of {len(names) + (own is not None)} files of an image "
            f"and {len(missing)} of them are missing, for example {missing[0]!r}; put "
            "them all into one folder under their own names."
        )


def _check_annotations(root: ElementTree.Element, path: Path) -> None:
    """Bound the numbers that tifffile would turn into arrays and lists."""
    for element in root.iter():
        name = str(element.tag).rpartition("}")[2]
        attributes = element.attrib
        if name.startswith("ModuloAlong") and "Start" in attributes:
            start, end = float(attributes["Start"]), float(attributes.get("End", 0))
            step = float(attributes.get("Step", 1))
            if step == 0 or not abs((end - start) / step) < MAX_PLANES:
                raise BadInput(f"{path.name}: its OME-XML header has a forged modulo.")
        elif name == "TiffData":
            for key in ("IFD", "NumPlanes", "PlaneCount", "FirstZ", "FirstC", "FirstT"):
                value = attributes.get(key, "0")
                if not value.isdecimal() or int(value) > MAX_PLANES:
                    raise BadInput(
                        f"{path.name}: its OME-XML header declares {key} {value[:20]}."
                    )


def _planes(pixels: ElementTree.Element) -> int:
    sizes = [int(pixels.attrib.get(f"Size{axis}", 1)) for axis in "ZCT"]
    channel = next(_find(pixels, "Channel"), None)
    samples = 1 if channel is None else int(channel.attrib.get("SamplesPerPixel", 1))
    return math.prod(sizes) // max(samples, 1)


def _ome_pixel_size(pixels: dict[str, str]) -> dict[str, float]:
    return _known(
        **{
            axis: _size(
                pixels.get(f"PhysicalSize{axis}"),
                micrometres(pixels.get(f"PhysicalSize{axis}Unit", "µm")),
            )
            for axis in "ZYX"
        }
    )


def imagej_pixel_size(
    metadata: dict[str, Any], page: tifffile.TiffPage
) -> dict[str, float]:
    """Return the calibration of an ImageJ file in micrometres.

    Parameters
    ----------
    metadata : dict
        tifffile's ``imagej_metadata``.
    page : tifffile.TiffPage
        The first page, which has the resolution.

    Returns
    -------
    dict
        For those of Z, Y and X that are calibrated. ImageJ writes "inch" for images
        it knows nothing of, so inches count only where a microscope is plausible.
    """
    unit = metadata.get("unit")
    if micrometres(unit) in (None, micrometres("inch")):
        return plain_pixel_size(page)
    y_unit, z_unit = metadata.get("yunit", unit), metadata.get("zunit", unit)
    x, y = _pixels_per_unit(page)
    return _known(
        Z=_size(metadata.get("spacing"), micrometres(z_unit)),
        Y=_size(1 / y if y else None, micrometres(y_unit)),
        X=_size(1 / x if x else None, micrometres(unit)),
    )


def plain_pixel_size(page: tifffile.TiffPage) -> dict[str, float]:
    """Return the resolution of a plain TIFF in micrometres, if it can be one.

    Parameters
    ----------
    page : tifffile.TiffPage
        The first page.

    Returns
    -------
    dict
        Y and X, or nothing: resolutions coarser than 20 µm are those of printers
        and screens.
    """
    factor = {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof(296, 0) or 0))
    x, y = _pixels_per_unit(page)
    sizes = _known(
        Y=_size(1 / y if y else 0, factor), X=_size(1 / x if x else 0, factor)
    )
    low, high = PLAUSIBLE_MICROMETRES
    plausible = all(low <= size <= high for size in sizes.values())
    return sizes if plausible and len(sizes) == 2 else {}


def _pixels_per_unit(page: tifffile.TiffPage) -> tuple[float, float]:
    """Return X and Y resolution, 0 where there is none."""
    result = []
    for code in (282, 283):
        value = page.tags.valueof(code)
        try:
            numerator, denominator = value
            result.append(float(numerator) / float(denominator))
        except (TypeError, ValueError, ZeroDivisionError):
            result.append(0.0)
    return result[0], result[1]
