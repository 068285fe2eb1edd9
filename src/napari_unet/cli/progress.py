"""A progress bar for any computation of the command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from napari_unet.cli.words import one_line
from napari_unet.steps import run_to_end

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
    bar_format: str | None = None,
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
    bar_format : str, optional
        What the bar shows, as tqdm describes it.
    """
    from tqdm import tqdm

    off = True if quiet else None  # None: off unless in a terminal
    with tqdm(
        desc=title,
        unit=f" {unit}",
        file=sys.stderr,
        leave=False,
        disable=off,
        bar_format=bar_format,
    ) as bar:

        def draw(step: Step) -> None:
            on_step(step, bar)
            bar.total, bar.n = step.total, step.done
            bar.refresh()

        return run_to_end(steps, draw)


class Console:
    """Progress and notes on stderr, results on stdout; nothing if quiet."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._told: set[str] = set()

    def note(self, text: str) -> None:
        """Tell the user something, once."""
        if text and not self._quiet and text not in self._told:
            from tqdm import tqdm

            self._told.add(text)
            tqdm.write(f"Note: {one_line(text)}", file=sys.stderr)

    def result(self, text: str) -> None:
        """Tell what was done."""
        if not self._quiet:
            typer.echo(one_line(text))

    def follow(
        self, steps: Generator[Progress, None, Result], title: str, unit: str = "tiles"
    ) -> Result:
        """Run a computation to its end behind a progress bar."""
        return follow(
            steps,
            title,
            unit=unit,
            quiet=self._quiet,
            on_step=lambda step, bar: self.note(step.note),
        )
