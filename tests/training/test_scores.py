import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment
from skimage.metrics import adapted_rand_error

from napari_unet.errors import BadInput
from napari_unet.training.scores import IOU_THRESHOLDS, match_objects, score_images

# Labels need not be consecutive, and few of them on few pixels give many ties.
_LABELS = st.sampled_from([0, 0, 1, 2, 3, 7])
_SHAPES = array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
_PAIRS = _SHAPES.flatmap(
    lambda shape: st.tuples(
        arrays(np.uint16, shape, elements=_LABELS),
        arrays(np.int32, shape, elements=_LABELS),
    )
)


def _brute_force(true, predicted, threshold):
    """StarDist's matching, pair by pair and with one assignment for all objects."""
    true_ids = [label for label in np.unique(true) if label]
    predicted_ids = [label for label in np.unique(predicted) if label]
    iou = np.zeros((len(true_ids), len(predicted_ids)))
    for row, t in enumerate(true_ids):
        for column, p in enumerate(predicted_ids):
            shared = np.sum((true == t) & (predicted == p))
            iou[row, column] = shared / np.sum((true == t) | (predicted == p))
    matched = []
    if iou.size:
        # Unlike StarDist's, without what pairs below the threshold share.
        cost = -np.where(iou >= threshold, 1 + iou / (2 * min(iou.shape)), 0)
        rows, columns = linear_sum_assignment(cost)
        matched = [
            iou[row, column]
            for row, column in zip(rows, columns, strict=True)
            if iou[row, column] >= threshold
        ]
    tp = len(matched)
    return tp, len(predicted_ids) - tp, len(true_ids) - tp, matched


@settings(deadline=None, max_examples=200)
@given(_PAIRS, st.sampled_from([0.05, 0.2, 1 / 3, 0.45, 0.5, 0.55, 0.75, 1.0]))
def test_matching_equals_the_brute_force_one(pair, threshold):
    true, predicted = pair
    matching = match_objects(true, predicted, threshold)
    tp, fp, fn, matched = _brute_force(true, predicted, threshold)
    assert (matching.tp, matching.fp, matching.fn) == (tp, fp, fn)
    assert matching.mean_matched_iou == pytest.approx(np.mean(matched) if tp else 0)
    for t, p, iou in matching.pairs:
        shared = np.sum((true == t) & (predicted == p))
        assert iou == shared / np.sum((true == t) | (predicted == p)) >= threshold
    assert len({pair.true for pair in matching.pairs}) == tp
    assert len({pair.predicted for pair in matching.pairs}) == tp


@settings(deadline=None, max_examples=50)
@given(st.lists(_PAIRS, min_size=1, max_size=4))
def test_a_data_set_is_the_sum_of_its_images(pairs):
    scores = score_images(pairs)
    for threshold in IOU_THRESHOLDS:
        counts = [_brute_force(*pair, threshold) for pair in pairs]
        tp, fp, fn = (sum(count[i] for count in counts) for i in range(3))
        found = scores.at(threshold)
        assert (found.tp, found.fp, found.fn) == (tp, fp, fn)
        if tp + fp + fn:
            assert found.average_precision == pytest.approx(tp / (tp + fp + fn))
        matched = [iou for count in counts for iou in count[3]]
        assert found.mean_matched_iou == pytest.approx(np.mean(matched) if tp else 0)
    true = np.concatenate([true.ravel() > 0 for true, _ in pairs])
    predicted = np.concatenate([predicted.ravel() > 0 for _, predicted in pairs])
    either, both = np.sum(true | predicted), np.sum(true & predicted)
    assert scores.foreground_iou == (both / either if either else 1)
    total = true.sum() + predicted.sum()
    assert scores.foreground_dice == (2 * both / total if total else 1)


@settings(deadline=None, max_examples=100)
@given(_PAIRS)
def test_the_rand_error_is_that_of_scikit_image(pair):
    true, predicted = pair
    scores = score_images([pair])
    if max(np.bincount(true.ravel(), minlength=2)[1:]) < 2:
        assert scores.adapted_rand_error is None
        return
    # Its precision may divide by zero; its error does not once a true object has
    # two pixels.
    with np.errstate(invalid="ignore", divide="ignore"):
        expected, _, _ = adapted_rand_error(true, predicted)
    assert scores.adapted_rand_error == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(_PAIRS, st.permutations([11, 40, 300, 60_000]))
