"""The report of a batch: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import time
from html import escape
from typing import TYPE_CHECKING

from napari_unet.batch.plan import MEASUREMENTS, SUMMARY
from napari_unet.files.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from napari_unet.batch.file import Task
    from napari_unet.batch.job import BatchJob
    from napari_unet.batch.journal import Entry
    from napari_unet.batch.tables import Row
    from napari_unet.models.model import Model

__all__ = ["describe_methods", "write_report"]

MOST_PICTURES = 200

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --bad: #c62828;
  --odd: #b26a00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.soft, figcaption small { color: var(--soft); }
.bad { color: var(--bad); } .odd { color: var(--odd); }
.counts { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1.2rem 0; }
.counts b { display: block; font-size: 1.7rem; line-height: 1.2; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); }
figure { margin: 0; } figure img { width: 100%; background: #000; display: block; }
figcaption { overflow-wrap: anywhere; line-height: 1.3; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_report(
    path: Path,
    job: BatchJob,
    model: Model,
    task: Task,
    rows: Sequence[Row],
    files: int,
) -> None:
    """Write the report.

    Parameters
    ----------
    path : Path
        The file to make or replace.
    job : BatchJob
        With the hash of the model and the versions.
    model : Model
        Its passport is told.
    task : Task
        Says where the pictures are.
    rows : sequence of Row
        The files that are done or failed, in order.
    files : int
        How many there should be.

    Raises
    ------
    BadOutput
        If that fails; a previous report is left as it was.
    """
    parts = [
        _head(job, rows, files),
        _failures(rows),
        _pictures(rows, task),
        _all_files(rows, model.ndim),
        "<h2>For the methods section</h2>",
        f"<p>{escape(describe_methods(job, model))}</p>",
        _facts("Settings", _settings(job, model)),
        _facts("Versions", job.versions.items()),
    ]
    html = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Batch: {_text(job.input.name)}</title><style>{_STYLE}</style></head>"
        "<body>" + "\n".join(filter(None, parts)) + "</body></html>\n"
    )
    with atomic_path(path) as part:
        part.write_text(html, encoding="utf-8")


def _text(text: object) -> str:
    """Escape whatever a name may contain; what is not text is shown as numbers."""
    return escape(str(text).encode(errors="backslashreplace").decode())


def _head(job: BatchJob, rows: Sequence[Row], files: int) -> str:
    done = [row for row in rows if row.entry.status == "done"]
    counts = [
        (len(done), f"of {files} images done", ""),
        (len(rows) - len(done), "failed", "bad"),
        (files - len(rows), "not done yet", "odd"),
        (sum(bool(row.outlier) for row in rows), "unlike the others", "odd"),
        (sum(bool(row.entry.notes) for row in rows), "with notes", "odd"),
    ]
    if any(row.entry.objects is not None for row in done):
        objects = sum(row.entry.objects or 0 for row in done)
        counts.insert(1, (objects, "objects", ""))
    shown = "".join(
        f'<div class="{kind}"><b>{count:,}</b>{what}</div>'
        for count, what, kind in counts
        if count or not kind
    )
    tables = [MEASUREMENTS] * job.measure + [SUMMARY]
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in tables)
    return (
        f"<h1>{_text(job.input.absolute().name)}</h1>"
        f'<p class="soft">{_text(job.input.absolute())} → '
        f"{_text(job.output.absolute())}<br>"
        f"{time.strftime('%Y-%m-%d %H:%M')} · {links}</p>"
        f'<div class="counts">{shown}</div>'
    )


def _failures(rows: Sequence[Row]) -> str:
    failed = [row.entry for row in rows if row.entry.status == "failed"]
    if not failed:
        return ""
    lines = "".join(
        f'<tr><td>{_text(entry.name)}</td><td><span class="bad">{_text(entry.reason)}'
        f"</span>{_notes(entry, '<br>')}</td></tr>"
        for entry in failed
    )
    return f"<h2>Failed</h2><table>{lines}</table>"


def _notes(entry: Entry, before: str = "") -> str:
    if not entry.notes:
        return ""
    return f'{before}<small class="soft">{_text(" ".join(entry.notes))}</small>'


def _pictures(rows: Sequence[Row], task: Task) -> str:
    """Show what is unusual, and of the rest some from the beginning to the end."""
    there = [row for row in rows if task.thumbnail(row.entry.name).is_file()]
    unusual = [row for row in there if row.outlier][:MOST_PICTURES]
    usual = [row for row in there if not row.outlier]
    room = MOST_PICTURES - len(unusual)
    step = max(1, -(-len(usual) // max(room, 1)))
    chosen = unusual + usual[::step][:room]
    if not chosen:
        return ""
    figures = "\n".join(_figure(row, task) for row in chosen)
    some = ""
    if len(chosen) < len(there):
        some = f'<p class="soft">{len(chosen)} of {len(there)} images.</p>'
    return f'<h2>Pictures</h2>{some}<div class="pictures">{figures}</div>'


def _figure(row: Row, task: Task) -> str:
    entry = row.entry
    picture = base64.b64encode(task.thumbnail(entry.name).read_bytes()).decode()
    odd = f'<br><span class="odd">unusual: {row.outlier}</span>' if row.outlier else ""
    return (
        f'<figure><img src="data:image/jpeg;base64,{picture}" loading="lazy" '
        f'alt="{_text(entry.name)}"><figcaption>{_text(entry.name)}<br>'
        f"<small>{_text(entry.found)}, {entry.covered:.1%} covered</small>{odd}"
        "</figcaption></figure>"
    )


def _all_files(rows: Sequence[Row], ndim: int) -> str:
    pixels, micrometres = ("px", "µm²") if ndim == 2 else ("voxels", "µm³")
    lines = []
    for row in rows:
        entry = row.entry
        if entry.status == "failed":
            continue
        size = "" if row.mean_size is None else f"{row.mean_size:.4g} {pixels}"
        if row.mean_micrometres is not None:
            size = f"{row.mean_micrometres:.4g} {micrometres}"
        count = "" if entry.objects is None else f"{entry.objects:,}"
        lines.append(
            f'<tr><td>{_text(entry.name)}</td><td class="n">{count}</td>'
            f'<td class="n">{entry.covered:.1%}</td><td class="n">{size}</td>'
            f'<td class="n">{entry.seconds:.1f}</td><td class="odd">{row.outlier}</td>'
            f"<td>{_notes(entry)}</td></tr>"
        )
    if not lines:
        return ""
    # Notes are to be seen.
    is_open = " open" * any(row.entry.notes for row in rows)
    return (
        f"<h2>All images</h2><details{is_open}><summary>Show the table</summary><table>"
        '<tr><th>Image</th><th class="n">Objects</th><th class="n">Covered</th>'
        '<th class="n">Mean size</th><th class="n">Seconds</th><th>Unusual</th>'
        "<th>Notes</th></tr>" + "\n".join(lines) + "</table></details>"
    )


def _facts(title: str, facts: Iterable[tuple[str, object]]) -> str:
    lines = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>"
        for name, value in facts
    )
    return f"<h2>{title}</h2><table>{lines}</table>"


def _settings(job: BatchJob, model: Model) -> list[tuple[str, object]]:
    told = job.model_dump(mode="json", exclude={"settings", "versions"})
    told |= job.settings.model_dump(mode="json")
    for name in ("threshold", "minimal_size", "split_touching"):
        if told[name] is None:
            told[name] = f"{_plain(getattr(model.passport, name))}, as recommended"
    return [
        (name.replace("_", " "), _plain(value))
        for name, value in told.items()
        if value is not None
    ]


def _plain(value: object) -> object:
    match value:
        case bool():
            return "yes" if value else "no"
        case dict():  # the pixel size
            return ", ".join(f"{axis} {size:g} µm" for axis, size in value.items())
        case list():  # channels
            return ", ".join(map(str, value))
    return value


def describe_methods(job: BatchJob, model: Model) -> str:
    """Write the sentences that a paper needs so that others can repeat it.

    Parameters
    ----------
    job : BatchJob
        With the hash of the model and the versions.
    model : Model
        That was used.
    """
    passport, settings = model.passport, job.settings
    threshold = _or(settings.threshold, passport.threshold)
    smallest = _or(settings.minimal_size, passport.minimal_size)
    split = _or(settings.split_touching, passport.split_touching)
    unit = "voxels" if model.ndim == 3 else "pixels"
    finds = ", ".join(info.name for info in passport.classes[1:]) or "objects"
    programs = ", ".join(
        f"{name} {number}"
        for name, number in job.versions.items()
        if name != "napari-unet"
    )
    sentences = [
        f"Objects ({finds}) were segmented with napari-unet "
        f"{job.versions.get('napari-unet', '')} (U-Net; Ronneberger et al. 2015) and "
        f"its {model.ndim}D model {passport.name}, version {passport.version} (SHA-256 "
        f"{job.model_sha256}), at a probability threshold of {threshold:g}."
    ]
    if smallest:
        sentences.append(f"Objects of fewer than {smallest} {unit} were left out.")
    if split:
        sentences.append("Touching objects were separated at their necks.")
    if settings.test_time_augmentation:
        sentences.append("Probabilities were averaged over 8 flips and rotations.")
    if passport.pixel_size:
        sizes = " × ".join(f"{size:.3g}" for size in passport.pixel_size)
        sentences.append(
            f"Images of another pixel size than the model's ({sizes} µm) were rescaled "
            "for the network."
        )
    sentences.append(f"Programs: {programs}. {_REFERENCE}")
    if passport.citation:
        sentences.append(f"Model: {passport.citation}")
    return " ".join(sentences)


_REFERENCE = (
    "Ronneberger, O., Fischer, P. & Brox, T. U-Net: convolutional networks for "
    "biomedical image segmentation. MICCAI 2015, LNCS 9351, 234-241."
)


def _or(told: float | None, recommended: float) -> float:
    return recommended if told is None else told
