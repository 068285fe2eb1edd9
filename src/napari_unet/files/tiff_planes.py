"""Reading the planes of a TIFF one by one, after checking that they are there."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from napari_unet.errors import BadInput
from napari_unet.files.source import byte_size, pixels_size, reading
from napari_unet.files.tiff_log import listening

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

UNCOMPRESSED = 1
JPEG = (6, 7, 34892, 33007)
# The highest ratio that a format can reach: deflate by its design, LZW with
# 12-bit codes, PackBits with runs of 128. Beyond it the header lies.
MAX_RATIO = {5: 4096, 8: 1040, 32946: 1040, 32773: 64}


@dataclass(frozen=True, eq=False)
class RawPlanes:
    """Uncompressed planes that lie one after another in a file.

    ImageJ writes stacks above 4 GB like this, with the header of one plane only.
    """

    path: Path
    shape: tuple[int, ...]
    stack_ndim: int
    stored: np.dtype[Any]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the planes in this computer's byte order."""
        return self.stored.newbyteorder("=")

    def read(self, indices: Iterable[int]) -> Iterator[NDArray[Any]]:
        """Yield planes by their number in the flattened stack."""
        plane_shape = self.shape[self.stack_ndim :]
        size = math.prod(plane_shape)
        with reading(self.path), open(self.path, "rb") as file:
            for index in indices:
                file.seek(self.offset + index * size * self.stored.itemsize)
                plane = np.fromfile(file, self.stored, size)
                if plane.size != size:
                    raise BadInput(f"{self.path.name} has changed while it was read.")
                yield plane.reshape(plane_shape).astype(self.dtype, copy=False)

    @property
    def segment(self) -> tuple[int, int] | None:
        """Rows and columns of what can be read alone: one row."""
        plane_shape = self.shape[self.stack_ndim :]
        return (1, plane_shape[1]) if len(plane_shape) > 1 else None

    def read_part(self, index: int, rows: slice, columns: slice) -> NDArray[Any]:
        """Read some rows and columns of one plane."""
        _, width, *samples = self.shape[self.stack_ndim :]
        plane_pixels = math.prod(self.shape[self.stack_ndim :])
        row_pixels = width * math.prod(samples)
        first = index * plane_pixels + rows.start * row_pixels
        count = (rows.stop - rows.start) * row_pixels
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.offset + first * self.stored.itemsize)
            part = np.fromfile(file, self.stored, count)
            if part.size != count:
                raise BadInput(f"{self.path.name} has changed while it was read.")
        part = part.reshape(-1, width, *samples)[:, columns]
        return part.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class PageAddress:
    """Where one page lies: its file, its directory and its first pixel."""

    path: Path
    directory: int
    first_byte: int