def test_relabelling_changes_nothing(pair, new):
    true, predicted = pair
    renamed = np.zeros(8, np.uint16)
    renamed[[1, 2, 3, 7]] = new
    before = score_images([(true, predicted)])
    assert score_images([(renamed[true], predicted)]) == before
    assert score_images([(true, renamed[predicted])]) == before
    # Labels too large for a look-up table take another path.
    huge = predicted.astype(np.uint64)
    huge[huge > 0] += np.uint64(2**63)
    assert score_images([(true, huge)]) == before


@settings(deadline=None, max_examples=50)
@given(_PAIRS)
def test_exchanging_the_images_exchanges_the_errors(pair):
    there, back = (score_images([p]) for p in (pair, pair[::-1]))
    for one, other in zip(there.thresholds, back.thresholds, strict=True):
        assert (one.tp, one.fp, one.fn) == (other.tp, other.fn, other.fp)
        assert one.precision == other.recall
        assert (one.f1, one.average_precision) == (other.f1, other.average_precision)
    assert there.foreground_iou == back.foreground_iou


@settings(deadline=None, max_examples=50)
@given(_PAIRS)
def test_the_truth_itself_scores_one(pair):
    true, _ = pair
    scores = score_images([(true, true)])
    for at in scores.thresholds:
        assert at.average_precision == at.precision == at.recall == at.f1 == 1
        assert (at.fp, at.fn) == (0, 0)
    assert scores.mean_average_precision == scores.foreground_iou == 1
    assert scores.foreground_dice == 1
    assert scores.adapted_rand_error in (0, None)


def test_hand_computed_scores():
    true = np.array([[1, 1, 1, 1, 0, 2, 2, 0, 3, 3]])
    pred = np.array([[5, 5, 5, 0, 0, 9, 9, 9, 0, 0]])
    matching = match_objects(true, pred, 0.7)
    assert [tuple(pair) for pair in matching.pairs] == [(1, 5, 0.75)]
    assert (matching.tp, matching.fp, matching.fn) == (1, 1, 2)
    assert matching.average_precision == 1 / 4
    assert matching.precision == 1 / 2
    assert matching.recall == 1 / 3
    assert matching.f1 == 2 / 5
    assert match_objects(true, pred, 2 / 3).tp == 2
    scores = score_images([(true, pred)])
    assert scores.foreground_iou == 5 / 9
    assert scores.foreground_dice == 10 / 14
    # Pairs of pixels: 6 + 1 + 1 in true objects; 3 and 1 of them in 5 and 9, and 3
    # among the missed pixels of 1 and 3, of which 1 is within one true object.
    assert scores.adapted_rand_error == pytest.approx(1 - 2 * 5 / (8 + 7))


def test_an_overlap_of_exactly_the_threshold_matches():
    true = np.array([1, 1, 1, 1, 1])
    for shared, threshold in ((3, 0.6), (4, 0.8)):
        predicted = np.arange(5) < shared
        assert match_objects(true, predicted.astype(int), threshold).tp == 1
        assert score_images([(true, predicted.astype(int))]).at(threshold).tp == 1


def test_a_halved_object_is_found_once():
    true, predicted = np.array([4, 4, 4, 4]), np.array([1, 1, 2, 2])
    for pair in ((true, predicted), (predicted, true)):
        matching = match_objects(*pair, 0.5)
        assert (matching.tp, matching.fp + matching.fn) == (1, 1)
        assert matching.mean_matched_iou == 0.5


def test_below_one_half_more_pairs_beat_better_pairs():
    # IoU 1/3 of 1 with 1, 1/2 of 1 with 2, 2/7 of 2 with 2: the best pair alone
    # would leave the two others without a partner.
    true = np.array([1, 1, 1, 1, 1, 1, 2, 2, 2])
    predicted = np.array([1, 1, 2, 2, 2, 2, 2, 2, 0])
    matching = match_objects(true, predicted, 0.25)
    assert {(pair.true, pair.predicted) for pair in matching.pairs} == {(1, 1), (2, 2)}


