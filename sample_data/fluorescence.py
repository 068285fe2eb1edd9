"""Simulated fluorescent nuclei: chromatin emits, the optics blur, a camera counts.

All lengths are in µm. Images are drawn with a margin, so that objects beyond the edge
are cut by it and their haze reaches into the image, as on a real slide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from skimage.measure import label as components

if TYPE_CHECKING:
    from numpy.random import Generator


@dataclass(frozen=True)
class Nucleus:
    """An ellipsoid with an uneven surface, filled with chromatin."""

    centre: np.ndarray
    axes: np.ndarray
    rotation: np.ndarray
    bumps: tuple[np.ndarray, np.ndarray, np.ndarray]
    waves: tuple[np.ndarray, np.ndarray]
    nucleoli: np.ndarray
    brightness: float
    texture: float
    blur: float = 0.0

    def reach(self, direction: np.ndarray) -> float:
        """Return the distance from the centre to the surface in one direction."""
        return float(1 / np.linalg.norm(direction @ self.rotation / self.axes))

    def radius(self, body: np.ndarray) -> np.ndarray:
        """Return 0 at the centre and 1 on the surface, in body coordinates."""
        scaled = body / self.axes
        radius = np.linalg.norm(scaled, axis=-1)
        direction = scaled / np.maximum(radius, 1e-9)[..., None]
        size, wave, phase = self.bumps
        return radius / (1 + np.cos(direction @ wave.T + phase) @ size)

    def chromatin(self, body: np.ndarray) -> np.ndarray:
        """Return the local density of DNA around 1, lower in the nucleoli."""
        wave, phase = self.waves
        grain = np.cos(body @ wave.T + phase).sum(-1) * np.sqrt(2 / len(phase))
        density = np.maximum(1 + self.texture * grain, 0.15)
        for *centre, size in self.nucleoli:
            distance = np.linalg.norm(body - centre, axis=-1) / size
            density *= 1 - 0.5 * np.exp(-(distance**4))
        return density


def random_rotation(rng: Generator, ndim: int) -> np.ndarray:
    """Return a random orthonormal basis."""
    return np.linalg.qr(rng.normal(size=(ndim, ndim)))[0]


def random_nucleus(
    rng: Generator, axes: np.ndarray, brightness: float, rough: float = 1.0
) -> Nucleus:
    """Return a nucleus at the origin with these semi-axes."""
    ndim = len(axes)
    # A sum of plane waves of random direction is a random field with the grain of
    # chromatin that moves and turns with its nucleus.
    direction = rng.normal(size=(40, ndim))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    wavelength = rng.uniform(0.9, 4.0, (40, 1))
    inside = rng.normal(size=(rng.integers(1, 5), ndim)) * 0.33 * axes
    sizes = rng.uniform(0.11, 0.2, (len(inside), 1)) * axes.mean()
    return Nucleus(
        centre=np.zeros(ndim),
        axes=axes,
        rotation=random_rotation(rng, ndim),
        bumps=(
            rough * rng.uniform(0.01, 0.05, 7),
            rng.normal(size=(7, ndim)) * 2.4,
            rng.uniform(0, 2 * np.pi, 7),
        ),
        waves=(2 * np.pi / wavelength * direction, rng.uniform(0, 2 * np.pi, 40)),
        nucleoli=np.hstack([inside, sizes]),
        brightness=brightness,
        texture=rng.uniform(0.08, 0.2),
    )


class Slide:
    """The labels of nuclei and the light they emit, sorted by defocus."""

    def __init__(self, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
        self.shape, self.spacing = shape, np.array(spacing)
        self.extent = np.array(shape) * self.spacing
        self.labels = np.zeros(shape, np.uint16)
        self.light: dict[float, np.ndarray] = {}

    def _box(self, nucleus: Nucleus) -> tuple[tuple[slice, ...], np.ndarray]:
        """Return the pixels around a nucleus and their body coordinates."""
        size = 1.3 * nucleus.axes.max()
        low = np.floor((nucleus.centre - size) / self.spacing).astype(int)
        high = np.ceil((nucleus.centre + size) / self.spacing).astype(int)
        low, high = np.clip(low, 0, self.shape), np.clip(high, 0, self.shape)
        box = tuple(map(slice, low, high))
        pixels = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), -1)
        return box, (pixels * self.spacing - nucleus.centre) @ nucleus.rotation

    def free_part(self, nucleus: Nucleus) -> float:
        """Return how much of a nucleus would not lie on another one."""
        box, body = self._box(nucleus)
        inside = nucleus.radius(body) < 1
        return 1 - np.mean(self.labels[box][inside] > 0) if inside.any() else 0.0

    def add(self, nucleus: Nucleus, label: int) -> None:
        """Draw a nucleus; where it lies on another one, the other keeps its label."""
        box, body = self._box(nucleus)
        radius = nucleus.radius(body)
        # In two dimensions the light is that of the whole thickness, which falls to
        # the rim of a flat cell; in three, every voxel has its own.
        exponent = 0.3 if len(self.shape) == 2 else 0.1
        thickness = np.maximum(1 - radius**2, 0) ** exponent
        light = self.light.setdefault(nucleus.blur, np.zeros(self.shape))
        light[box] += nucleus.brightness * thickness * nucleus.chromatin(body)
        visible = (radius < 1) & (self.labels[box] == 0)
        if visible.any():
            pieces = components(visible, connectivity=1)
            visible = pieces == np.bincount(pieces[pieces > 0]).argmax()
        self.labels[box][visible] = label

    def image(self, psf: tuple[float, ...], haze: float) -> np.ndarray:
        """Return the light after the optics, with Gaussian `psf` widths in µm.

        A wide-field microscope also gathers light from above and below the focus:
        the part `haze` of all light arrives spread out widely.
        """
        sharp = sum(
            ndi.gaussian_filter(light, np.hypot(psf, blur) / self.spacing)
            for blur, light in self.light.items()
        )
        near = ndi.gaussian_filter(sharp, 3.0 / self.spacing)
        far = ndi.gaussian_filter(sharp, 14.0 / self.spacing)
        return (1 - haze) * sharp + haze * (0.6 * near + 0.4 * far)


def scatter(
    rng: Generator, slide: Slide, nuclei: list[Nucleus], crowding: float
) -> list[Nucleus]:
    """Put nuclei on a slide, the part `crowding` of them against another one."""
    placed: list[Nucleus] = []
    for nucleus in nuclei:
        for _ in range(200):
            centre = rng.uniform(0, slide.extent)
            if placed and rng.random() < crowding:
                other = placed[rng.integers(len(placed))]
                way = rng.normal(size=len(centre))
                way /= np.linalg.norm(way)
                gap = rng.uniform(0.94, 1.02)
                centre = other.centre + gap * way * (
                    other.reach(way) + nucleus.reach(way)
                )
            candidate = replace(nucleus, centre=centre)
            if slide.free_part(candidate) > 0.96:
                placed.append(candidate)
                slide.add(candidate, len(placed))
                break
    return placed


def expose(rng: Generator, photons: np.ndarray, gain: float = 2.2) -> np.ndarray:
    """Return what a camera records: shot noise, read noise and an offset of 100."""
    electrons = rng.poisson(photons) + rng.normal(0, 1.8, photons.shape)
    return np.clip(np.rint(100 + gain * electrons), 0, 65535).astype(np.uint16)


def illumination(shape: tuple[int, int], fall: float) -> np.ndarray:
    """Return the brightness of a lamp that is not quite centred."""
    y, x = (np.linspace(-1, 1, n) for n in shape)
    return 1 - fall * ((y[:, None] - 0.25) ** 2 + (x[None] + 0.2) ** 2) / 2


def cultured_nucleus(rng: Generator) -> Nucleus:
    """Return a nucleus of a cell line as it lies flat in a dish."""
    if rng.random() < 0.035:
        # A metaphase plate seen from the side: condensed, hence narrow and bright.
        plate = np.array([rng.uniform(3.6, 4.8), rng.uniform(1.5, 2.1)])
        nucleus = random_nucleus(rng, plate, rng.uniform(2.2, 3.0), rough=2.6)
        return replace(nucleus, nucleoli=np.zeros((0, 3)), blur=0.4)
    size = rng.lognormal(np.log(4.9), 0.13)
    ratio = rng.uniform(0.55, 0.92)
    axes = size * np.array([ratio**-0.5, ratio**0.5])
    # Cells in G2 have twice the DNA of cells in G1.
    brightness = rng.lognormal(0, 0.28) * rng.choice([1.0, 1.6], p=[0.75, 0.25])
    blur = rng.choice([0.0, 0.4, 1.0], p=[0.62, 0.3, 0.08])
    return replace(random_nucleus(rng, axes, brightness), blur=float(blur))


def make_nuclei(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a wide-field image of stained nuclei, many of them touching."""
    margin, spacing = 40, 0.325
    slide = Slide((512 + 2 * margin,) * 2, (spacing,) * 2)
    scatter(rng, slide, [cultured_nucleus(rng) for _ in range(128)], crowding=0.6)
    light = slide.image((0.3, 0.3), haze=0.3)[margin:-margin, margin:-margin]
    medium = 0.05
    photons = 190 * (light + medium) * illumination(light.shape, 0.45)
    return expose(rng, photons), slide.labels[margin:-margin, margin:-margin]