@dataclass(frozen=True, eq=False)
class PagePlanes:
    """Planes that are TIFF pages, of one file or of several."""

    path: Path
    shape: tuple[int, ...]
    stack_ndim: int
    dtype: np.dtype[Any]
    page_shape: tuple[int, ...]
    pages: tuple[PageAddress, ...]
    segment: tuple[int, int] | None

    def read(self, indices: Iterable[int]) -> Iterator[NDArray[Any]]:
        """Yield planes by their number in the flattened stack."""
        tiff: tifffile.TiffFile | None = None
        opened: Path | None = None
        try:
            for index in indices:
                address = self.pages[index]
                with reading(address.path), listening(address.path):
                    if tiff is None or opened != address.path:
                        if tiff is not None:
                            tiff.close()
                        tiff = tifffile.TiffFile(address.path, _multifile=False)
                        opened = address.path
                    plane = self._read_page(tiff, address)
                yield plane
        finally:
            if tiff is not None:
                tiff.close()

    def read_part(self, index: int, rows: slice, columns: slice) -> NDArray[Any]:
        """Read some rows and columns of one plane: only the tiles that have them."""
        address = self.pages[index]
        with (
            reading(address.path),
            listening(address.path),
            tifffile.TiffFile(address.path, _multifile=False) as tiff,
        ):
            return self._decode_part(self._page(tiff, address), rows, columns)

    def _decode_part(
        self, page: tifffile.TiffPage, rows: slice, columns: slice
    ) -> NDArray[Any]:
        assert self.segment is not None
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        result = np.empty((*shape, page.samplesperpixel), self.dtype)
        across = -(-page.imagewidth // self.segment[1])
        grid = [
            range(part.start // side, -(-part.stop // side))
            for part, side in zip((rows, columns), self.segment, strict=True)
        ]
        tables = {}
        if int(page.compression) in JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        file = page.parent.filehandle
        for down, right in itertools.product(*grid):
            number = down * across + right
            file.seek(page.dataoffsets[number])
            encoded = file.read(page.databytecounts[number])
            pixels, (_, _, y, x, _), _ = page.decode(encoded, number, **tables)
            assert pixels is not None
            # Where the tile begins, as seen from the part, and where it ends.
            top, left = y - rows.start, x - columns.start
            target = result[max(top, 0) :, max(left, 0) :]
            tile = pixels[0, max(-top, 0) :, max(-left, 0) :]
            height = min(tile.shape[0], target.shape[0])
            width = min(tile.shape[1], target.shape[1])
            target[:height, :width] = tile[:height, :width]
        return result.reshape(*shape, *self.shape[self.stack_ndim + 2 :])

    def _read_page(self, tiff: tifffile.TiffFile, address: PageAddress) -> NDArray[Any]:
        page = self._page(tiff, address)
        return page.asarray().astype(self.dtype, copy=False)

    def _page(self, tiff: tifffile.TiffFile, address: PageAddress) -> tifffile.TiffPage:
        """Open a page and check that it is what the first one promised."""
        tiff.filehandle.seek(address.directory)
        page = tifffile.TiffPage(tiff, 0)
        # tifffile takes the size of every page of a stack from the first one.
        if (
            page.shape != self.page_shape
            or page.dtype != self.dtype
            or page.dataoffsets[0] != address.first_byte
        ):
            raise BadInput(
                f"{address.path.name}: a page of {pixels_size(page.shape)} "
                f"{page.dtype} lies in a stack of {pixels_size(self.page_shape)} "
                f"{self.dtype}; save pages of one kind into one file."
            )
        check_storage(address.path, page, page)
        return page


def planes_of(path: Path, series: tifffile.TiffPageSeries) -> RawPlanes | PagePlanes:
    """Return the planes of a series whose pixels are all there.

    Parameters
    ----------
    path : Path
        The file that was opened.
    series : tifffile.TiffPageSeries
        One image of it.

    Returns
    -------
    RawPlanes or PagePlanes
        To be read all at once or one by one.

    Raises
    ------
    BadInput
        When pages are missing or pixels lie beyond the end of the file.
    """
    shape = tuple(int(n) for n in series.get_shape(squeeze=False))
    keyframe = series.keyframe
    stack_ndim = _stack_ndim(path, shape, keyframe)
    count = math.prod(shape[:stack_ndim])
    dtype = np.dtype(series.dtype)
    offset = series.dataoffset
    if offset is not None and keyframe.is_memmappable:
        _check_raw(path, offset, count, keyframe.nbytes)
        if keyframe.nbytes * count < 2**32:
            # Beyond, the header of ImageJ's single page is out of its range.
            check_storage(path, keyframe, keyframe)
        stored = dtype.newbyteorder(keyframe.parent.byteorder)
        return RawPlanes(path, shape, stack_ndim, stored, offset)
    pages = [page for page in series.pages if page is not None]
    if len(pages) != count or len(series.pages) != count:
        raise BadInput(
            f"{path.name} is incomplete: it declares {count} plane(s) and has "
            f"{len(pages)}; get a fresh copy."
        )
    addresses = []
    for page in pages:
        file = Path(page.parent.filehandle.path)
        check_storage(file, page, keyframe)
        addresses.append(PageAddress(file, page.offset, page.dataoffsets[0]))
    return PagePlanes(
        path,
        shape,
        stack_ndim,
        dtype,
        tuple(keyframe.shape),
        tuple(addresses),
        _segment(keyframe, shape[stack_ndim:]),
    )


def _segment(
    keyframe: tifffile.TiffPage, plane_shape: tuple[int, ...]
) -> tuple[int, int] | None:
    """Return the rows and columns of a strip or tile, if it can be read alone."""
    is_plain = (
        plane_shape in (tuple(keyframe.shape), (*keyframe.shape, 1))
        and keyframe.axes in ("YX", "YXS")
        # Decoders of JPEG give every pixel its colours back.
        and (not keyframe.is_subsampled or int(keyframe.compression) in JPEG)
        and int(keyframe.planarconfig) == tifffile.PLANARCONFIG.CONTIG
    )
    if not is_plain:
        return None
    height, width = keyframe.chunks[:2]
    return int(height), int(width)


def _stack_ndim(path: Path, shape: tuple[int, ...], keyframe: tifffile.TiffPage) -> int:
    """Return how many leading axes enumerate pages."""
    # OME's images have an axis for one sample behind X.
    for plane_shape in (tuple(keyframe.shape), (*keyframe.shape, 1)):
        leading = len(shape) - len(plane_shape)
        if leading >= 0 and shape[leading:] == plane_shape:
            return leading
    for ndim in range(len(shape) + 1):
        if math.prod(shape[ndim:]) == keyframe.size:
            return ndim
    raise BadInput(
        f"{path.name}: its pages of {pixels_size(keyframe.shape)} do not make up the "
        f"declared image of {pixels_size(shape)}; save it again with the program that "
        "made it."
    )


def _check_raw(path: Path, offset: int, count: int, plane_bytes: int) -> None:
    there = max(0, path.stat().st_size - offset)
    if there < count * plane_bytes:
        raise BadInput(
            f"{path.name} is incomplete: its {count} plane(s) need "
            f"{byte_size(count * plane_bytes)} and the file has {byte_size(there)} "
            f"for {there // plane_bytes} of them; get a fresh copy."
        )


def check_storage(
    path: Path,
    page: tifffile.TiffPage | tifffile.TiffFrame,
    keyframe: tifffile.TiffPage,
) -> None:
    """Refuse a page whose pixels are not, or cannot be, in the file.

    Parameters
    ----------
    path : Path
        The file of the page.
    page : tifffile.TiffPage or tifffile.TiffFrame
        Has the places of the strips or tiles.
    keyframe : tifffile.TiffPage
        Has the size and compression.

    Raises
    ------
    BadInput
        With the numbers.
    """
    offsets, counts = page.dataoffsets, page.databytecounts
    end = path.stat().st_size
    expected = _segments(keyframe)
    if len(offsets) < expected or len(counts) < expected:
        raise BadInput(
            f"{path.name} is damaged: a page has {min(len(offsets), len(counts))} of "
            f"its {expected} strips or tiles; get a fresh copy."
        )
    segments = list(zip(offsets, counts, strict=False))
    if not keyframe.is_contiguous:
        segments = segments[:expected]
    for first, length in segments:
        # tifffile reads an empty strip or tile as zeros.
        if first <= 0 or length <= 0 or first + length > end:
            raise BadInput(
                f"{path.name} is incomplete: pixels should lie at byte "
                f"{first + length} and the file ends at {end}; get a fresh copy."
            )
    bits = keyframe.bitspersample
    if keyframe.is_subsampled or not isinstance(bits, int):
        return
    needed = keyframe.size * bits // 8
    held = sum(length for _, length in segments)
    if needed > held * MAX_RATIO.get(keyframe.compression, 1 << 62) or (
        keyframe.compression == UNCOMPRESSED and needed > held
    ):
        raise BadInput(
            f"{path.name} declares a plane of {pixels_size(keyframe.shape)} "
            f"({byte_size(needed)}) but holds only {held} bytes for it; the file is "
            "damaged or forged."
        )


def _segments(keyframe: tifffile.TiffPage) -> int:
    """Return how many strips or tiles a page must have."""
    return 1 if keyframe.is_contiguous else int(math.prod(keyframe.chunked))
