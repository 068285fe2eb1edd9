"""Tables as CSV: exact numbers, harmless texts, one header over many parts."""

from __future__ import annotations

import csv
import itertools
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unet.files.atomic import atomic_path
from napari_unet.files.source import reading
from napari_unet.steps import Progress

if TYPE_CHECKING:
    import os
    from collections.abc import (
        Callable,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

ROWS = 10_000  # that are in memory together, and written between two ticks

# A spreadsheet takes a cell that starts like this for a formula and runs it.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")


def write_csv(
    path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any] | Any]
) -> Path:
    """Write a table: UTF-8, decimal points, quoted as RFC 4180 says.

    Parameters
    ----------
    path : path-like
        The file to make or to replace.
    columns : mapping
        Heading to values, all of the same length: texts, whole numbers, floats,
        truth values, or None for an empty cell. A float has the fewest digits that
        give it back exactly; NaN and infinity are empty cells. A text that a
        spreadsheet would take for a formula gets a leading apostrophe.

    Returns
    -------
    Path
        The file. The same table always gives the same bytes.

    Raises
    ------
    BadOutput
        When writing fails; there is then no new file.
    """
    path = Path(path)
    with writing_csv(path) as write:
        write(columns)
    return path


@contextmanager
def writing_csv(
    path: str | os.PathLike[str],
) -> Iterator[Callable[[Mapping[str, Sequence[Any] | Any]], None]]:
    """Write a table that need not be in memory whole; see :func:`write_csv`.

    Parameters
    ----------
    path : path-like
        The file to make or to replace.

    Yields
    ------
    callable
        Takes some rows of the table, as :func:`write_csv` takes all; each time with
        the same headings.

    Raises
    ------
    BadOutput
        When writing fails; there is then no new file.
    """
    headings: list[str] = []
    with _table(Path(path)) as writer:

        def write(columns: Mapping[str, Sequence[Any] | Any]) -> None:
            if not headings:
                headings.extend(columns)
                writer.writerow(map(_cell, headings))
            if headings != [*columns]:
                raise ValueError(f"columns {[*columns]} in a table of {headings}")
            writer.writerows(_cells([*columns.values()]))

        yield write


def _cells(columns: list[Sequence[Any] | Any]) -> Iterator[Iterator[str]]:
    """Go through the rows of a table; Python's numbers take much more memory."""
    for start in range(0, max(map(len, columns), default=0), ROWS):
        some = [column[start : start + ROWS] for column in columns]
        values = [s.tolist() if isinstance(s, np.ndarray) else s for s in some]
        yield from (map(_cell, row) for row in zip(*values, strict=True))


def join_csv_steps(
    path: str | os.PathLike[str], parts: Iterable[str | os.PathLike[str]]
) -> Generator[Progress, None, Path]:
    """Put tables of :func:`write_csv` under each other.

    Parameters
    ----------
    path : path-like
        The file to make or to replace.
    parts : iterable of path-like
        Tables, read row by row after all their headings. One may have columns that
        another does not have: its cells are empty then.

    Yields
    ------
    Progress
        Over the parts, each of which is opened twice. Closing the generator leaves
        what was at ``path``.

    Returns
    -------
    Path
        The file. Its columns are in the order in which they first appear, each new
        one right behind the one that it follows in its own table.

    Raises
    ------
    BadInput
        When a part cannot be read.
    BadOutput
        When writing fails; there is then no new file.
    """
    path, files = Path(path), [Path(part) for part in parts]
    total = 2 * len(files)
    headings: list[str] = []
    for done, file in enumerate(files):
        yield Progress(done, total, "joining the tables")
        _merge(headings, next(_rows(file), []))
    with _table(path) as writer:
        writer.writerow(headings)
        for done, file in enumerate(files, len(files)):
            rows = _under(headings, file)
            while some := list(itertools.islice(rows, ROWS)):
                yield Progress(done, total, "joining the tables")
                writer.writerows(some)
    return path


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """Make a table for rows of text, which is complete or not there."""
    # A name on a disk may hold bytes that are no text.
    with (
        atomic_path(path) as part,
        open(
            part, "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as file,
    ):
        yield csv.writer(file)


def _cell(value: object) -> str:
    """Write a value as text: numbers exactly, texts harmlessly."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    text = str(value)
    is_risky = isinstance(value, str) and text.startswith(FORMULA)
    return f"'{text}" if is_risky else text


def _rows(part: Path) -> Iterator[list[str]]:
    """Read a table row by row, the headings first."""
    with reading(part), open(part, encoding="utf-8", newline="") as file:
        yield from csv.reader(file, strict=True)


def _under(headings: list[str], part: Path) -> Iterator[list[str]]:
    """Read the rows of a table into the places of these headings."""
    rows = _rows(part)
    own = next(rows, [])
    places = [own.index(name) if name in own else None for name in headings]
    for row in rows:
        yield ["" if i is None else row[i] for i in places]


def _merge(headings: list[str], own: list[str]) -> None:
    """Add the headings that are new, each behind the one that it follows."""
    place = 0
    for name in own:
        if name in headings:
            place = headings.index(name) + 1
        else:
            headings.insert(place, name)
            place += 1
