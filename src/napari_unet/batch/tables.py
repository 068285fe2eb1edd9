"""The tables of a batch: all measurements in one, and a line for each file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from napari_unet.batch.plan import MEASUREMENTS, SUMMARY
from napari_unet.files.table import join_csv_steps, write_csv

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from napari_unet.batch.file import Task
    from napari_unet.batch.journal import Entry
    from napari_unet.steps import Progress

__all__ = [
    "Row",
    "find_outliers",
    "join_measurements_steps",
    "make_rows",
    "write_summary",
]

FEW = 5  # files; among fewer none is unusual
FAR = 3.0  # robust standard deviations
# Standard deviation of a normal distribution by its median absolute deviation.
SIGMA = 1.4826
# Differences below these are never unusual, even if all other files are equal.
LEAST_OBJECTS, LEAST_COVERED = 1.0, 0.001


@dataclass(frozen=True)
class Row:
    """One file in the tables of the batch.

    Parameters
    ----------
    entry : Entry
    mean_size : float or None
        Of its objects in pixels or voxels.
    mean_micrometres : float or None
        The same in µm² or µm³, if the pixel size is known.
    outlier : str
        Which of its numbers are unlike those of the other files, or "".
    """

    entry: Entry
    mean_size: float | None
    mean_micrometres: float | None
    outlier: str


def make_rows(entries: Sequence[Entry], ndim: int) -> list[Row]:
    """Say of each file how large its objects are, and what is unusual about it.

    Parameters
    ----------
    entries : sequence of Entry
        Of the files that are done or failed, in order.
    ndim : int
        Whether objects have areas (2) or volumes (3).
    """
    done = [entry for entry in entries if entry.status == "done"]
    counts = [float(entry.objects or 0) for entry in done]
    covered = [entry.covered for entry in done]
    far = {
        "objects": find_outliers(counts, LEAST_OBJECTS),
        "area covered": find_outliers(covered, LEAST_COVERED),
    }
    unusual: dict[str, list[str]] = {}
    for what, flags in far.items():
        for entry, is_far in zip(done, flags, strict=True):
            if is_far:
                unusual.setdefault(entry.name, []).append(what)
    return [
        Row(entry, *_mean_sizes(entry, ndim), " and ".join(unusual.get(entry.name, ())))
        for entry in entries
    ]


def write_summary(task: Task, rows: Sequence[Row], ndim: int) -> None:
    """Write ``summary.csv``, a line for each file.

    Parameters
    ----------
    task : Task
        Says where.
    rows : sequence of Row
        Of `make_rows`.
    ndim : int
        Whether objects have areas (2) or volumes (3).

    Raises
    ------
    BadOutput
        If that fails; a previous table is left as it was.
    """
    write_csv(task.output / SUMMARY, _summary(rows, ndim))


def join_measurements_steps(
    task: Task, entries: Sequence[Entry]
) -> Generator[Progress, None, None]:
    """Write ``measurements.csv``, a line for each object of all files.

    Parameters
    ----------
    task : Task
        Says where.
    entries : sequence of Entry
        Of the files that are done or failed, in order.

    Yields
    ------
    Progress
        Over the files. Closing the generator leaves a previous table.

    Raises
    ------
    BadInput
        If the measurements of a file have gone.
    BadOutput
        If writing fails; a previous table is left as it was.
    """
    done = [entry.name for entry in entries if entry.status == "done"]
    parts = [task.measurements(name) for name in done]
    yield from join_csv_steps(task.output / MEASUREMENTS, parts)


def find_outliers(values: Sequence[float], least: float) -> list[bool]:
    """Tell which values are far from the median, measured robustly.

    Parameters
    ----------
    values : sequence of float
        With fewer than 5, none is.
    least : float
        Standard deviation that is assumed at least.
    """
    if len(values) < FEW:
        return [False] * len(values)
    middle = median(values)
    sigma = SIGMA * median(abs(value - middle) for value in values)
    return [abs(value - middle) > FAR * max(sigma, least) for value in values]


def _mean_sizes(entry: Entry, ndim: int) -> tuple[float | None, float | None]:
    if not entry.objects:
        return None, None
    size = entry.object_pixels / entry.objects
    axes = "ZYX"[-ndim:]
    if not all(axis in entry.pixel_size for axis in axes):
        return size, None
    return size, size * math.prod(entry.pixel_size[axis] for axis in axes)


def _summary(rows: Sequence[Row], ndim: int) -> dict[str, list[object]]:
    what, unit, cubed = ("area", "px", "um2") if ndim == 2 else ("volume", "vx", "um3")
    entries = [row.entry for row in rows]
    failed = [entry.status == "failed" for entry in entries]
    return {
        "file": [entry.name for entry in entries],
        "status": [entry.status for entry in entries],
        "objects": [entry.objects for entry in entries],
        "covered_fraction": [
            None if bad else entry.covered
            for entry, bad in zip(entries, failed, strict=True)
        ],
        f"mean_{what}_{unit}": [row.mean_size for row in rows],
        f"mean_{what}_{cubed}": [row.mean_micrometres for row in rows],
        "outlier": [row.outlier for row in rows],
        "reason": [entry.reason for entry in entries],
        "notes": [" ".join(entry.notes) for entry in entries],
    }
