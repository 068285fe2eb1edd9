"""A progress bar for any computation of the command line."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from napari_unet.steps import Progress

Step = TypeVar("Step", bound="Progress")
Result = TypeVar("Result")


def follow(
    steps: Generator[Step, Any, Result],
    title: str,
    *,
    unit: str,
    quiet: bool,
    on_step: Callable[[Step, Any], None],
) -> Result:
    """Run a computation to its end behind a bar, which is shown in a terminal only.

    Parameters
    ----------
    steps : generator
        Closed in any case.
    title, unit : str
        Of the bar.
    quiet : bool
        Whether there is no bar at all.
    on_step : callable
        Gets every step and the tqdm bar before that is drawn.
    """
    from tqdm import tqdm

    off = True if quiet else None  # None: off unless in a terminal
    with (
        closing(steps),
        tqdm(
            desc=title, unit=f" {unit}", file=sys.stderr, leave=False, disable=off
        ) as bar,
    ):
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            on_step(step, bar)
            bar.total, bar.n = step.total, step.done
            bar.refresh()
