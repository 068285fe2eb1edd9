"""OME-Zarr 0.4 and 0.5: metadata are checked as text before zarr interprets them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from napari_unet.errors import BadInput
from napari_unet.files.members import files_below
from napari_unet.files.slabs import Slabs
from napari_unet.files.source import (
    UNNAMED,
    Source,
    check_array,
    check_fits,
    lazy_array,
    memory_budget,
    reading,
)
from napari_unet.files.tiff_metadata import micrometres

if TYPE_CHECKING:
    from pathlib import Path

    import dask.array
    from numpy.typing import NDArray

MAX_METADATA_BYTES = 64_000_000

# Codecs that only move bits. zarr runs whichever codec the file names, and one of
# those that numcodecs registers unpickles, that is, executes the file.
SAFE_CODECS = frozenset(
    (
        *("blosc", "zlib", "gzip", "zstd", "lz4", "bz2", "lzma"),
        *("bytes", "transpose", "crc32c", "sharding_indexed"),
        *("shuffle", "delta", "bitround", "packbits", "fixedscaleoffset"),
        *("crc32", "adler32", "fletcher32", "jenkins_lookup3"),
    )
)
_LETTERS = {"t": "T", "c": "C", "z": "Z", "y": "Y", "x": "X"}
_TYPES = {"time": "T", "channel": "C"}


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is the root of a Zarr image.

    Parameters
    ----------
    path : Path
        Any path.

    Returns
    -------
    bool
        Whether it holds Zarr metadata.
    """
    return any((path / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup"))


def read_ome_zarr(path: Path, max_bytes: int | None = None) -> Source:
    """Read the finest level of an OME-Zarr image that is present.

    Parameters
    ----------
    path : Path
        The folder of the image, or of a label image inside it.
    max_bytes : int, optional
        A larger image is lazy; without it, one of more than half of the free memory.

    Returns
    -------
    Source
        With the axes, and the pixel size where the axes have units.

    Raises
    ------
    BadInput
        Before any chunk is read, when the data are not plain numbers or need a
        codec that could run code; later when a chunk is damaged.
    """
    with reading(path):
        attributes = _attributes(path)
        multiscales = attributes.get("multiscales")
        if not isinstance(multiscales, list) or not multiscales:
            raise BadInput(
                f"{path.name} is not an OME-Zarr image but perhaps a plate or a "
                f"collection; choose one image inside it{_examples(path)}."
            )
        image, notes = multiscales[0], []
        dataset, level = _finest_present(path, image)
        if dataset is not image["datasets"][0]:
            notes.append(
                f"The finest level of {path.name} is missing; level "
                f"{dataset['path']} is used."
            )
        if len(multiscales) > 1:
            notes.append(
                f"{path.name} describes {len(multiscales)} images; the first is used."
            )
        array = _open_array(path, level)
        axes, units = _axes(path, image, array.ndim)
        check_array(path, array.shape, axes, np.dtype(array.dtype))
        data = _load(path, level, array, axes, notes, max_bytes)
        pixel_size = _pixel_size(axes, units, image, dataset)
    names = _channel_names(attributes)
    return Source(path, data, axes, pixel_size, tuple(notes), names)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_METADATA_BYTES:
        raise BadInput(f"{file} is too large for Zarr metadata.")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise BadInput(f"{file} is not Zarr metadata.")
    return content


def _attributes(path: Path) -> dict[str, Any]:
    """Return the OME part of the group's attributes, of either version."""
    attributes = _read_json(path / "zarr.json").get("attributes", {})
    ome = attributes.get("ome", attributes) if isinstance(attributes, dict) else {}
    return ome if ome else _read_json(path / ".zattrs")


def _channel_names(attributes: dict[str, Any]) -> tuple[str, ...]:
    """Return the names for display, "" for a channel without one."""
    told = attributes.get("omero")
    channels = told.get("channels") if isinstance(told, dict) else None
    if not isinstance(channels, list):
        return ()
    labels = [c.get("label") if isinstance(c, dict) else None for c in channels]
    return tuple(label if isinstance(label, str) else "" for label in labels)


def _examples(path: Path) -> str:
    """Name a few images inside a collection."""
    found = []
    for pattern in ("*", "*/*", "*/*/*"):
        for folder in sorted(path.glob(pattern))[:200]:
            if folder.is_dir() and "multiscales" in _attributes(folder):
                found.append(folder.relative_to(path).as_posix())
        if found:
            return ", for example " + ", ".join(found[:3])
    return ""


def _finest_present(path: Path, image: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    for dataset in image["datasets"]:
        name = str(dataset["path"])
        level = (path / name).resolve()
        if "\\" in name or not level.is_relative_to(path.resolve()):
            raise BadInput(
                f"{path.name} refers to data outside its own folder ({name[:100]!r}), "
                "which is not followed."
            )
        if any((level / meta).is_file() for meta in (".zarray", "zarr.json")):
            return dataset, level
    raise BadInput(
        f"{path.name} is incomplete: none of its {len(image['datasets'])} resolution "
        "levels is there; get a fresh copy."
    )


def _open_array(path: Path, level: Path) -> zarr.Array:
    """Open an array whose metadata, read as text, ask for nothing but numbers."""
    version_3 = _read_json(level / "zarr.json")
    if version_3:
        dtype = version_3.get("data_type")
        codecs = _codecs_3(version_3.get("codecs"))
        kind = dtype if isinstance(dtype, str) else "structured"
        plain = kind.rstrip("0123456789") in ("bool", "int", "uint", "float")
    else:
        version_2 = _read_json(level / ".zarray")
        dtype = version_2.get("dtype")
        used = [version_2.get("compressor"), *(version_2.get("filters") or [])]
        codecs = [_name(codec, "id") for codec in used if codec is not None]
        kind = dtype if isinstance(dtype, str) else "structured"
        plain = kind[:2].lstrip("<>|=")[:1] in tuple("buif") or kind[1:2] in tuple(
            "buif"
        )
    unsafe = sorted(set(codecs) - SAFE_CODECS)
    if unsafe:
        raise BadInput(
            f"{path.name} needs the codec {unsafe[0][:40]!r}, which is refused because "
            "it could run a program; save the image again with zstd or blosc."
        )
    if kind.startswith(("complex", "<c", ">c")):
        raise BadInput(
            f"{path.name} holds complex numbers; take the magnitude first and save "
            "that."
        )
    if not plain:
        raise BadInput(
            f"{path.name} holds pixels of the kind {kind[:40]!r}; save the image as "
            "whole or floating-point numbers first."
        )
    store = LocalStore(level, read_only=True)
    return zarr.open_array(store, mode="r", zarr_format=3 if version_3 else 2)


def _name(codec: object, key: str) -> str:
    name = codec.get(key) if isinstance(codec, dict) else codec
    return str(name).removeprefix("numcodecs.")


def _codecs_3(codecs: object, depth: int = 0) -> list[str]:
    """List the names of all codecs, also of those inside of shards."""
    if not isinstance(codecs, list) or depth > 8:
        return ["none"]
    names = []
    for codec in codecs:
        names.append(_name(codec, "name"))
        inner = codec.get("configuration") if isinstance(codec, dict) else None
        for key in ("codecs", "index_codecs"):
            if isinstance(inner, dict) and key in inner:
                names += _codecs_3(inner[key], depth + 1)
    return names


def _axes(path: Path, image: dict[str, Any], ndim: int) -> tuple[str, list[str | None]]:
    """Return axis letters and units; versions before 0.3 always have five axes."""
    described = image.get("axes", list("tczyx"))
    letters, units = "", []
    for axis in described:
        entry = axis if isinstance(axis, dict) else {"name": axis}
        letter = _LETTERS.get(str(entry.get("name")).lower(), UNNAMED)
        letter = _TYPES.get(str(entry.get("type")), letter)
        letters += UNNAMED if letter in letters else letter
        units.append(entry.get("unit"))
    if len(letters) != ndim:
        raise BadInput(
            f"{path.name} is inconsistent: its metadata name {len(letters)} axes and "
            f"its array has {ndim}."
        )
    return letters, units


def _pixel_size(
    axes: str, units: list[str | None], *scaled: dict[str, Any]
) -> dict[str, float]:
    """Multiply the scales of the image and of the level, where there are units."""
    result = {}
    for i, (letter, unit) in enumerate(zip(axes, units, strict=True)):
        size = micrometres(unit)
        if letter not in "ZYX" or size is None:
            continue
        for part in scaled:
            for transform in part.get("coordinateTransformations") or []:
                scale = transform.get("scale")
                if isinstance(scale, list) and len(scale) == len(axes):
                    size *= float(scale[i])
        if math.isfinite(size) and size > 0:
            result[letter] = size
    return result


class _Chunks:
    """A Zarr array whose damaged chunks are reported as bad input."""

    def __init__(self, path: Path, array: zarr.Array) -> None:
        self._path = path
        self._array = array
        self.shape = array.shape
        self.ndim = array.ndim
        self.dtype = np.dtype(array.dtype)
        # dask makes its blocks of whole ones of these.
        self.chunks = array.shards or array.chunks

    def __getitem__(self, key: Any) -> NDArray[Any]:
        with reading(self._path):
            return np.asarray(self._array[key])


def _load(
    path: Path,
    level: Path,
    array: zarr.Array,
    axes: str,
    notes: list[str],
    max_bytes: int | None,
) -> NDArray[Any] | dask.array.Array:
    chunks = _Chunks(path, array)
    itemsize = chunks.dtype.itemsize
    nbytes = math.prod(array.shape) * itemsize
    # A chunk may be declared larger than the image.
    check_fits(path, math.prod(chunks.chunks) * itemsize, "one chunk")
    # Counted as files: zarr would go through every chunk that a header may declare.
    stored = sum(
        file.name != "zarr.json" and not file.name.startswith(".")
        for file in files_below(level)
    )
    total = math.prod(
        -(-length // side)
        for length, side in zip(array.shape, chunks.chunks, strict=True)
    )
    if stored < total:
        notes.append(
            f"{total - stored} of {total} chunks are not stored; they are read as "
            f"{array.fill_value}."
        )
    if nbytes > (memory_budget() if max_bytes is None else max_bytes):
        kept = Slabs(chunks, axes, array.chunks)
        return lazy_array(path, kept, "auto")
    data = chunks[...]
    return data.astype(data.dtype.newbyteorder("="), copy=False)