@pytest.mark.parametrize(
    ("true", "predicted", "score", "rand"),
    [
        ([1, 1, 0], [0, 0, 0], 0, 0),
        ([0, 0, 0], [1, 1, 0], 0, None),
        ([0, 0, 0], [0, 0, 0], 1, None),
        ([], [], 1, None),
    ],
)
def test_without_objects_every_score_is_a_number(true, predicted, score, rand):
    pair = np.array(true, np.uint8), np.array(predicted, np.uint8)
    scores = score_images([pair])
    at = scores.at(0.5)
    assert at.average_precision == at.f1 == at.precision == at.recall == score
    assert scores.mean_average_precision == score
    assert scores.foreground_iou == scores.foreground_dice == score
    assert at.mean_matched_iou == 0
    # As in scikit-image: one object that is missed as a whole was not split.
    assert scores.adapted_rand_error == rand
    assert match_objects(*pair, 0.2).average_precision == score


def test_images_without_a_rand_error_are_left_out_of_its_mean():
    empty, half = np.zeros(4, int), np.array([1, 1, 2, 2])
    merged = np.array([1, 1, 1, 1])
    assert score_images([(empty, empty), (half, merged)]).adapted_rand_error == (
        pytest.approx(adapted_rand_error(half, merged)[0])
    )


def test_wrong_input_is_named():
    labels = np.ones((4, 5), int)
    with pytest.raises(BadInput, match=r"\(4, 5\).*\(5, 4\)"):
        match_objects(labels, labels.T)
    with pytest.raises(BadInput, match="predicted labels are of type float64"):
        match_objects(labels, labels / 2)
    with pytest.raises(BadInput, match="true labels are of type bool"):
        match_objects(labels > 0, labels)
    with pytest.raises(BadInput, match="negative label -1"):
        match_objects(labels, -labels)
    for threshold in (0, 1.1, np.nan):
        with pytest.raises(BadInput, match="IoU threshold"):
            match_objects(labels, labels, threshold)
    with pytest.raises(BadInput, match=r"b\.tif: The true labels have the shape"):
        score_images([(labels, labels), (labels, labels.T)], names=["a.tif", "b.tif"])
    with pytest.raises(BadInput, match="no pair of images"):
        score_images([])
    for names in (["a"], ["a", "b", "c"]):
        with pytest.raises(BadInput, match="one name for each image"):
            score_images([(labels, labels)] * 2, names=names)


def test_the_scores_are_written_as_json_and_as_a_table():
    true = np.array([1, 1, 1, 1, 0, 2, 2, 0])
    predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    pairs = [(true, predicted), (true * 0, true * 0)]
    scores = score_images(iter(pairs), names=["cells.tif", "empty.tif"])
    parsed = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert parsed["n_images"] == 2
    assert (parsed["n_true"], parsed["n_predicted"]) == (2, 1)
    assert [at["iou_threshold"] for at in parsed["thresholds"]] == list(IOU_THRESHOLDS)
    assert parsed["thresholds"][0]["average_precision"] == 1 / 2
    assert parsed["thresholds"][-1]["fn"] == 2
    assert [image["name"] for image in parsed["images"]] == ["cells.tif", "empty.tif"]
    assert parsed["images"][1]["adapted_rand_error"] is None

    lines = scores.to_table().splitlines()
    assert lines[0] == "Images: 2   true objects: 2   predicted objects: 1"
    head, first = lines[2].split(), lines[3].split()
    row = dict(zip(head, first, strict=True))
    found = [row[name] for name in ("IoU", "AP", "F1", "FN")]
    assert found == ["0.50", "0.500", "0.667", "1"]
    assert len({len(line) for line in lines[2:13]}) == 1
    assert "cells.tif" not in scores.to_table()
    assert "cells.tif" in scores.to_table(per_image=True)


def test_many_objects_are_scored_fast():
    rows, columns = np.indices((2048, 2048))
    true = rows // 46 * 45 + columns // 46 + 1
    predicted = np.roll(true, (3, 5), (0, 1))
    start = time.perf_counter()
    scores = score_images([(true, predicted)])
    # All ten thresholds; about a tenth of a second on an idle machine.
    assert time.perf_counter() - start < 3
    assert scores.n_true == 45 * 45
