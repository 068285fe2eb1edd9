"""Imports run downwards only, and only the widgets know napari and Qt."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import napari_unet

PACKAGE = Path(napari_unet.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Rooms by floor; those of one floor are neighbours that do not know each other.
FLOORS = [
    {"errors", "steps"},
    {"files", "network", "sample", "child"},
    {"models"},
    {"inference"},
    {"training"},
    {"batch"},
    {"widgets", "cli"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
GUI = {"napari", "qtpy", "magicgui", "superqt"}
BINDINGS = {"PyQt5", "PyQt6", "PySide2", "PySide6"}
WITH_GUI = {"widgets"}
# Whoever asks for the version asks the package itself.
PACKAGE_NAMES = {"__version__"}


def room_of(name: str) -> str:
    """``cli`` and ``__main__`` are one room."""
    first = name.split(".")[0]
    return "cli" if first == "__main__" else first


def room_of_file(path: Path) -> str:
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts[0])


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(path: Path, *, types: bool) -> set[str]:
    """Dotted names that a module imports, also within functions.

    With ``types`` also those that only a type checker sees.
    """
    names = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in {path.name}"
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}")
        if is_type_checking(node) and not types:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return names


def own(names: set[str]) -> set[str]:
    """What is imported from this package, without its name."""
    start = "napari_unet."
    return {name.removeprefix(start) for name in names if name.startswith(start)}


def identify(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_room_has_a_floor():
    rooms = {room_of_file(path) for path in MODULES} - {"__init__"}
    assert rooms <= FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_run_downwards(path):
    room = room_of_file(path)
    if room == "__init__":
        return  # the public names, imported lazily
    for name in own(imported(path, types=True)):
        if name in PACKAGE_NAMES:
            continue
        other = room_of(name)
        assert other in FLOOR, f"{name} is no room: import from where it is defined"
        assert other == room or FLOOR[other] < FLOOR[room], (
            f"{room} imports {name} from above"
        )


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_only_widgets_import_napari_and_qt(path):
    if room_of_file(path) in WITH_GUI:
        return
    tops = {name.split(".")[0] for name in imported(path, types=False)}
    assert not tops & (GUI | BINDINGS)


def run_python(code: str) -> set[str]:
    """Run code in a fresh interpreter; return the top-level modules it loaded."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def importing(paths) -> str:
    names = [module_name(path) for path in paths if path.name != "__main__.py"]
    return "\n".join(f"import {name}" for name in names)


def test_everything_but_the_widgets_loads_no_qt_and_no_napari():
    headless = [path for path in MODULES if room_of_file(path) not in WITH_GUI]
    loaded = run_python(importing(headless))
    assert "torch" in loaded
    assert not loaded & (GUI | BINDINGS)


@pytest.mark.parametrize("name", ["__init__", "cli", "sample", "steps", "errors"])
def test_light_modules_load_no_torch(name):
    folder = PACKAGE / name
    path = folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{name}.py"
    loaded = run_python(importing([path]))
    assert "napari_unet" in loaded
    assert not loaded & ({"torch"} | GUI | BINDINGS)


def test_files_load_no_torch():
    assert "torch" not in run_python(importing(sorted(PACKAGE.glob("files/*.py"))))
