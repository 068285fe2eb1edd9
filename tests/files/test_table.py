"""Tables come back as they were, and no spreadsheet runs what is in them."""

import csv
import itertools
import math
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unet.errors import BadInput, BadOutput
from napari_unet.files import table
from napari_unet.files.table import join_csv_steps, write_csv, writing_csv
from napari_unet.steps import run_to_end

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\0")
ALSO = (*FORMULA, "\n", "＝", "＋", "－", "＠")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
risky = st.builds(str.__add__, st.sampled_from(FORMULA), texts)


def read(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(texts | risky, st.floats(), st.integers()), max_size=5))
def test_texts_are_harmless_and_numbers_exact(rows):
    names, floats, wholes = zip(*rows, strict=True) if rows else ((), (), ())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        columns = {"file": names, "size": np.array(floats, "f8"), "label": [*wholes]}
        write_csv(path, columns)
        header, *found = read(path)
        content = path.read_bytes()
        write_csv(path, {**columns, "size": floats})
        assert path.read_bytes() == content
    assert header == ["file", "size", "label"]
    assert len(found) == len(rows)
    for (name, size, label), cells in zip(rows, found, strict=True):
        assert not cells[0].startswith(FORMULA)
        # Nothing but the apostrophe is added, and only where it is needed.
        added = cells[0].removesuffix(name)
        assert added == "" or (added == "'" and name.startswith(ALSO))
        assert added + name == cells[0]
        assert cells[1] == "" if not math.isfinite(size) else float(cells[1]) == size
        assert int(cells[2]) == label
        assert set(cells[1]) <= set(string.digits + "+-.e")
    assert b"\r\n" in content
    assert content.count(b"\n") >= len(rows) + 1


def test_kinds_of_cells(tmp_path):
    columns = {
        "=heading": ["a,b", 'c"d', "e\r\nf"],
        "number": [-1, None, np.float64(-0.1)],
        "small": np.array([1, -2, 3], "i2"),
        "truth": [True, False, None],
        "name": ["-5", "é😀", "bytes \udcff"],
    }
    write_csv(tmp_path / "a.csv", columns)
    assert read(tmp_path / "a.csv") == [
        ["'=heading", "number", "small", "truth", "name"],
        ["a,b", "-1", "1", "True", "'-5"],
        ['c"d', "", "-2", "False", "é😀"],
        ["e\r\nf", "-0.1", "3", "", "bytes \\udcff"],
    ]
    with pytest.raises(ValueError, match="zip"):
        write_csv(tmp_path / "b.csv", {"a": [1], "b": []})
    with pytest.raises(BadOutput, match="does not exist"):
        write_csv(tmp_path / "missing" / "b.csv", {"a": [1]})
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@settings(max_examples=30, deadline=None)
@given(cut=st.lists(st.integers(0, 40), max_size=4), rows=st.integers(1, 50))
def test_a_table_in_parts_is_the_same_file(cut, rows):
    columns = {"file": ["=a"] * 40, "size": np.linspace(0, 1, 40), "label": range(40)}
    bounds = sorted({0, *cut, 40})
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        whole, parts = Path(folder) / "whole.csv", Path(folder) / "parts.csv"
        write_csv(whole, columns)
        patch.setattr(table, "ROWS", rows)
        with writing_csv(parts) as write:
            write({name: column[:0] for name, column in columns.items()})
            for start, stop in itertools.pairwise(bounds):
                write({name: column[start:stop] for name, column in columns.items()})
            assert not parts.exists()
        assert parts.read_bytes() == whole.read_bytes()


def test_parts_of_a_table_have_the_same_columns(tmp_path):
    with writing_csv(tmp_path / "a.csv") as write:
        write({"file": ["a"]})
        with pytest.raises(ValueError, match="columns"):
            write({"name": ["b"]})


def test_joined_tables_have_the_columns_of_all(tmp_path):
    parts = [tmp_path / f"{i}.csv" for i in range(4)]
    write_csv(parts[0], {"file": ["a", "=b"], "label": [1, 2], "mean": [0.5, 0.25]})
    write_csv(parts[1], {"file": ["c"], "plane": [0], "label": [7], "mean_red": [1.5]})
    write_csv(parts[2], {"file": [], "label": [], "mean": []})
    write_csv(parts[3], {"mean": [9], "file": ["d"]})
    run_to_end(join_csv_steps(tmp_path / "all.csv", parts))
    assert read(tmp_path / "all.csv") == [
        ["file", "plane", "label", "mean_red", "mean"],
        ["a", "", "1", "", "0.5"],
        ["'=b", "", "2", "", "0.25"],
        ["c", "0", "7", "1.5", ""],
        ["d", "", "", "", "9"],
    ]
    # One table is joined as it is.
    run_to_end(join_csv_steps(tmp_path / "one.csv", parts[:1]))
    assert (tmp_path / "one.csv").read_bytes() == parts[0].read_bytes()
    run_to_end(join_csv_steps(tmp_path / "none.csv", []))
    with pytest.raises(BadInput, match=r"missing\.csv does not exist"):
        run_to_end(
            join_csv_steps(tmp_path / "all.csv", [parts[0], tmp_path / "missing.csv"])
        )
    assert len(read(tmp_path / "all.csv")) == 5
    assert not list(tmp_path.glob(".*"))
