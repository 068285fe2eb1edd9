"""What the tests of batches share: a model that works, images, a run to the end."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cli_cases import hashes, squares, write_image

from napari_unet.batch.folder import batch_steps
from napari_unet.batch.job import BatchJob
from napari_unet.batch.plan import plan_batch_steps
from napari_unet.steps import run_to_end

# What does not depend on when and where a batch ran.
TELLS_TIME = ("journal.jsonl", "report.html", "job.yaml")


def make_images(folder, count=3):
    """Write images of 1, 2, 3 … objects."""
    for i in range(count):
        write_image(folder / f"a{i}.tif", squares(i % 4 + 1))
    return folder


def make_job(place, **options):
    """A batch of the images in ``in`` with the model ``m``, into ``out``."""
    return BatchJob(
        input=place / "in",
        output=place / "out",
        model=str(place / "m.safetensors"),
        **options,
    )


def plan_batch(job):
    """Plan a batch, to the end."""
    return run_to_end(plan_batch_steps(job))


@contextmanager
def unchanged(folder):
    """Whatever happens, images stay as they were."""
    before = hashes(folder)
    try:
        yield
    finally:
        assert hashes(folder) == before


def run(job, **options):
    """Run a batch to its end."""
    with unchanged(job.input):
        return run_to_end(batch_steps(job, **options))


def run_well(job, **options):
    """Run a batch in which nothing may fail."""
    report = run(job, **options)
    assert not [(e.name, e.reason, e.details) for e in report.failed]
    return report


def results(folder):
    """Hashes of everything that must be the same each time."""
    return {
        name: value
        for name, value in hashes(folder).items()
        if not name.startswith(".napari-unet") and name not in TELLS_TIME
    }


def parts(folder):
    """Temporary files and folders."""
    return [
        path
        for path in Path(folder).rglob("*")
        if path.name.endswith(".part") or path.name.startswith("scratch-")
    ]


def label_count(path):
    from napari_unet.files.images import read_image

    return len(np.unique(read_image(path).data)) - 1
