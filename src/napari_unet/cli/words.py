"""How the command line puts things: in one line."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(text: object) -> str:
    """Leave out what would break a line, or command a terminal."""
    return "".join(c if c.isprintable() or _is_byte(c) else " " for c in str(text))


def _is_byte(character: str) -> bool:
    """Tell whether a character stands for a byte of a name that is not text."""
    return "\udc80" <= character <= "\udcff"
