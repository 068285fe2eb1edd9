"""Show that the memory of a batch depends on a plane or a block, not on the image.

python benchmarks/bounded_memory.py [--only stacks plane volume chunks] [--side 512]

Each row is a batch of one image in a process of its own, from the file to labels,
measurements and (of stacks) probabilities. "peak" is the most memory that it ever
used, as the system counted (VmHWM); "before" is what that was when the batch began:
Python, torch, dask and the model. A network made by hand finds bright balls and
discs, so that the number of objects is known; another one is named with --model. The
last rows say what it is worth to keep planes of deep chunks decoded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tifffile
import zarr


@dataclass(frozen=True)
class Case:
    """One image and how it is segmented.

    Parameters
    ----------
    shape : tuple of int
        Of TYX, YX or ZYX.
    axes : str
        One letter for each.
    chunks : tuple of int
        Of an OME-Zarr; without them the image is a compressed TIFF.
    ndim : int
        Of the network.
    distance : int
        Between the centres of two objects, whose radius is a third of that.
    probabilities : bool
        Whether they are written, too.
    divide : int
        By how much the limits in bytes and pixels are lowered, above which the
        program goes plane by plane, and block by block: an image scaled down like
        this takes the way of a large one.
    slab_bytes : int or None
        Of planes that are kept decoded, None for as many as usual.
    model : str
        A name of the library or a path; without it one made by hand.
    """

    shape: tuple[int, ...]
    axes: str
    chunks: tuple[int, ...] = ()
    ndim: int = 2
    distance: int = 40
    probabilities: bool = False
    divide: int = 1
    slab_bytes: int | None = None
    model: str = ""

    def band(self, start: int, stop: int) -> np.ndarray:
        """Make the pixels of some indices of the first axis: a grid of objects."""
        bounds = [(start, stop), *[(0, n) for n in self.shape[1:]]]
        grids = np.ix_(*[np.arange(*part) for part in bounds])[-self.ndim :]
        half = self.distance / 2
        squares = ((grid % self.distance - half) ** 2 for grid in grids)
        disc = sum(squares) < (self.distance / 3) ** 2
        # No two neighbours alike, so that it is compressed as little as a camera's.
        noise = sum(g * k for g, k in zip(grids, (7919, 104729, 1299709), strict=False))
        noise = noise * 2654435761 >> 16
        pixels = (200 + 3000 * disc + noise % 97).astype(np.uint16)
        return np.broadcast_to(pixels, (stop - start, *self.shape[1:]))

    def write(self, folder: Path) -> None:
        """Write the image band by band."""
        folder.mkdir()
        if not self.chunks:
            tifffile.imwrite(
                folder / "image.tif",
                (self.band(i, i + 1)[0] for i in range(self.shape[0])),
                shape=self.shape,
                dtype=np.uint16,
                compression="zlib",
                metadata={"axes": self.axes},
                bigtiff=True,
            )
            return
        group = zarr.open_group(folder / "image.zarr", mode="w", zarr_format=2)
        axes = [{"name": letter.lower(), "type": "space"} for letter in self.axes]
        scale = {"type": "scale", "scale": [1.0] * len(axes)}
        level = {"path": "0", "coordinateTransformations": [scale]}
        group.attrs["multiscales"] = [
            {"version": "0.4", "axes": axes, "datasets": [level]}
        ]
        array = group.create_array(
            "0", shape=self.shape, chunks=self.chunks, dtype=np.uint16
        )
        for start in range(0, self.shape[0], self.chunks[0]):
            stop = min(start + self.chunks[0], self.shape[0])
            array[start:stop] = self.band(start, stop)


@dataclass(frozen=True)
class Row:
    """What a batch has used: MiB and seconds, and what it has found."""

    before: float
    peak: float
    seconds: float
    objects: int


def make_model(path: Path, ndim: int) -> None:
    """Save a network made by hand: bright pixels are objects."""
    import torch

    from napari_unet import Model, UNet, save_model

    network = UNet(
        1, 1, depth=1, base_channels=1, convs_per_level=1, norm=None, ndim=ndim
    )
    centre = (0, 0, *[1] * ndim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.encoder[0][0].weight[centre] = 1
        network.decoder[0][0].weight[centre] = 1  # the skip connection
        network.head.weight.fill_(20)
        network.head.bias.fill_(-10)
    save_model(Model(network.eval()), path)


def lower_limits(case: Case) -> None:
    """Let a small image take the way of a large one."""
    from napari_unet.batch import file, volume
    from napari_unet.files import measurements, slabs, stack
    from napari_unet.inference import source

    for module, name in (
        *((file, "LAZY_BYTES"), (file, "LAZY_VALUES"), (volume, "BLOCK_PIXELS")),
        *((measurements, "PIECE_PIXELS"), (stack, "TILED_PIXELS")),
        *((stack, "SLAB_PIXELS"), (slabs, "SLAB_BYTES")),
        *((source, "SAMPLE_PIXELS"), (source, "MAX_PLANE_BYTES")),
    ):
        setattr(module, name, getattr(module, name) // case.divide)
    side = round(case.divide ** (1 / 2))
    measurements.BAND_ROWS //= side
    volume.BLOCK_SHAPES[2] = tuple(n // side for n in volume.BLOCK_SHAPES[2])
    side = round(case.divide ** (1 / 3))
    volume.BLOCK_SHAPES[3] = tuple(n // side for n in volume.BLOCK_SHAPES[3])
    if case.slab_bytes is not None:
        slabs.SLAB_BYTES = case.slab_bytes


def peak() -> float:
    """Return the most memory that this process has ever used, in MiB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def measure(case: Case, folder: Path) -> Row:
    """Segment the image in the folder "in" into "out", in this process."""
    import dask.array  # noqa: F401 (else a part of the peak of large images alone)

    from napari_unet import load_model
    from napari_unet.batch.folder import batch_steps
    from napari_unet.batch.job import BatchJob, SegmentSettings
    from napari_unet.steps import run_to_end

    lower_limits(case)
    model = case.model
    if not model:
        model = str(folder / "m.safetensors")
        make_model(Path(model), case.ndim)
    load_model(model)
    job = BatchJob(
        input=folder / "in",
        output=folder / "out",
        model=model,
        axes=case.axes,
        format="ome.zarr" if case.chunks else "tif",
        probabilities=case.probabilities,
        measure=True,
        settings=SegmentSettings(device="cpu"),
    )
    before, started = peak(), time.perf_counter()
    report = run_to_end(batch_steps(job))
    seconds = time.perf_counter() - started
    if report.error:
        raise report.error
    return Row(before, peak(), seconds, report.entries[0].objects or 0)


