"""What a batch holds in memory depends on a plane or a block, not on the image.

The images are those of ``benchmarks/bounded_memory.py``, from the file to the results.
In the default suite they are scaled down, and so are the limits beyond which an image
is read, segmented and written in parts.
"""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_cases import hashes
from zarr.storage import LocalStore

from napari_unet.batch import file, volume
from napari_unet.files import measurements, slabs, stack
from napari_unet.inference import source

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "bounded_memory.py"
    spec = importlib.util.spec_from_file_location("bounded_memory", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bounded_memory"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bounded_memory"]


@pytest.fixture
def segmented(benchmark, tmp_path, monkeypatch):
    """Run cases in this process; lower the limits for each alone."""

    def run(case):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        case.write(folder / "in")
        with monkeypatch.context() as patch:
            for module, name in (
                *((file, "LAZY_BYTES"), (file, "LAZY_VALUES")),
                *((volume, "BLOCK_PIXELS"), (measurements, "PIECE_PIXELS")),
                *((stack, "TILED_PIXELS"), (stack, "SLAB_PIXELS")),
                *((source, "SAMPLE_PIXELS"), (source, "MAX_PLANE_BYTES")),
                *((measurements, "BAND_ROWS"), (slabs, "SLAB_BYTES")),
            ):
                patch.setattr(module, name, getattr(module, name))
            patch.setattr(volume, "BLOCK_SHAPES", {**volume.BLOCK_SHAPES})
            return benchmark.measure(case, folder), folder / "out"

    return run


@pytest.fixture
def exact_peaks(monkeypatch):
    """Let processes give back at once what they do not need, for peaks without chance.

    Else the allocator keeps tens of megabytes, more or fewer in each run.
    """
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    for name in "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_":
        monkeypatch.setenv(name, "65536")


def peaks(benchmark, folder, *cases):
    """Run cases in a process each, beside each other."""
    children = []
    for number, case in enumerate(cases):
        (folder / str(number)).mkdir()
        children.append(benchmark.start(case, folder / str(number)))
    return [benchmark.finish(child) for child in children]


STACK = {"axes": "TYX", "distance": 40, "probabilities": True, "divide": 256}
PLANE = {"axes": "YX", "distance": 64, "chunks": (128, 128), "divide": 64}
VOLUME = {"axes": "ZYX", "ndim": 3, "chunks": (32, 32, 32), "divide": 64}


@linux
@pytest.mark.parametrize(
    ("small", "large", "options"),
    [
        pytest.param((50, 128, 128), (250, 128, 128), STACK, id="stack"),
        pytest.param((2048, 1024), (6144, 1024), PLANE, id="plane"),
        pytest.param(
            (200, 128, 128),
            (600, 128, 128),
            VOLUME,
            marks=pytest.mark.slow,
            id="volume",
        ),
    ],
)
@pytest.mark.usefixtures("exact_peaks")
def test_peak_does_not_grow_with_the_image(benchmark, tmp_path, small, large, options):
    cases = (benchmark.Case(shape, **options) for shape in (small, large))
    low, high = peaks(benchmark, tmp_path, *cases)
    assert high.objects == math.prod(large) // math.prod(small) * low.objects
    # What was added has labels, and probabilities as many, of four bytes a pixel:
    # either alone is more than the peak may grow.
    added = 4 * (math.prod(large) - math.prod(small)) / 2**20
    assert high.peak - low.peak < added


@pytest.mark.parametrize(
    ("shape", "options"),
    [((600, 700), PLANE), ((70, 90, 100), VOLUME)],
    ids=["plane", "volume"],
)
def test_a_batch_in_blocks_is_that_of_the_whole(benchmark, segmented, shape, options):
    whole = benchmark.Case(shape, **{**options, "divide": 1, "distance": 24})
    one, wanted = segmented(whole)
    many, found = segmented(replace(whole, divide=64))
    assert one.objects == many.objects > 20
    assert hashes(found / "image.ome.zarr") == hashes(wanted / "image.ome.zarr")
    for table in ("measurements.csv", "summary.csv"):
        assert (found / table).read_bytes() == (wanted / table).read_bytes()


def test_each_deep_chunk_is_decoded_once_for_each_purpose(
    benchmark, segmented, monkeypatch
):
    """40 planes in chunks of 16, of which each plane meets 2 x 2."""
    read, get = [], LocalStore.get

    async def counted(self, key, *args, **options):
        if "in/image.zarr" in self.root.as_posix() and key[0].isdigit():
            read.append(key)
        return await get(self, key, *args, **options)

    monkeypatch.setattr(LocalStore, "get", counted)
    # What is kept is just enough for 16 planes.
    case = benchmark.Case((40, 64, 64), "ZYX", (16, 32, 32), distance=16, divide=2048)
    segmented(case)
    chunks = {key for key in read if key != "0/.zarray"}
    assert len(chunks) == 3 * 2 * 2
    # For the statistics of a sample, to predict, to measure, and one plane to show.
    assert len(read) <= 3 * len(chunks) + 4
    read.clear()
    segmented(replace(case, slab_bytes=0))
    assert len(read) > 2 * 40 * 4


@linux
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((100, 2048, 2048), {"axes": "TYX", "probabilities": True}),
        ((20_000, 20_000), {"axes": "YX", "chunks": (1024, 1024)}),
        ((640, 640, 640), {"axes": "ZYX", "ndim": 3, "chunks": (64, 128, 128)}),
    ],
    ids=["stack", "plane", "volume"],
)
def test_large_images_pass_in_two_gigabytes(benchmark, tmp_path, shape, options):
    case = benchmark.Case(shape, **options)
    # Labels and probabilities alone would not fit.
    assert 8 * math.prod(shape) > 2e9
    (row,) = peaks(benchmark, tmp_path, case)
    # One where a whole distance lies within the image: the rest has no centre.
    planes, sides = math.prod(shape[: -case.ndim]), shape[-case.ndim :]
    assert row.objects >= planes * math.prod(n // case.distance for n in sides)
    assert row.peak * 2**20 < 2e9
