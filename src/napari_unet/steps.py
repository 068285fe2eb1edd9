"""Long computations are generators: each ``yield`` is a tick and a cancel point.

A function whose name ends in ``_steps`` yields :class:`Progress` and returns its
result. Closing the generator cancels it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a computation is.

    Parameters
    ----------
    done, total : int
        Finished units of work and their number; ``total`` may grow when a tile
        is split. A heartbeat repeats the same ``done``.
    message : str
        What is being done, in words, e.g. ``"tile 14 of 36"``.
    note : str
        Something the user should know and that stays true, e.g. that the GPU
        cannot be used. Sent once.
    """

    done: int
    total: int
    message: str = ""
    note: str = ""


def run_to_end(steps: Generator[object, None, Result]) -> Result:
    """Exhaust a generator and return its result: the blocking form.

    Parameters
    ----------
    steps : generator
        Any generator of this package whose name ends in ``_steps``.

    Returns
    -------
    object
        What the generator returns.
    """
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result
