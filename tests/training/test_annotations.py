from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_array_equal
from skimage.draw import polygon

from napari_unet.errors import BadInput
from napari_unet.training.annotations import (
    Annotation,
    check_annotations,
    derive_truths,
    find_problems,
    known_pixels,
)
from napari_unet.training.weight_map import cut_gaps

POLICIES = [
    (unpainted, labels_are)
    for unpainted in ("background", "unknown")
    for labels_are in ("objects", "classes")
]

small_labels = arrays(
    st.sampled_from([np.uint8, np.int32, np.uint64]),
    array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=8),
    elements=st.integers(0, 4),
    fill=st.just(0),
)


def annotate(labels, regions=(), **options):
    """An annotation whose image does not matter."""
    return Annotation(np.zeros(np.shape(labels)), labels, regions, **options)


def box(top, left, bottom, right, *before):
    """Corners of a box as napari gives them, in a plane of a stack."""
    corners = [(top, left), (top, right), (bottom, right), (bottom, left)]
    return np.array([(*before, *corner) for corner in corners], float)


def derive(labels, regions=(), **options):
    """The only truth of one plane or volume."""
    ndim = options.pop("ndim", np.ndim(labels))
    ((unit, truth),) = derive_truths(annotate(labels, regions, **options), ndim)
    assert unit == {}
    return truth


def two_cells():
    labels = np.zeros((12, 20), np.uint16)
    labels[2:10, 2:8] = 7
    labels[2:10, 8:14] = 3
    return labels


def test_a_complete_layer_of_objects():
    labels = two_cells()
    truth = derive(labels)
    assert truth.known.all()
    cut = cut_gaps(labels)
    assert_array_equal(truth.target, cut > 0)
    assert_array_equal(np.unique(truth.objects), [0, 1, 2])
    assert_array_equal(truth.objects == 1, cut == 3)
    assert (truth.target.dtype, truth.objects.dtype) == (np.uint8, np.int32)
    assert truth.known.dtype == bool


def test_inside_a_region_everything_is_known_and_nothing_outside():
    labels = two_cells()
    truth = derive(labels, [box(0, 0, 7, 10)], unpainted="unknown")
    inside = np.zeros(labels.shape, bool)
    inside[0:8, 0:11] = True
    assert_array_equal(truth.known, inside)
    # The region cuts through both cells.
    assert_array_equal(truth.target, (cut_gaps(labels) > 0) & inside)
    assert_array_equal(np.unique(truth.objects), [0, 1, 2])


def test_labels_from_one_on_are_objects_inside_a_region():
    labels = np.zeros((6, 6), int)
    labels[2:4, 2:4] = 1
    truth = derive(labels, [box(0, 0, 5, 5)], unpainted="unknown")
    assert_array_equal(truth.target, labels)


def test_scribbles():
    labels = np.zeros((6, 8), int)
    labels[0], labels[2, 2:4], labels[4, 2:4] = 1, 2, 9
    truth = derive(labels, unpainted="unknown")
    assert_array_equal(truth.known, labels != 0)
    assert_array_equal(truth.target, labels > 1)
    assert_array_equal(truth.objects, np.searchsorted([1, 2, 9], labels) * (labels > 1))


def test_scribbled_classes_count_from_two():
    labels = np.array([[1, 0, 2, 2, 0, 3]])
    truth = derive(labels, unpainted="unknown", labels_are="classes")
    assert_array_equal(truth.target, [[0, 0, 1, 1, 0, 2]])
    assert_array_equal(truth.known, [[1, 0, 1, 1, 0, 1]])


def test_objects_of_classes_are_their_components():
    labels = np.array([[1, 1, 0, 2, 2], [0, 0, 0, 2, 0], [1, 1, 0, 0, 0]])
    truth = derive(labels, labels_are="classes")
    assert_array_equal(truth.target, labels)
    assert len(np.unique(truth.objects)) == 4
    assert truth.objects[0, 0] != truth.objects[2, 0]


