"""Which predicted objects are which true objects, and which have no partner."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from napari_unet.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Counts",
    "MatchedPair",
    "Matching",
    "Overlap",
    "match_objects",
    "match_overlap",
    "ratio",
]


@dataclass(frozen=True)
class Counts:
    """The objects found, invented and missed at one IoU threshold.

    Where there is neither a true nor a predicted object, nothing is wrong and every
    score is 1. Otherwise a score whose denominator is zero is 0.
    """

    iou_threshold: float
    tp: int
    fp: int
    fn: int
    mean_matched_iou: float
    """The mean IoU of the matched pairs, 0 without any."""

    @property
    def average_precision(self) -> float:
        """``TP / (TP + FP + FN)``: StarDist's "average precision"."""
        return ratio(self.tp, self.tp + self.fp + self.fn, empty=1.0)

    @property
    def precision(self) -> float:
        """The part of the predicted objects that are true: ``TP / (TP + FP)``."""
        return ratio(self.tp, self.tp + self.fp, empty=0.0 if self.fn else 1.0)

    @property
    def recall(self) -> float:
        """The part of the true objects that were found: ``TP / (TP + FN)``."""
        return ratio(self.tp, self.tp + self.fn, empty=0.0 if self.fp else 1.0)

    @property
    def f1(self) -> float:
        """The harmonic mean of both: ``2 TP / (2 TP + FP + FN)``."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn, empty=1.0)


class MatchedPair(NamedTuple):
    """A true object, the predicted object that found it, and how well they overlap."""

    true: int
    predicted: int
    iou: float


@dataclass(frozen=True)
class Matching(Counts):
    """The objects of one image, matched one to one."""

    pairs: tuple[MatchedPair, ...]
    """The matched pairs by increasing true label."""


def match_objects(
    true: ArrayLike, predicted: ArrayLike, iou_threshold: float = 0.5
) -> Matching:
    """Match the true and the predicted objects of one image one to one.

    A pair may match where its intersection over union (IoU) is at least
    `iou_threshold`. Among all ways to match, the one with the most pairs is taken,
    and among these the one with the largest sum of IoUs, as in StarDist.

    Parameters
    ----------
    true, predicted : ndarray of int
        Label images of the same shape and of any number of dimensions; 0 is
        background, each other label one object.
    iou_threshold : float, optional
        Above 0 and at most 1.

    Returns
    -------
    Matching
        Counts of matched (``tp``), invented (``fp``) and missed (``fn``) objects,
        the mean IoU of the matched pairs, and the pairs.

    Notes
    -----
    From 0.5 on, taking pairs greedily is optimal. Two objects of one image do not
    overlap, so at most one has an IoU above 0.5 with a given partner; exactly 0.5
    twice happens only where an object is halved, and then either half will do.
    Below 0.5, an assignment is solved for each group of overlapping objects.
    """
    return match_overlap(Overlap.of(true, predicted), iou_threshold)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Which objects share how many pixels: all that the scores need of two images.

    Objects are numbered from 0 in the order of their labels; ``rows``, ``columns``
    and ``pixels`` list the pairs of a true and a predicted object that touch.
    """

    true_labels: NDArray
    predicted_labels: NDArray
    true_sizes: NDArray[np.int64]
    predicted_sizes: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    pixels: NDArray[np.int64]

    @classmethod
    def of(cls, true: ArrayLike, predicted: ArrayLike) -> Overlap:
        """Return the overlap of two label images, after checking them."""
        true, predicted = np.asarray(true), np.asarray(predicted)
        if true.shape != predicted.shape:
            raise BadInput(
                f"The true labels have the shape {true.shape} and the predicted labels "
                f"{predicted.shape}: compare label images of the same shape."
            )
        true_labels, true_index = _numbered(true, "true")
        predicted_labels, predicted_index = _numbered(predicted, "predicted")
        both = (true_index > 0) & (predicted_index > 0)
        n_columns = max(len(predicted_labels), 1)
        keys = (true_index[both] - 1) * n_columns + (predicted_index[both] - 1)
        keys, pixels = np.unique(keys, return_counts=True)
        rows, columns = np.divmod(keys, n_columns)
        return cls(
            true_labels,
            predicted_labels,
            np.bincount(true_index, minlength=len(true_labels) + 1)[1:],
            np.bincount(predicted_index, minlength=len(predicted_labels) + 1)[1:],
            rows,
            columns,
            pixels,
        )

    @cached_property
    def iou(self) -> NDArray[np.float64]:
        """The intersection over union of each pair that touches."""
        sizes = self.true_sizes[self.rows] + self.predicted_sizes[self.columns]
        return np.asarray(self.pixels / (sizes - self.pixels), np.float64)