@dataclass(eq=False)
class Cell:
    """A nucleus that crawls about and may divide."""

    nucleus: Nucleus
    label: int
    velocity: np.ndarray
    divides_at: int
    born_at: int | None = None

    def at(self, frame: int) -> Nucleus:
        """Return the nucleus as it looks in one frame."""
        if frame == self.divides_at - 1:
            return self._condensed(np.array([5.4, 1.9]), 2.2)
        if frame == self.divides_at - 2:
            return self._condensed(0.78 * self.nucleus.axes, 1.5)
        if self.born_at is None:
            return self.nucleus
        # After anaphase the chromatin of a daughter decondenses and swells.
        rest = np.exp(-(frame - self.born_at) / 1.6)
        axes = self.nucleus.axes * (1 - rest) + np.array([4.3, 1.6]) * rest
        return self._condensed(axes, 1 + 1.2 * rest)

    def _condensed(self, axes: np.ndarray, factor: float) -> Nucleus:
        nucleus = self.nucleus
        nucleoli = nucleus.nucleoli * min(1.0, axes.min() / nucleus.axes.min())
        brightness = nucleus.brightness * factor
        return replace(nucleus, axes=axes, brightness=brightness, nucleoli=nucleoli)


def divide(rng: Generator, mother: Cell, frame: int, label: int) -> list[Cell]:
    """Return two daughters, drawn apart across the plate."""
    way = mother.nucleus.rotation[:, 1]
    daughters = []
    for index, side in enumerate((-1, 1)):
        size = rng.uniform(0.74, 0.86)
        nucleus = random_nucleus(
            rng, mother.nucleus.axes * size, 0.85 * mother.nucleus.brightness
        )
        nucleus = replace(
            nucleus,
            centre=mother.nucleus.centre + side * 2.9 * way,
            rotation=mother.nucleus.rotation,
        )
        daughters.append(Cell(nucleus, label + index, side * 2.4 * way, 99, frame))
    return daughters


