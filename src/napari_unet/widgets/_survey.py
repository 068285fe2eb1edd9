"""What is annotated, what is wrong with it, and what may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import QObject

from napari_unet.errors import BadInput
from napari_unet.steps import Progress
from napari_unet.widgets._worker import FollowUp

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from napari_unet.training.annotations import Annotation
    from napari_unet.widgets._annotations import AnnotationPanel
    from napari_unet.widgets._pairs import Meaning, Pair

DELAY = 400  # ms after the last change
_MANY = 0.25  # of all planes
_LONGEST = 16  # letters of a name, so that a line is enough
_WORDS = {"objects": ("object", "objects"), "classes": ("class", "classes")}


@dataclass(frozen=True)
class Survey:
    """What is wrong with annotations, what may be, and how much is in each."""

    problems: list[str]
    doubt: str
    counts: list[int | None]


class Surveyor(QObject):
    """Looks at all annotations in a thread, a moment after the last change.

    Parameters
    ----------
    annotations : AnnotationPanel
        What is annotated; lists what is found.
    meaning : callable
        Says what the labels are.
    ndim : callable
        Returns the number of axes that the network sees.
    on_survey : callable
        Called when something was found out.
    """

    def __init__(
        self,
        annotations: AnnotationPanel,
        meaning: Callable[[], Meaning],
        ndim: Callable[[], int],
        on_survey: Callable[[], None],
    ):
        super().__init__(annotations)
        self._annotations = annotations
        self._meaning = meaning
        self._ndim = ndim
        self._on_survey = on_survey
        self._seen: tuple[list[Pair], Meaning] | None = None
        self.problem = ""  # why nothing can be learnt
        self.doubt = ""  # what may not be meant
        self.later = FollowUp(self, DELAY, self._steps, self._show, self._fail)

    def _steps(self) -> Generator[Progress, None, Survey] | None:
        pairs, meaning = self._annotations.pairs.all(), self._meaning()
        self._seen = pairs, meaning
        if not pairs:
            self._show(Survey([], "", []))
            return None
        annotations = [self._annotations.read(pair, meaning) for pair in pairs]
        return survey_steps(annotations, self._ndim())

    def _show(self, survey: Survey) -> None:
        assert self._seen is not None
        pairs, meaning = self._seen
        self._seen = None
        self.problem, self.doubt = " ".join(survey.problems), survey.doubt
        found = zip(pairs, survey.counts, strict=True)
        lines = [describe(pair, count, meaning) for pair, count in found]
        names = [f"{pair.image.name} ← {pair.labels.name}" for pair in pairs]
        self._annotations.listed.setText("\n".join(lines))
        self._annotations.listed.setToolTip("\n".join(names))
        self._on_survey()

    def _fail(self, message: str) -> None:
        self.doubt = message
        self._on_survey()


def survey_steps(
    annotations: Sequence[Annotation], ndim: int
) -> Generator[Progress, None, Survey]:
    """Look for problems and a doubt, and count what is painted.

    Parameters
    ----------
    annotations : sequence of Annotation
        All that a network is to be trained on.
    ndim : int
        Number of axes that the network sees.
    """
    yield Progress(0, 1, "looking at the annotations")
    from napari_unet.training.annotations import find_problems

    problems = find_problems(annotations)
    doubt = "" if problems else _find_doubt(annotations, ndim)
    return Survey(problems, doubt, [_count(annotation) for annotation in annotations])


def _find_doubt(annotations: Sequence[Annotation], ndim: int) -> str:
    """Say how many planes would be learnt as background though nobody painted there."""
    planes = empty = 0
    for one in annotations:
        if one.unpainted == "unknown" or len(one.regions):
            continue
        axes = one.label_axes
        seen = tuple(i for i, axis in enumerate(axes) if axis in "ZYX"[-ndim:])
        painted = np.any(one.labels, axis=seen)
        planes += painted.size
        empty += painted.size - int(np.count_nonzero(painted))
    if empty <= _MANY * planes:
        return ""
    what = "planes" if ndim == 2 else "volumes"
    found = f"{empty} of {planes} {what} are empty: they count as background."
    if planes == 1:
        found = "One image is empty: it counts as background."
    return f"{found} Draw regions, or choose unknown."


def _count(annotation: Annotation) -> int | None:
    from napari_unet.training.annotations import known_pixels

    try:
        known = known_pixels(annotation)
    except BadInput:
        return None
    labels = np.asarray(annotation.labels)
    if known.shape != labels.shape:
        return None
    values = labels[known]
    # Neighbours in a row are mostly equal: much less is left to be sorted.
    starts = values[np.append(True, values[1:] != values[:-1])[: len(values)]]
    background = 1 if annotation.are_scribbles else 0
    return int(np.count_nonzero(np.unique(starts) > background))


def describe(pair: Pair, count: int | None, meaning: Meaning) -> str:
    """Say in a line what is annotated where."""
    image = pair.image.name
    labels = pair.labels.name.removeprefix(f"{image} ")
    parts = [f"{_short(image)} ← {_short(labels)}"]
    if pair.regions is not None:
        number = len(pair.regions.data)
        parts.append(f"{number} region{'s' * (number != 1)}")
    if count is not None:
        one, many = _WORDS[meaning.labels_are]
        parts.append(f"{count} {one if count == 1 else many}")
    return " · ".join(parts)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
