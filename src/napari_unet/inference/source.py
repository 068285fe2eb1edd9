"""An image as the network sees it: planes or volumes, read box by box."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.errors import BadInput
from napari_unet.inference.tiling import mirror_indices
from napari_unet.models.model import check_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.models.model import Model
    from napari_unet.models.normalize import Normalization, Scaling

Region = dict[str, slice]  # start and stop for every axis but the channels

LUMA = np.array([0.2125, 0.7154, 0.0721], dtype=np.float32)  # ITU-R BT.709
MAX_PLANE_BYTES = 512 << 20  # lazy planes up to here are read once, not per tile
MAX_EXACT_PIXELS = 1 << 27  # of arrays in memory, for exact statistics
SAMPLE_PIXELS = 1 << 24  # per channel, for the statistics of lazy images
DEFAULT_AXES = {2: "YX", 3: "ZYX", 4: "TZYX"}


@dataclass(frozen=True)
class _Window:
    """A box of one plane or volume, indexed as if it were the whole image."""

    pixels: NDArray  # channel, *spatial
    start: tuple[int, ...]
    shape: tuple[int, ...]  # loop, channel, *spatial

    @property
    def dtype(self) -> np.dtype:
        return self.pixels.dtype

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray:
        box = index[len(index) - len(self.start) :]
        shifted = tuple(
            slice(part.start - first, part.stop - first)
            for part, first in zip(box, self.start, strict=True)
        )
        return self.pixels[(slice(None), *shifted)]


@dataclass(frozen=True)
class Source:
    """An image with named axes.

    Parameters
    ----------
    image : array
        Anything with ``shape``, ``dtype`` and numpy slicing: numpy, dask, zarr.
    axes : str
        One letter of "TCZYXS" for each axis; S are RGB or RGBA samples.
    channels : tuple of int
        Which channels the network gets, in its order.
    to_gray : bool
        Whether RGB is converted for a network with one channel.
    ndim : int
        Spatial axes of the network: "YX" or "ZYX".
    """

    image: Any
    axes: str
    channels: tuple[int, ...]
    to_gray: bool
    ndim: int

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels."""
        dtype: np.dtype = np.dtype(self.image.dtype)
        return dtype

    @property
    def spatial(self) -> str:
        """The letters that the network convolves over."""
        return "ZYX"[-self.ndim :]

    @property
    def loop(self) -> str:
        """The letters that are gone through one by one, in the image's order."""
        return "".join(a for a in self.axes if a not in self.spatial + "CS")

    @property
    def output_axes(self) -> str:
        """The image's letters without channels: the axes of labels."""
        return "".join(a for a in self.axes if a not in "CS")

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Sides of a plane or volume, as the network sees it."""
        return tuple(self.size(a) for a in self.spatial)

    def size(self, axis: str) -> int:
        """Return the length of an axis."""
        return int(self.image.shape[self.axes.index(axis)])

    def full_region(self, region: Mapping[str, slice] | None) -> Region:
        """Complete a region; raise `BadInput` if it is empty or not of this image."""
        unknown = set(region or {}) - set(self.output_axes)
        if unknown:
            raise BadInput(
                f"The image has no axis {min(unknown)} to choose a part of; it has "
                f"{', '.join(self.output_axes)}."
            )
        full: Region = {}
        for axis in self.output_axes:
            wanted = (region or {}).get(axis, slice(None))
            start, stop, step = wanted.indices(self.size(axis))
            if step != 1:
                raise BadInput(f"Only whole parts can be chosen, not a step of {step}.")
            if stop <= start:
                raise BadInput(
                    f"The chosen part of the image is empty along {axis}; move the "
                    "view onto the image or choose everything."
                )
            full[axis] = slice(start, stop)
        return full

    def units(self, region: Region) -> Iterator[dict[str, int]]:
        """Go through the planes (2D network) or volumes (3D network) of a region."""
        ranges = [region[axis] for axis in self.loop]
        for index in np.ndindex(*[r.stop - r.start for r in ranges]):
            yield {
                axis: r.start + i
                for axis, r, i in zip(self.loop, ranges, index, strict=True)
            }

    def read(
        self, unit: Mapping[str, int], start: Sequence[int], stop: Sequence[int]
    ) -> NDArray:
        """Read a box that lies inside the image.

        Parameters
        ----------
        unit : mapping of str to int
            Index along every axis of ``loop``.
        start, stop : sequence of int
            Along the spatial axes.

        Returns
        -------
        array of shape (channel, *spatial)
            The network's channels in native byte order; perhaps a view of the image.
        """
        box = {
            a: slice(i, j) for a, i, j in zip(self.spatial, start, stop, strict=True)
        }
        kept = [axis for axis in self.axes if axis not in self.loop]
        index = tuple(
            unit[a] if a in unit else box.get(a, slice(None)) for a in self.axes
        )
        try:
            pixels = np.asarray(self.image[index])
        except (OSError, ValueError) as error:  # of a lazy image
            where = "".join(f" at {axis} {i}" for axis, i in unit.items())
            raise BadInput(
                f"The image cannot be read{where}: {error}. Check its file."
            ) from error
        channel = next((a for a in kept if a in "CS"), None)
        order = ([channel] if channel else []) + list(self.spatial)
        pixels = pixels.transpose([kept.index(a) for a in order])
        if channel is None:
            pixels = pixels[None]
        if self.to_gray:
            gray = np.tensordot(LUMA, pixels[:3].astype(np.float32), axes=1)
            return np.asarray(gray)[None]
        if self.channels != tuple(range(len(pixels))):
            pixels = pixels[list(self.channels)]
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)

    def read_mirrored(
        self, unit: Mapping[str, int], start: Sequence[int], stop: Sequence[int]
    ) -> NDArray:
        """Read a box that may reach beyond the image, which is mirrored there."""
        return read_mirrored(
            lambda low, high: self.read(unit, low, high),
            self.spatial_shape,
            start,
            stop,
        )

    def in_memory(self, unit: Mapping[str, int]) -> Source:
        """Return a source of one unit alone, read at once if it is lazy and small."""
        shape = self.spatial_shape
        if isinstance(self.image, np.ndarray) and not self.to_gray:
            return self
        size = math.prod(shape) * len(self.channels)
        if size * self.image.dtype.itemsize > MAX_PLANE_BYTES:
            return self
        pixels = self.read(unit, (0,) * self.ndim, shape)
        # Loop axes of length 0 stride keep the unit's indices valid.
        view = np.broadcast_to(
            pixels, (*[self.size(a) for a in self.loop], *pixels.shape)
        )
        channels = tuple(range(len(pixels)))
        return Source(view, self.loop + "C" + self.spatial, channels, False, self.ndim)

    def windowed(
        self, unit: Mapping[str, int], start: Sequence[int], stop: Sequence[int]
    ) -> Source:
        """Return a source of one box alone, read at once if it is lazy and small."""
        size = math.prod(b - a for a, b in zip(start, stop, strict=True))
        lazy_bytes = size * len(self.channels) * self.dtype.itemsize
        if isinstance(self.image, np.ndarray) or lazy_bytes > MAX_PLANE_BYTES:
            return self
        pixels = self.read(unit, start, stop)
        window = _Window(
            pixels,
            tuple(start),
            (*[self.size(a) for a in self.loop], len(pixels), *self.spatial_shape),
        )
        channels = tuple(range(len(pixels)))
        return Source(
            window, self.loop + "C" + self.spatial, channels, False, self.ndim
        )

    def scaling(
        self,
        how: Normalization,
        unit: Mapping[str, int] | None,
        count: Callable[[NDArray], NDArray[np.int64]] | None = None,
    ) -> Scaling:
        """Fit the normalisation to a unit, or to the whole image when it is None.

        An array in memory is used whole; of a larger lazy image (or beyond
        2**27 pixels) a sample with a fixed seed. For ``count`` see `Normalization.fit`.
        """
        if unit is None:
            units = list(self.units(self.full_region(None)))
        else:
            units = [dict(unit)]
        scaling = how.fit(self._sample(units), count)
        # A bad plane of a stack is background, as other bad pixels are.
        if np.isnan(scaling.fill).all() and (unit is None or not self.loop):
            raise BadInput(
                "The image has no finite pixels: all are NaN or infinite. Check how "
                "it was saved."
            )
        return scaling

    def _sample(self, units: list[dict[str, int]]) -> NDArray:
        pixels_per_unit = math.prod(self.spatial_shape)
        whole = isinstance(self.image, np.ndarray)
        limit = MAX_EXACT_PIXELS if whole else SAMPLE_PIXELS
        if len(units) * pixels_per_unit <= limit:
            return self._read_flat(units)
        random = np.random.default_rng(0)
        some = max(1, SAMPLE_PIXELS // pixels_per_unit)
        chosen = random.choice(len(units), min(some, len(units)), replace=False)
        if pixels_per_unit <= SAMPLE_PIXELS:
            return self._read_flat([units[i] for i in sorted(chosen)])
        # One huge plane or volume: boxes spread over it, each of one plane, as
        # files are made of planes.
        sides = [1, *[round((SAMPLE_PIXELS / 64) ** 0.5)] * 2][-self.ndim :]
        samples = []
        for _ in range(64):
            unit = units[int(random.integers(len(units)))]
            ranges = list(zip(self.spatial_shape, sides, strict=True))
            start = [int(random.integers(max(1, n - side + 1))) for n, side in ranges]
            stop = [
                min(a + side, n) for a, (n, side) in zip(start, ranges, strict=True)
            ]
            box = self.read(unit, start, stop)
            samples.append(box.reshape(len(box), -1))
        return np.concatenate(samples, axis=1)

    def _read_flat(self, units: list[dict[str, int]]) -> NDArray:
        planes = [
            self.read(unit, (0,) * self.ndim, self.spatial_shape) for unit in units
        ]
        if len(planes) == 1:
            return planes[0]
        return np.concatenate([p.reshape(len(p), -1) for p in planes], axis=1)


def read_mirrored(
    read: Any, shape: Sequence[int], start: Sequence[int], stop: Sequence[int]
) -> NDArray:
    """Read a box through ``read(start, stop)``, mirroring what lies outside.

    Parameters
    ----------
    read : callable
        Takes start and stop inside ``shape``; returns (channel, *spatial).
    shape : sequence of int
        Of the spatial axes.
    start, stop : sequence of int
        The box; it may reach outside by any distance.

    Returns
    -------
    array of shape (channel, *(stop - start))
    """
    indices = [
        mirror_indices(a, b, n) for a, b, n in zip(start, stop, shape, strict=True)
    ]
    low = [int(i.min()) for i in indices]
    high = [int(i.max()) + 1 for i in indices]
    pixels: NDArray = read(low, high)
    for axis, (index, first) in enumerate(zip(indices, low, strict=True), start=1):
        pixels = _take(pixels, index - first, axis)
    return pixels


def _take(pixels: NDArray, index: NDArray[np.intp], axis: int) -> NDArray:
    """Do what `np.take` does with mirrored indices, by slices: several times faster."""
    if not index.any():
        return pixels if len(index) == 1 else np.take(pixels, index, axis)
    runs = np.split(index, np.flatnonzero(np.diff(index, 2)) + 2)
    others = (slice(None),) * axis
    parts = [pixels[(*others, _slice(run))] for run in runs]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def _slice(run: NDArray[np.intp]) -> slice:
    """Make a slice of indices that go up or down by one."""
    first, last = int(run[0]), int(run[-1])
    if first <= last:
        return slice(first, last + 1)
    return slice(first, last - 1 if last else None, -1)


def open_source(
    image: Any,
    model: Model,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
) -> tuple[Source, list[str]]:
    """Check that an image fits a model and name what the model gets of it.

    Parameters
    ----------
    image : array
        numpy, dask or zarr; any real dtype in either byte order.
    model : Model
        Says how many spatial axes and channels are needed.
    axes : str, optional
        E.g. "TCZYX"; by default "YX", "ZYX" or "TZYX" by the number of axes.
    channels : sequence of int, optional
        Which channels of the image the model gets, in the model's order.

    Returns
    -------
    source : Source
    notes : list of str
        What was done to the image that the user should know.

    Raises
    ------
    BadInput
        If axes, dtype or channels do not fit, or it is no image or no model.
    """
    check_model(model)
    if isinstance(image, str | os.PathLike):
        raise BadInput(
            f"The image is a path, {str(image)!r}; read the file first, for example "
            "with skimage.io.imread."
        )
    if not hasattr(image, "shape") or not hasattr(image, "dtype"):
        image = np.asarray(image)
    axes = _check_axes(image, axes, model)
    dtype = np.dtype(image.dtype)
    if dtype.kind == "c":
        raise BadInput("The image is complex. Take the magnitude or the phase first.")
    if dtype.kind not in "buif":
        raise BadInput(f"The image has pixels of type {dtype}; numbers are needed.")
    letter = next((a for a in axes if a in "CS"), None)
    count = image.shape[axes.index(letter)] if letter else 1
    notes = []
    needed = len(model.passport.channels)
    to_gray = False
    if channels is not None:
        wrong = [c for c in channels if not 0 <= c < count]
        if wrong:
            raise BadInput(
                f"The image has no channel {wrong[0]}: it has {count}, counted from 0."
            )
        model.check_channels(len(channels))
        chosen = tuple(channels)
    elif letter == "S" and needed == 1 and count >= 3:
        to_gray, chosen = True, (0,)
        notes.append("The colour image is converted to gray for this model.")
    elif letter == "S" and needed == 3 and count == 4:
        chosen = (0, 1, 2)
        notes.append("The alpha channel is left out.")
    else:
        model.check_channels(count)
        chosen = tuple(range(count))
    return Source(image, axes, chosen, to_gray, model.ndim), notes


def _check_axes(image: Any, axes: str | None, model: Model) -> str:
    spatial = "ZYX"[-model.ndim :]
    if axes is None:
        axes = DEFAULT_AXES.get(image.ndim, "")
    axes = axes.upper()
    shape = " x ".join(str(n) for n in image.shape)
    hint = f"Give its axes, e.g. axes='{'TCZYX'[-max(image.ndim, 2) :]}'."
    if len(axes) != image.ndim:
        raise BadInput(
            f"The image has {image.ndim} axes ({shape}), but {axes!r} names "
            f"{len(axes)}. {hint}"
        )
    if (
        len(set(axes)) < len(axes)
        or set(axes) - set("TCZYXS")
        or {"C", "S"} <= set(axes)
    ):
        raise BadInput(
            f"The axes {axes!r} should be different letters out of T, C, Z, Y and X, "
            "or S instead of C for the colours of RGB."
        )
    missing = [a for a in spatial if a not in axes]
    if missing:
        raise BadInput(
            f"The model {model.passport.name!r} works on {spatial}, but the image "
            f"({shape}, axes {axes}) has no {missing[0]}. Correct the axes or choose "
            f"a {'2D' if model.ndim == 3 else '3D'} model."
        )
    for axis, length in zip(axes, image.shape, strict=True):
        if length == 0:
            raise BadInput(f"The image is empty: its axis {axis} has length 0.")
    return axes
