"""YAML that may come from anyone, read as plain data within limits."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

import yaml

from napari_unet.errors import BadModel

MAX_YAML = 1 << 20  # bytes
_MAX_NODES = 20_000  # with all that aliases repeat
_MAX_DEPTH = 50
_DAMAGED = "Get the package again."


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's numbers, and dates as texts; stops at too many values."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            pair
            for pair in pairs
            if not pair[0].endswith((":timestamp", ":float", ":int"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; there are many ways to write one in a letter or two."""
        self._composed += 1
        if self._composed > _MAX_NODES:
            raise ValueError("it is too large")
        return super().compose_node(parent, index)

    def _integer(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 would read as numbers."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._integer)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:int",
        re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$"),
        list("-+0123456789"),
    )
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$", re.I
        ),
        list("-+.0123456789"),
    )


def read_yaml(file: BinaryIO) -> dict[str, Any]:
    """Read a mapping from YAML and close the file.

    Parameters
    ----------
    file : binary file
        Open for reading.

    Returns
    -------
    dict
        Of plain values; dates are texts.

    Raises
    ------
    BadModel
        If it is none, damaged or too large.
    """
    with file:
        text = file.read(MAX_YAML + 1)
    if len(text) > MAX_YAML or text.count(b"\n%") > 100:
        raise BadModel(f"Its description is larger than that of a model. {_DAMAGED}")
    if text.lstrip()[:1] == b"<":
        raise BadModel(
            "It is a web page, not a package. Use the page's own download link."
        )
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _count(node, {}, 0)
            content = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        TypeError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadModel(
            f"Its description is no readable YAML ({reason}). {_DAMAGED}"
        ) from error
    if not isinstance(content, dict):
        raise BadModel(f"Its description is empty or damaged. {_DAMAGED}")
    return content


def write_yaml(content: dict[str, Any]) -> bytes:
    """Write plain values, so that YAML 1.1 and 1.2 read the same."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text.encode()


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Count nodes as if aliases were written out; raise if they are too many."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("it contains itself")
        return known[id(node)]
    known[id(node)] = 0
    children: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    number = 1 + sum(_count(child, known, depth + 1) for child in children)
    if number > _MAX_NODES or depth > _MAX_DEPTH:
        raise ValueError("it is too large")
    known[id(node)] = number
    return number