def crawl(rng: Generator, cells: list[Cell], frame: int) -> None:
    """Move every cell on by one frame: a persistent walk of nuclei that keep apart."""
    for cell in cells:
        turn = rng.normal(0, 0.08)
        c, s = np.cos(turn), np.sin(turn)
        cell.velocity = 0.7 * cell.velocity + rng.normal(0, 0.45, 2)
        cell.nucleus = replace(
            cell.nucleus,
            centre=cell.nucleus.centre + cell.velocity,
            rotation=np.array([[c, -s], [s, c]]) @ cell.nucleus.rotation,
        )
    for _ in range(30):
        for i, one in enumerate(cells):
            for other in cells[:i]:
                way = one.nucleus.centre - other.nucleus.centre
                distance = np.linalg.norm(way)
                if distance > 2.5 * one.nucleus.axes.max():
                    continue
                way = way / distance
                reach = one.at(frame).reach(way) + other.at(frame).reach(way)
                push = 0.25 * max(reach - distance, 0) * way
                for cell, step in ((one, push), (other, -push)):
                    centre = cell.nucleus.centre + step
                    cell.nucleus = replace(cell.nucleus, centre=centre)


def make_timelapse(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a film of nuclei that crawl, divide and bleach; labels follow them."""
    n_frames, margin, spacing = 12, 20, 0.65
    shape, inner = (256 + 2 * margin,) * 2, (slice(margin, -margin),) * 2
    start = Slide(shape, (spacing,) * 2)
    nuclei = []
    for _ in range(62):
        axes = rng.lognormal(np.log(7.2), 0.1) * np.array([1.12, 0.85])
        nuclei.append(random_nucleus(rng, axes, rng.lognormal(0, 0.22)))
    cells = [
        Cell(nucleus, index + 1, rng.normal(0, 0.8, 2), 99)
        for index, nucleus in enumerate(scatter(rng, start, nuclei, crowding=0.4))
    ]
    for cell in rng.permutation(np.array(cells, object))[:9]:
        cell.divides_at = int(rng.integers(1, n_frames))
    last = len(cells)
    images, labels = [], []
    for frame in range(n_frames):
        for mother in [cell for cell in cells if cell.divides_at == frame]:
            cells.remove(mother)
            cells += divide(rng, mother, frame, last + 1)
            last += 2
        crawl(rng, cells, frame)
        slide = Slide(shape, (spacing,) * 2)
        for cell in cells:
            slide.add(cell.at(frame), cell.label)
        light = slide.image((0.5, 0.5), haze=0.25)[inner]
        bleached = 150 * np.exp(-frame / 13)
        photons = bleached * (light + 0.05) * illumination(light.shape, 0.3)
        images.append(expose(rng, photons))
        labels.append(slide.labels[inner])
    return np.stack(images), np.stack(labels)


def make_nuclei3d(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a confocal stack of crowded nuclei, blurred along the optical axis."""
    # Light is drawn at twice the sampling along z, so that the optics blur the
    # objects themselves and not their coarse sections.
    z_margin, margin, fine = 10, 24, 0.5
    shape = (48 + 2 * z_margin, 128 + 2 * margin, 128 + 2 * margin)
    slide = Slide(shape, (fine, 0.325, 0.325))
    nuclei = []
    for _ in range(130):
        axes = rng.lognormal(np.log(4.1), 0.1) * rng.uniform(0.75, 1.25, 3)
        nuclei.append(random_nucleus(rng, axes, rng.lognormal(0, 0.25)))
    scatter(rng, slide, nuclei, crowding=0.75)
    inner = (slice(z_margin, -z_margin, 2), *[slice(margin, -margin)] * 2)
    light = slide.image((1.3, 0.3, 0.3), haze=0.25)[inner]
    # Tissue scatters the light that comes from deep inside.
    depth = np.arange(len(light))[:, None, None]
    photons = 110 * np.exp(-depth / 45) * (light + 0.03)
    return expose(rng, photons, gain=3.0), slide.labels[inner]