def test_touching_classes_stay_together_and_corners_of_one_class_are_cut():
    labels = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [2, 2, 1, 1], [2, 2, 1, 1]])
    truth = derive(labels, labels_are="classes")
    assert_array_equal(truth.target == 0, np.pad([[1, 1]], ((2, 1), (1, 1))))
    assert_array_equal(truth.target > 0, truth.objects > 0)
    assert truth.objects.max() == 4


@given(small_labels, st.sampled_from(POLICIES), st.data())
@settings(max_examples=60, deadline=None)
def test_laws_of_the_truth(labels, policy, data):
    unpainted, labels_are = policy
    options = {"unpainted": unpainted, "labels_are": labels_are}
    number = st.floats(-2, 9)
    plane = data.draw(st.integers(0, labels.shape[0] - 1))
    before = [plane] * (labels.ndim - 2)
    boxes = st.tuples(number, number, number, number).map(lambda c: box(*c, *before))
    regions = data.draw(st.lists(boxes, max_size=2))
    annotation = annotate(labels, regions, **options)
    known = known_pixels(annotation)
    truths = list(derive_truths(annotation, labels.ndim))
    if not known.any():
        assert truths == []
        return
    ((_, truth),) = truths
    assert_array_equal(truth.known, known)
    assert not truth.target[~known].any()
    assert_array_equal(truth.objects > 0, truth.target > 0)
    assert_array_equal(
        np.unique(truth.objects)[-1], len(np.unique(truth.objects[truth.objects > 0]))
    )
    # What is painted where nothing is known changes nothing.
    repainted = labels.copy()
    if regions:
        repainted[~known] = data.draw(st.integers(0, 5))
    ((_, again),) = derive_truths(annotate(repainted, regions, **options), labels.ndim)
    assert_array_equal(again.target, truth.target)
    assert_array_equal(again.objects, truth.objects)
    # Every object lies in one label, and nothing touches within a class.
    for value in range(1, truth.objects.max() + 1):
        assert len(np.unique(labels[truth.objects == value])) == 1
    for value in range(1, truth.target.max() + 1):
        of_class = np.where(truth.target == value, truth.objects, 0)
        assert_array_equal(cut_gaps(of_class), of_class)


@pytest.mark.parametrize("labels_are", ["objects", "classes"])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", ">u4", "int64", "uint64"])
def test_any_integer_type(dtype, labels_are):
    labels = (two_cells() > 0).astype(dtype)
    truth = derive(labels, labels_are=labels_are)
    assert_array_equal(truth.target, labels.astype(int))
    scribbles = derive(labels, labels_are=labels_are, unpainted="unknown")
    assert not scribbles.target.any()


def test_huge_values_are_objects_but_no_classes():
    labels = two_cells().astype(np.uint64)
    labels[labels == 7] = np.iinfo(np.uint64).max
    assert derive(labels).objects.max() == 2
    with pytest.raises(BadInput, match='choose "labels are objects"'):
        derive(labels, labels_are="classes")
    # Outside the regions they do not matter.
    region = [box(0, 9, 11, 19)]
    assert derive(labels, region, labels_are="classes").target.max() == 3


def test_polygons_hold_the_pixels_whose_centres_they_enclose():
    triangle = np.array([(1.2, 1.1), (8.7, 3.0), (2.0, 14.6)])
    known = known_pixels(annotate(two_cells(), [triangle]))
    expected = np.zeros(known.shape, bool)
    expected[polygon(*triangle.T)] = True
    assert_array_equal(known, expected)


@settings(deadline=None)
@given(*[st.floats(-5, 25).map(lambda v: round(v, 1))] * 4, st.booleans())
def test_boxes_are_filled_as_polygons_are(top, left, bottom, right, clockwise):
    corners = box(top, left, bottom, right)[:: 1 if clockwise else -1]
    known = known_pixels(annotate(two_cells(), [corners]))
    rows, columns = np.indices(known.shape)
    low, high = corners.min(axis=0), corners.max(axis=0)
    inside = (rows >= low[0]) & (rows <= high[0])
    inside &= (columns >= low[1]) & (columns <= high[1])
    if top == bottom or left == right:
        assert not known.any()
    else:
        assert_array_equal(known, inside)
        expected = np.zeros(known.shape, bool)
        # A corner more on an edge, so that it is no box to the code.
        more = np.insert(corners, 1, corners[:2].mean(axis=0), axis=0)
        expected[polygon(*more.T, known.shape)] = True
        assert_array_equal(known_pixels(annotate(two_cells(), [more])), expected)
        on_edge = np.isin(rows, corners[:, 0]) | np.isin(columns, corners[:, 1])
        assert_array_equal(known & ~on_edge, expected & ~on_edge)


