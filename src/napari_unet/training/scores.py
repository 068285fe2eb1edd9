"""How well predicted labels agree with true labels.

Objects are scored as StarDist scores them: true and predicted objects are matched
one to one where they overlap enough, and what finds no partner counts against the
prediction. Pixels are scored by the overlap of the foreground, and by the adapted
Rand error for images without background, such as membranes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from napari_unet.errors import BadInput
from napari_unet.training.matching import (
    Counts,
    Matching,
    Overlap,
    match_objects,
    match_overlap,
    ratio,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "IOU_THRESHOLDS",
    "ImageScores",
    "Matching",
    "Scores",
    "ThresholdScores",
    "match_objects",
    "score_images",
]

# Written out because a sum of 0.05s is not the nearest float to 0.6, and an object
# whose overlap is exactly 3/5 must match at 0.6.
IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class ThresholdScores(Counts):
    """The scores of objects at one IoU threshold, over one or more images."""

    def to_dict(self) -> dict[str, float]:
        """Return every number, JSON-able."""
        return {
            "iou_threshold": self.iou_threshold,
            "tp": self.tp,
            "fp": self.fp,
            "fn": self.fn,
            "average_precision": self.average_precision,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "mean_matched_iou": self.mean_matched_iou,
        }


@dataclass(frozen=True)
class _Scored:
    """What is scored alike for one image and for a data set."""

    thresholds: tuple[ThresholdScores, ...]
    true_pixels: int
    predicted_pixels: int
    shared_pixels: int
    adapted_rand_error: float | None

    @property
    def n_true(self) -> int:
        """The number of true objects."""
        return self.thresholds[0].tp + self.thresholds[0].fn

    @property
    def n_predicted(self) -> int:
        """The number of predicted objects."""
        return self.thresholds[0].tp + self.thresholds[0].fp

    @property
    def mean_average_precision(self) -> float:
        """The mean of the average precision over the IoU thresholds."""
        values = [scores.average_precision for scores in self.thresholds]
        return sum(values) / len(values)

    @property
    def foreground_iou(self) -> float:
        """Pixels that are foreground in both, divided by those in either."""
        either = self.true_pixels + self.predicted_pixels - self.shared_pixels
        return ratio(self.shared_pixels, either, empty=1.0)

    @property
    def foreground_dice(self) -> float:
        """Twice the pixels that are foreground in both, divided by the two sums."""
        both = self.true_pixels + self.predicted_pixels
        return ratio(2 * self.shared_pixels, both, empty=1.0)

    def at(self, iou_threshold: float) -> ThresholdScores:
        """Return the scores of objects at one of `IOU_THRESHOLDS`."""
        return self.thresholds[IOU_THRESHOLDS.index(iou_threshold)]

    def to_dict(self) -> dict[str, object]:
        """Return every number, JSON-able."""
        return {
            "n_true": self.n_true,
            "n_predicted": self.n_predicted,
            "mean_average_precision": self.mean_average_precision,
            "foreground_iou": self.foreground_iou,
            "foreground_dice": self.foreground_dice,
            "adapted_rand_error": self.adapted_rand_error,
            "thresholds": [scores.to_dict() for scores in self.thresholds],
        }


@dataclass(frozen=True)
class ImageScores(_Scored):
    """The scores of one image: the same numbers as in `Scores`."""

    name: str

    def to_dict(self) -> dict[str, object]:
        """Return every number, JSON-able."""
        return {"name": self.name, **super().to_dict()}


@dataclass(frozen=True)
class Scores(_Scored):
    """The scores of a data set.

    Attributes
    ----------
    thresholds : tuple of ThresholdScores
        For each of `IOU_THRESHOLDS` the objects found, invented and missed, summed
        over all images, and what follows from the sums.
    true_pixels, predicted_pixels, shared_pixels : int
        Foreground pixels (any label but 0) summed over all images. `foreground_iou`
        and `foreground_dice` follow from the sums: pixels are pooled, so a large
        image counts for more than a small one. Both are 1 where there is neither
        true nor predicted foreground.
    adapted_rand_error : float or None
        The mean over images of scikit-image's ``adapted_rand_error``: 0 is best, 1
        is worst. As in that function, pixels that are *truly* background are
        ignored, so that objects invented there do not count, and true pixels that
        were predicted to be background count as one predicted object. An image
        without true objects larger than one pixel has no such error and is left
        out; None if that leaves no image.
    images : tuple of ImageScores
        The same for each image alone.
    """

    images: tuple[ImageScores, ...]

    @property
    def n_images(self) -> int:
        """The number of images."""
        return len(self.images)

    def to_dict(self) -> dict[str, object]:
        """Return every number, JSON-able."""
        images = [image.to_dict() for image in self.images]
        return {"n_images": self.n_images, **super().to_dict(), "images": images}

    def to_table(self, *, per_image: bool = False) -> str:
        """Return the scores as aligned plain text.

        Parameters
        ----------
        per_image : bool, optional
            Add one row for each image.

        Returns
        -------
        str
            Several lines, without a newline at the end.
        """
        objects = [["IoU", "AP", "F1", "precision", "recall", "TP", "FP", "FN"]]
        for scores in self.thresholds:
            row = [f"{scores.iou_threshold:.2f}"]
            row += [_number(scores.average_precision), _number(scores.f1)]
            row += [_number(scores.precision), _number(scores.recall)]
            objects.append([*row, str(scores.tp), str(scores.fp), str(scores.fn)])
        objects.append(["mean", _number(self.mean_average_precision), *[""] * 6])
        whole = [
            ["Foreground IoU", _number(self.foreground_iou)],
            ["Foreground Dice", _number(self.foreground_dice)],
            ["Adapted Rand error", _number(self.adapted_rand_error)],
        ]
        parts = [
            f"Images: {self.n_images}   true objects: {self.n_true}   "
            f"predicted objects: {self.n_predicted}",
            _aligned(objects),
            _aligned(whole, left=1) + "   (0 is best, 1 is worst)",
        ]
        if per_image:
            parts.append(_image_table(self.images))
        return "\n\n".join(parts)


def score_images(
    pairs: Iterable[tuple[ArrayLike, ArrayLike]],
    names: Sequence[str] | None = None,
) -> Scores:
    """Score a data set of true and predicted label images.

    Parameters
    ----------
    pairs : iterable of (true, predicted)
        Label images, as for `match_objects`. They are taken one at a time, so that
        a generator never holds more than one pair in memory.
    names : sequence of str, optional
        A name for each image; they are counted if not given.

    Returns
    -------
    Scores
        The scores of the data set and of each image.
    """
    images = []
    for index, (true, predicted) in enumerate(pairs):
        if names is not None and index >= len(names):
            raise BadInput(
                f"There are more images than the {len(names)} names given: "
                "give one name for each image."
            )
        name = f"image {index + 1}" if names is None else names[index]
        try:
            images.append(_score_image(Overlap.of(true, predicted), name))
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    if not images:
        raise BadInput("There is no pair of images to score: give at least one.")
    if names is not None and len(names) != len(images):
        raise BadInput(
            f"{len(names)} names were given for {len(images)} images: "
            "give one name for each image."
        )
    errors = [image.adapted_rand_error for image in images]
    defined = [error for error in errors if error is not None]
    return Scores(
        thresholds=tuple(
            _pooled([image.at(threshold) for image in images])
            for threshold in IOU_THRESHOLDS
        ),
        true_pixels=sum(image.true_pixels for image in images),
        predicted_pixels=sum(image.predicted_pixels for image in images),
        shared_pixels=sum(image.shared_pixels for image in images),
        adapted_rand_error=sum(defined) / len(defined) if defined else None,
        images=tuple(images),
    )


def _score_image(overlap: Overlap, name: str) -> ImageScores:
    matchings = [match_overlap(overlap, threshold) for threshold in IOU_THRESHOLDS]
    return ImageScores(
        thresholds=tuple(_pooled([matching]) for matching in matchings),
        true_pixels=int(overlap.true_sizes.sum()),
        predicted_pixels=int(overlap.predicted_sizes.sum()),
        shared_pixels=int(overlap.pixels.sum()),
        adapted_rand_error=_adapted_rand_error(overlap),
        name=name,
    )


def _pooled(counts: Sequence[Counts]) -> ThresholdScores:
    """Return the sums over images of what was counted at one threshold."""
    tp = sum(image.tp for image in counts)
    iou_sum = sum(image.tp * image.mean_matched_iou for image in counts)
    return ThresholdScores(
        iou_threshold=counts[0].iou_threshold,
        tp=tp,
        fp=sum(image.fp for image in counts),
        fn=sum(image.fn for image in counts),
        mean_matched_iou=ratio(iou_sum, tp, empty=0.0),
    )


def _adapted_rand_error(overlap: Overlap) -> float | None:
    """Return scikit-image's error from the overlaps, None if it is not defined.

    Its own function needs a table with a row for every label up to the largest, and
    divides by zero where no two pixels belong to one true object.
    """
    found = np.bincount(overlap.rows, overlap.pixels, len(overlap.true_sizes))
    missed = overlap.true_sizes - found
    columns = np.bincount(overlap.columns, overlap.pixels, len(overlap.predicted_sizes))
    in_both = _pixel_pairs(overlap.pixels) + _pixel_pairs(missed)
    in_true = _pixel_pairs(overlap.true_sizes)
    in_predicted = _pixel_pairs(columns) + _pixel_pairs(missed.sum())
    if not in_true:
        return None
    return 1.0 - 2 * in_both / (in_true + in_predicted)


def _pixel_pairs(sizes: NDArray) -> float:
    # In float: the squared size of a region of a large volume overflows integers.
    sizes = np.asarray(sizes, np.float64)
    return float((sizes * (sizes - 1)).sum())


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Return rows of cells as lines, the first `left` columns flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _image_table(images: Sequence[ImageScores]) -> str:
    rows = [["image", "true", "predicted", "AP 0.50", "F1 0.50", "mean AP", "Dice"]]
    for image in images:
        row = [image.name, str(image.n_true), str(image.n_predicted)]
        row += [_number(image.at(0.5).average_precision), _number(image.at(0.5).f1)]
        row += [_number(image.mean_average_precision), _number(image.foreground_dice)]
        rows.append(row)
    return _aligned(rows, left=1)
