"""J, F and their statistics against the definition written out slowly."""

import jaxtyping
import numpy as np
import pytest
import slow_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cfbi_jax.evaluation import metrics

SIZES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)


def assert_matches(prediction, truth, num_objects):
    region, boundary = metrics.score_objects(prediction, truth, tuple(range(1, num_objects + 1)))
    assert region.shape == boundary.shape == (num_objects,)
    for k in range(num_objects):
        expected = slow_scores.j_and_f(prediction == k + 1, truth == k + 1)
        np.testing.assert_allclose((region[k], boundary[k]), expected, rtol=0, atol=1e-9)


def ellipse(shape, centre, radii):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_random_small_images(data):
    shape = data.draw(SIZES)
    labels = st.sampled_from([0, 0, 1, 2, 3, 255])
    prediction, truth = (data.draw(arrays(np.uint8, shape, elements=labels)) for _ in range(2))
    assert_matches(prediction, truth, 3)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_random_rectangles(data):
    """Rectangles anywhere, edges included, in images large enough for radii 1 to 3."""
    shape = data.draw(st.tuples(st.integers(20, 260), st.integers(20, 260)))
    labels = []
    for _ in range(2):
        label = np.zeros(shape, np.uint8)
        for k in (1, 2):
            top, bottom = sorted(data.draw(st.integers(0, shape[0])) for _ in range(2))
            left, right = sorted(data.draw(st.integers(0, shape[1])) for _ in range(2))
            label[top:bottom, left:right] = k
        labels.append(label)
    assert_matches(*labels, 2)


@given(arrays(bool, SIZES))
@settings(max_examples=50, deadline=None)
def test_boundary_map_pixel_by_pixel(mask):
    height, width = mask.shape
    expected = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [(v, u) for v, u in neighbours if v < height and u < width]
            expected[y, x] = any(mask[v, u] != mask[y, x] for v, u in inside)
    np.testing.assert_array_equal(metrics.boundary_map(mask), expected)


@pytest.mark.parametrize(
    ("height", "width", "radius"),
    # 3/4/5 triangles: the tolerance is a whole number, which rounding must not lift.
    [(480, 854, 8), (480, 910, 9), (240, 427, 4), (300, 400, 4), (600, 800, 8), (1080, 1920, 18)],
)
def test_radius(height, width, radius):
    assert metrics.boundary_radius(height, width) == radius


@pytest.mark.parametrize("width", [854, 910])
def test_full_size(width):
    """Smooth shapes displaced by about the radius, where a wrong disk shows."""
    rng = np.random.default_rng(width)
    prediction, truth = np.zeros((2, 480, width), np.uint8)
    for k, (centre, radii, shift) in enumerate(
        [((150, 200), (90, 60), (6, 5)), ((300, width - 40), (100, 130), (0, 9)), ((479, 0), 30, 8)]
    ):
        truth[ellipse(truth.shape, centre, np.broadcast_to(radii, 2))] = k + 1
        prediction[ellipse(truth.shape, np.add(centre, shift), np.broadcast_to(radii, 2))] = k + 1
    prediction[rng.random(prediction.shape) < 1e-4] = 2
    assert_matches(prediction, truth, 4)


def test_empty_masks_and_absent_objects():
    empty = np.zeros((20, 30), np.uint8)
    square = empty.copy()
    square[5:9, 5:9] = 1
    for prediction, truth, expected in (
        (empty, empty, 1.0),
        (square, empty, 0.0),
        (empty, square, 0.0),
        (square, square, 1.0),
    ):
        assert metrics.score_objects(prediction, truth, (1,)) == (expected, expected)
    # Object 2 is nowhere, which is right.
    assert metrics.score_objects(square, square, (1, 2))[1].tolist() == [1.0, 1.0]


def test_mask_that_fills_the_image_has_no_boundary():
    full = np.ones((20, 30), np.uint8)
    half = full.copy()
    half[:, 15:] = 0
    assert_matches(full, full, 1)
    assert_matches(full, half, 1)
    assert metrics.score_objects(full, half, (1,))[1] == [0.0]
    assert metrics.score_objects(full, np.zeros_like(full), (1,))[1] == [1.0]


@pytest.mark.parametrize("where", [(0, 0), (0, 29), (19, 0), (19, 29), (0, 7), (19, 7), (7, 29)])
def test_one_pixel_at_the_border(where):
    prediction, truth = np.zeros((2, 20, 30), np.uint8)
    prediction[where] = 1
    truth[min(where[0] + 1, 19), max(where[1] - 1, 0)] = 1
    assert_matches(prediction, truth, 1)
    assert_matches(prediction, prediction, 1)
    assert_matches(prediction, np.zeros_like(truth), 1)


def test_void_belongs_to_no_object():
    prediction, truth = np.zeros((2, 40, 40), np.uint8)
    truth[5:20, 5:20] = 1
    truth[20:25, 5:20] = 255
    prediction[5:25, 5:20] = 1
    assert_matches(prediction, truth, 1)
    # Not masked out of the prediction: the void rows count against it.
    assert metrics.score_objects(prediction, truth, (1,))[0] == [15 / 20]


def test_sizes_must_agree():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        metrics.score_objects(np.zeros((4, 5), np.uint8), np.zeros((4, 6), np.uint8), (1,))


@pytest.mark.parametrize("length", [*range(1, 14), 100, 255, 256, 257, 258, 300, 513, 1031])
def test_statistics(length):
    """Also where the official tool's 8-bit borders break."""
    values = np.random.default_rng(length).random(length)
    found = metrics.statistics(values)
    expected = slow_scores.statistics(values)
    np.testing.assert_allclose(
        (found.mean, found.recall, found.decay), expected, rtol=0, atol=1e-12
    )


def test_quarters_share_their_border_frame():
    # Borders of 9 frames: 0, 2, 4, 6, 8.
    values = np.array([1, 1, 0, 0, 0, 0, 0, 0, 1], float)
    assert metrics.decay(values) == pytest.approx(2 / 3 - 1 / 3)


def test_recall_is_strict():
    assert metrics.recall(np.array([0.5, 0.5, 0.6, 0.4])) == 0.25


def test_mean_statistics_weighs_objects_equally():
    long, short = metrics.statistics(np.ones(9)), metrics.statistics(np.zeros(3))
    assert metrics.mean_statistics([long, short]) == metrics.Statistics(0.5, 0.5, 0.0)