def read_planes(case: Case) -> float:
    """Return the seconds that it takes to read plane after plane."""
    from napari_unet.files import slabs
    from napari_unet.files.images import read_image

    usual = slabs.SLAB_BYTES
    with tempfile.TemporaryDirectory() as folder:
        case.write(Path(folder) / "in")
        slabs.SLAB_BYTES = usual if case.slab_bytes is None else case.slab_bytes
        try:
            image = read_image(Path(folder) / "in" / "image.zarr", max_bytes=0)
        finally:
            slabs.SLAB_BYTES = usual
        started = time.perf_counter()
        for index in range(case.shape[0]):
            np.asarray(image.data[index])
        return time.perf_counter() - started


def start(case: Case, folder: Path) -> subprocess.Popen[str]:
    """Write the image, and begin to segment it in a process of its own."""
    case.write(folder / "in")
    told = json.dumps([asdict(case), str(folder)])
    command = [sys.executable, __file__, "--case", told]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> Row:
    """Wait for `start`."""
    output, _ = child.communicate()
    if child.returncode:
        raise SystemExit(child.returncode)
    return Row(**json.loads(output.splitlines()[-1]))


def run(name: str, case: Case) -> Row:
    """Measure in a process of its own, and print a row."""
    with tempfile.TemporaryDirectory() as folder:
        row = finish(start(case, Path(folder)))
    print(
        f"{name:<32}{row.before:>8.0f}{row.peak:>8.0f}{row.seconds:>9.1f}"
        f"{np.prod(case.shape) / row.seconds / 1e6:>10.1f}{row.objects:>10}",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a name of the library, or a path")
    parser.add_argument("--side", type=int, default=512, help="of the planes of stacks")
    parser.add_argument("--large", type=int, default=20_000, help="side of the plane")
    parser.add_argument("--deep", type=int, default=700, help="side of the volume")
    kinds = ("stacks", "plane", "volume", "chunks")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        case, folder = json.loads(options.case)
        row = measure(Case(**case), Path(folder))
        print(json.dumps(asdict(row)))
        return
    heads = ("before", "peak", "seconds", "Mpixel/s", "objects")
    widths = (8, 8, 9, 10, 10)
    told = (f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))
    print(f"{'MiB':<32}" + "".join(told))
    side, model = options.side, options.model
    if "stacks" in options.only:
        for planes in (50, 500):
            case = Case((planes, side, side), "TYX", probabilities=True, model=model)
            run(f"{planes} planes of {side}²", case)
    if "plane" in options.only:
        case = Case((options.large,) * 2, "YX", (1024, 1024), model=model)
        run(f"a plane of {options.large:,}²", case)
    if "volume" in options.only and not model:
        case = Case((options.deep,) * 3, "ZYX", (64, 128, 128), ndim=3)
        run(f"a volume of {options.deep}³", case)
    if "chunks" in options.only:
        shape, chunks = (160, 2 * side, 2 * side), (32, 256, 256)
        cases = [
            Case(shape, "ZYX", chunks, distance=256, model=model, slab_bytes=kept)
            for kept in (None, 0)
        ]
        ratio = read_planes(cases[1]) / read_planes(cases[0])
        rows = [run(f"chunks of {chunks[0]} planes", case) for case in cases]
        print(
            "planes kept, or each chunk decoded for every plane: "
            f"{rows[1].seconds / rows[0].seconds:.1f} times faster, "
            f"{ratio:.1f} times of reading alone"
        )


if __name__ == "__main__":
    main()