def test_a_crossed_box_is_no_box():
    corners = box(1, 1, 9, 9)[[0, 2, 1, 3]]
    known = known_pixels(annotate(two_cells(), [corners]))
    assert known[5, 8] != known[2, 5]


def test_regions_of_a_stack_lie_in_one_plane_each():
    labels = np.zeros((4, 12, 20), int)
    labels[:, 3:6, 3:6] = 1
    regions = [box(0, 0, 8, 8, 1.0), box(2, 2, 11, 19, 1.9999)]
    annotation = annotate(labels, regions)
    planes = {unit["Z"]: truth for unit, truth in derive_truths(annotation, 2)}
    assert planes.keys() == {1, 2}
    assert planes[1].known.sum() == 9 * 9
    assert planes[2].known.sum() == 10 * 18
    volume = derive(labels, regions)
    assert_array_equal(volume.known.sum((1, 2)), [0, 81, 180, 0])
    assert volume.objects.max() == 1


def test_a_region_may_lie_across_the_planes():
    labels = np.zeros((5, 6, 7), int)
    corners = np.array([(1, 3, 2), (1, 3, 5), (3, 3, 5), (3, 3, 2)])
    known = known_pixels(annotate(labels, [corners]))
    expected = np.zeros(labels.shape, bool)
    expected[1:4, 3, 2:6] = True
    assert_array_equal(known, expected)


def test_a_plane_region_holds_in_every_plane():
    known = known_pixels(annotate(np.zeros((3, 4, 8, 8), int), [box(1, 1, 3, 4, 2)]))
    expected = np.zeros(known.shape, bool)
    expected[:, 2, 1:4, 1:5] = True
    assert_array_equal(known, expected)


def test_units_follow_the_axes_of_the_image():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 9, 3, 8))
    image = np.zeros((2, 9, 3, 8, 3))
    annotation = Annotation(image, labels, axes="tyzxs")
    planes = list(derive_truths(annotation, 2))
    assert [unit for unit, _ in planes] == [
        {"T": t, "Z": z} for t in range(2) for z in range(3)
    ]
    for unit, truth in planes:
        plane = labels[unit["T"], :, unit["Z"]]
        assert_array_equal(truth.target, cut_gaps(plane) > 0)
    volumes = list(derive_truths(annotation, 3))
    assert [unit for unit, _ in volumes] == [{"T": 0}, {"T": 1}]
    expected = cut_gaps(labels[1].transpose(1, 0, 2)) > 0
    assert_array_equal(volumes[1][1].target, expected)


def test_planes_without_knowledge_are_left_out():
    labels = np.zeros((5, 6, 6), int)
    labels[3, 2] = 1
    annotation = annotate(labels, unpainted="unknown")
    assert [unit for unit, _ in derive_truths(annotation, 2)] == [{"Z": 3}]


def test_nothing_is_changed():
    labels = two_cells()
    before = labels.copy()
    truth = derive(labels)
    truth.target[:] = 9
    truth.known[:] = False
    assert_array_equal(labels, before)


