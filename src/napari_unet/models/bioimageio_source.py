"""The source code of our network as one file that needs torch alone."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ENTRY = "build_network"
_PACKAGE = "napari_unet."
_START = f'''

def {ENTRY}(**config: Any) -> UNet:
    """Build the network from its configuration, as the package names it."""
    return UNet.from_config(UNetConfig.from_dict(config))
'''
_TITLE = '''"""The network of this package, from napari-unet; it needs torch alone."""

from __future__ import annotations

'''

_Place = tuple[str, str]  # a module, and a name in it


@dataclass
class _Module:
    """What a module of ours defines, and whose names it uses."""

    text: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, _Place] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)  # our modules that run before it

    def uses(self, name: str) -> set[str]:
        """Return all names in a definition, also those in its annotations."""
        nodes = ast.walk(self.definitions[name])
        return {node.id for node in nodes if isinstance(node, ast.Name)}


def network_source() -> str:
    """Return the definition of our network as one Python file.

    Returns
    -------
    str
        The classes and functions that `UNet` needs, in the order of their modules, and
        `build_network`, which makes a network of the keywords of its configuration.
    """
    modules: dict[str, _Module] = {}
    needed: list[_Place] = []
    outside: set[_Place] = {("typing", "Any")}
    waiting: list[_Place] = [(f"{_PACKAGE}network.unet", "UNet")]
    while waiting:
        place = waiting.pop()
        module, name = place
        if place in needed:
            continue
        if not module.startswith(_PACKAGE):
            outside.add(place)
            continue
        if module not in modules:
            modules[module] = _read(module)
        known = modules[module]
        if name in known.definitions:
            needed.append(place)
            waiting += [(module, used) for used in known.uses(name)]
        elif name in known.imports:
            waiting.append(known.imports[name])
    names = [name for _, name in needed]
    assert len(names) == len(set(names)), "two definitions of one name"
    parts = [
        _text(modules[module], name)
        for module in _in_order(modules)
        for name in modules[module].definitions
        if (module, name) in needed
    ]
    head = _TITLE + _import_lines(outside)
    return head + "\n\n\n" + "\n\n\n".join(parts) + "\n" + _START


def _read(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    module, tree = _Module(text), ast.parse(text)
    for node in tree.body:
        module.definitions |= dict.fromkeys(_defined(node), node)
        if isinstance(node, ast.ImportFrom) and _is_own(node):
            module.first.append(str(node.module))
    # Also of annotations, and within functions.
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Import):
            module.imports |= {alias.name: ("", alias.name) for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom) and inner.module != "__future__":
            source = str(inner.module)
            module.imports |= {
                alias.name: (source, alias.name) for alias in inner.names
            }
    return module


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).startswith(_PACKAGE)


def _in_order(modules: dict[str, _Module]) -> list[str]:
    """Sort modules so that each comes after those that run before it."""
    found: list[str] = []

    def add(name: str) -> None:
        if name in modules and name not in found:
            for before in modules[name].first:
                add(before)
            found.append(name)

    for name in sorted(modules):
        add(name)
    return found


def _text(module: _Module, name: str) -> str:
    """Return the source of a definition, without the imports of our modules in it."""
    node = module.definitions[name]
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(one.lineno for one in decorators)])
    assert node.end_lineno is not None
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and _is_own(inner):
            assert inner.end_lineno is not None
            dropped |= set(range(inner.lineno, inner.end_lineno + 1))
    lines = module.text.splitlines()
    kept = (n for n in range(first, node.end_lineno + 1) if n not in dropped)
    return "\n".join(lines[n - 1] for n in kept)


def _import_lines(imports: set[_Place]) -> str:
    plain = [f"import {name}" for module, name in sorted(imports) if not module]
    named: dict[str, list[str]] = {}
    for module, name in sorted(imports):
        if module and name != "Self":  # older Pythons have none, and nothing runs it
            named.setdefault(module, []).append(name)
    lines = [f"from {module} import {', '.join(n)}" for module, n in named.items()]
    return "\n".join(plain + lines)