def _numbered(labels: NDArray, which: str) -> tuple[NDArray, NDArray[np.int64]]:
    """Return the labels of objects, and each pixel's object as 1, 2, … or 0."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(
            f"The {which} labels are of type {labels.dtype}, not integer: "
            "give label images, in which each object has a whole number of its own."
        )
    flat = labels.ravel()
    if flat.size and flat.min() < 0:
        raise BadInput(
            f"The {which} labels contain the negative label {flat.min()}: use 0 for "
            "background and positive labels for objects."
        )
    largest = int(flat.max()) if flat.size else 0
    if largest > max(flat.size, 2**16):
        # Too large for a look-up table; sorting all pixels works for any label.
        found, index = np.unique(
            np.append(flat, flat.dtype.type(0)), return_inverse=True
        )
        return found[1:], index[:-1]
    is_used = np.zeros(largest + 1, bool)
    is_used[flat] = True
    is_used[0] = False
    found = np.flatnonzero(is_used)
    number = np.zeros(largest + 1, np.int64)
    number[found] = np.arange(1, len(found) + 1)
    return found, number[flat]


def match_overlap(overlap: Overlap, iou_threshold: float) -> Matching:
    """Do what `match_objects` does, with an overlap computed once."""
    if not 0 < iou_threshold <= 1:
        raise BadInput(
            f"The IoU threshold is {iou_threshold}: "
            "give a number above 0 and not above 1."
        )
    (candidates,) = np.nonzero(overlap.iou >= iou_threshold)
    assign = _assign_greedily if iou_threshold >= 0.5 else _assign_optimally
    chosen = candidates[assign(overlap, candidates)]
    pairs = tuple(
        MatchedPair(int(true), int(predicted), float(iou))
        for true, predicted, iou in zip(
            overlap.true_labels[overlap.rows[chosen]],
            overlap.predicted_labels[overlap.columns[chosen]],
            overlap.iou[chosen],
            strict=True,
        )
    )
    return Matching(
        iou_threshold=float(iou_threshold),
        tp=len(pairs),
        fp=len(overlap.predicted_labels) - len(pairs),
        fn=len(overlap.true_labels) - len(pairs),
        mean_matched_iou=ratio(sum(pair.iou for pair in pairs), len(pairs), empty=0.0),
        pairs=pairs,
    )


def _assign_greedily(overlap: Overlap, candidates: NDArray) -> NDArray[np.intp]:
    """Choose among candidates with an IoU of 0.5 or more; see `match_objects`."""
    _, first = np.unique(overlap.rows[candidates], return_index=True)
    _, second = np.unique(overlap.columns[candidates[first]], return_index=True)
    return np.sort(first[second])


def _assign_optimally(overlap: Overlap, candidates: NDArray) -> NDArray[np.intp]:
    """Choose the most pairs and, among these choices, the largest sum of IoUs."""
    rows, columns = overlap.rows[candidates], overlap.columns[candidates]
    n_true, n_predicted = len(overlap.true_labels), len(overlap.predicted_labels)
    n_objects = n_true + n_predicted
    links = coo_array(
        (np.ones(len(rows)), (rows, n_true + columns)), shape=(n_objects, n_objects)
    )
    _, group = connected_components(links, directed=False)
    order = np.argsort(group[rows], kind="stable")
    starts = np.flatnonzero(np.diff(group[rows][order])) + 1
    chosen = [order[:0]]
    for members in np.split(order, starts):
        row_ids, row = np.unique(rows[members], return_inverse=True)
        column_ids, column = np.unique(columns[members], return_inverse=True)
        gain = np.zeros((len(row_ids), len(column_ids)))
        # One pair more outweighs every sum of IoUs, which stays below one half.
        iou = overlap.iou[candidates[members]]
        gain[row, column] = 1 + iou / (2 * min(gain.shape) + 1)
        member = np.full(gain.shape, -1)
        member[row, column] = members
        found = member[linear_sum_assignment(gain, maximize=True)]
        chosen.append(found[found >= 0])
    return np.sort(np.concatenate(chosen))


def ratio(part: float, whole: float, *, empty: float) -> float:
    """Return ``part / whole``, or `empty` where there is no whole."""
    return part / whole if whole else empty