BAD = [
    (annotate(np.zeros((3, 3))), "type float64; they must be whole"),
    (annotate(np.full((3, 3), -2)), "go down to -2"),
    (Annotation(np.zeros((3, 4)), np.ones((4, 3), int)), "labels are 4 x 3, the image"),
    (Annotation(np.zeros((9, 9, 3)), np.ones((9, 9), int)), "sizes differ"),
    (Annotation(np.zeros(3), np.ones(3, int)), "cannot have the axes"),
    (annotate(np.ones((3, 3), int), axes="ZZ"), "cannot have the axes 'ZZ'"),
    (annotate(np.ones((3, 3), int), axes="YQ"), "cannot have the axes 'YQ'"),
    (annotate(np.ones((0, 3), int)), "image is empty"),
    (annotate(np.ones((3, 3), int), unpainted="other"), "'other' is neither"),
    (annotate(np.ones((3, 3), int), labels_are="other"), "'other' is neither"),
    (annotate(two_cells(), [[(1, 1), (3, 3)]]), "Region 1 encloses nothing"),
    (annotate(two_cells(), [box(0, 0, 3, np.nan)]), "Region 1 encloses nothing"),
    (annotate(two_cells(), [box(0, 0, 3, 3, 1)]), "Region 1 has vertices of shape"),
    (
        annotate(two_cells()[None], [[(0, 0, 0), (0, 5, 5), (1, 0, 5)]]),
        "Region 1 does not lie in one plane",
    ),
]


@pytest.mark.parametrize(("annotation", "message"), BAD, ids=[m for _, m in BAD])
def test_unusable_annotations_are_refused_in_words(annotation, message):
    (problem,) = find_problems([annotation])
    assert message in problem
    with pytest.raises(BadInput, match=message):
        list(derive_truths(annotation, 2))


NOTHING = np.zeros((5, 6), int)
ONE = np.pad([[1]], 2)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "No image is annotated"),
        ([annotate(NOTHING)], "no object is painted. Paint some"),
        (
            [annotate(ONE, unpainted="unknown")],
            "nothing to learn: no object is painted",
        ),
        ([annotate(NOTHING, unpainted="unknown")], "Nothing is known about any pixel"),
        ([annotate(ONE, [box(20, 20, 30, 30)])], "no region covers any of its image"),
        ([annotate(ONE, [box(1.5, 1.5, 2.5, 2.5)])], "No background is known"),
        ([annotate(ONE, [box(2, 2, 2, 2)])], "no region covers any"),
        ([annotate(ONE * 2, unpainted="unknown")], "background with label 1"),
        ([annotate(ONE * 5, [box(0, 0, 1, 1)])], "no object is painted"),
        ([annotate(ONE + 1, labels_are="classes")], ""),  # every pixel has a class
        ([annotate(ONE + 1, labels_are="objects")], ""),  # a gap between them
        ([annotate(NOTHING + 1, labels_are="classes")], "No background is known"),
        ([annotate(ONE)], ""),
        ([annotate(ONE), annotate(NOTHING)], ""),
        ([annotate(ONE), annotate(NOTHING, unpainted="unknown")], ""),
    ],
)
def test_problems_of_all_annotations_together(annotations, message):
    problems = find_problems(annotations)
    assert len(problems) == bool(message)
    if message:
        assert message in problems[0]
        with pytest.raises(BadInput, match=message):
            check_annotations(annotations)
    else:
        check_annotations(annotations)


def test_problems_name_their_image():
    wrong = [annotate(np.zeros((2, 2)), name=name) for name in ("a.tif", "b.tif")]
    problems = find_problems([*wrong, annotate(ONE)])
    assert [problem.split(":")[0] for problem in problems] == ["a.tif", "b.tif"]


def test_a_model_of_volumes_refuses_a_plane():
    with pytest.raises(BadInput, match=r"lack Z\. Train a 2D model"):
        list(derive_truths(annotate(ONE), 3))


def test_lazy_images_are_not_read():
    class Lazy:
        shape = (5, 5)
        ndim = 2

    annotation = Annotation(Lazy(), ONE)
    assert find_problems([annotation]) == []
    assert len(list(derive_truths(annotation, 2))) == 1


def test_many_objects_keep_their_numbers_in_order():
    labels = np.zeros((40, 40), np.int64)
    labels[::2, ::2] = np.arange(400).reshape(20, 20) * 10**12 + 5
    objects = derive(labels).objects
    values = objects[objects > 0]
    assert all(one + 1 == other for one, other in pairwise(values))
