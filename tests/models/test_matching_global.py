"""Global matching (paper eq. 1 and 2) and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_matching import FAR, FEW, SHAPES, f32, full_matrix, random_case, slow_global

from cfbi_jax.models import matching, matching_global
from cfbi_jax.models.matching_global import nearest_squared_distance
from cfbi_jax.models.matching_kernel import Blocks

# On GPUs, as in the network: no TF32.
pytestmark = pytest.mark.usefixtures("exact_products")

# (queries, pixels, channels, rows); sizes that divide neither a tile nor a chunk
NEAREST_SHAPES = [(1, 1, 1, 1), (1, 5, 2, 3), (7, 1, 3, 2), (13, 29, 4, 5), (31, 17, 3, 4)]
global_matching = jax.jit(matching_global.global_matching)


@pytest.fixture(params=["chunks", "kernel"])
def small_parts(request, monkeypatch):
    """Tiles of 7 or 8 and chunks of 13 or 16 pixels; `kernel`: the GPUs' kernel, interpreted where
    there is no GPU; there with its own blocks, which are larger."""
    if request.param == "chunks":
        monkeypatch.setattr(matching_global, "blocks_here", lambda *_: None)
        monkeypatch.setattr(matching_global, "_chunk_sizes", lambda: (13, 7))
    elif jax.default_backend() == "cpu":
        monkeypatch.setattr(matching_global, "blocks_here", lambda *_: Blocks(16, 8, 2))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_global_matching(seed, shape):
    query, reference, label, bias = random_case(seed, *shape)
    found = global_matching(*f32(query, reference, label), jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(found[0], slow_global(query, reference, label, bias), atol=2e-6)


def test_global_matching_over_several_tiles_and_chunks(small_parts):
    """Sizes that divide nothing."""
    query, reference, label, bias = random_case(0, 9, 11, 4, 4, references=2)
    label[label == 2] = 0  # an absent object between present ones
    found = matching_global.global_matching(
        *f32(query, reference, label), jnp.asarray(bias, jnp.float32)
    )
    np.testing.assert_allclose(found[0], slow_global(query, reference, label, bias), atol=2e-6)
    np.testing.assert_array_equal(found[0, ..., 2], 1)


def test_as_many_rows_as_labels_can_name():
    rng = np.random.default_rng(0)
    query, reference = rng.random((2, 6, 3))
    label = np.array([0, 1, 253, 254, 254, 255], np.uint8)
    pixels = [jnp.asarray(x, jnp.float32) for x in (query, reference)]
    found = np.asarray(nearest_squared_distance(*pixels, jnp.asarray(label), 255))
    exact = np.square(query[:, None] - reference).sum(axis=-1)
    for row in (0, 1, 253, 254):
        expected = exact[:, label == row].min(axis=1)
        np.testing.assert_allclose(found[:, row], expected, atol=2e-6)
    assert (found[:, 2:253] == matching.FAR).all()


def test_global_matching_of_ties_and_of_a_batch(small_parts):
    query, reference, label, bias = random_case(1, 5, 6, 3, 3)
    reference[:] = reference[0, 0, 0]  # every reference pixel is the same
    twice = [jnp.concatenate([a, a[:, :, ::-1]]) for a in f32(query)]
    both = [jnp.concatenate([a, a]) for a in f32(reference, label)]
    found = matching_global.global_matching(*twice, *both, jnp.asarray(bias, jnp.float32))
    expected = slow_global(query, reference, label, bias)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)
    np.testing.assert_allclose(found[1], expected[:, ::-1], atol=2e-6)


def test_pixels_that_are_not_finite_are_seen(small_parts):
    """NaN in a query or a reference pixel, in a row with other pixels; an empty row stays empty."""
    rng = np.random.default_rng(0)
    query, reference = (jnp.asarray(x, jnp.float32) for x in rng.random((2, 30, 4)))
    label = jnp.asarray(np.arange(30) % 2, jnp.uint8)
    for bad in (jnp.nan, jnp.inf):
        nearest = nearest_squared_distance(query.at[3, 1].set(bad), reference, label, 3)
        np.testing.assert_array_equal(np.isnan(nearest[:, :2]).any(axis=1), np.arange(30) == 3)
        assert np.isnan(nearest[3, :2]).all() and (nearest[np.arange(30) != 3, 2] == FAR).all()
    nearest = nearest_squared_distance(query, reference.at[7, 2].set(jnp.nan), label, 3)
    assert np.isnan(nearest[:, 1]).all() and np.isfinite(nearest[:, [0, 2]]).all()


@pytest.mark.parametrize("which", ["query", "reference", "bias"])
def test_gradients_are_those_of_finite_differences(which):
    query, reference, label, bias = random_case(3, 4, 5, 3, 3)
    arrays = {"query": query[None], "reference": reference[None], "bias": bias}
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    weights = jnp.asarray(np.random.default_rng(0).random((1, 4, 5, 3)), jnp.float32)

    def loss(value):
        inputs = {**arrays, which: value}
        found = matching_global.global_matching(
            inputs["query"], inputs["reference"], jnp.asarray(label)[None], inputs["bias"]
        )
        return jnp.sum(found * weights)

    value = arrays[which]
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(value.shape), jnp.float32)
    step = 1e-3
    slope = (loss(value + step * direction) - loss(value - step * direction)) / (2 * step)
    found = jnp.sum(jax.grad(loss)(value) * direction)
    np.testing.assert_allclose(found, slope, rtol=2e-2, atol=2e-3)


def value_and_gradients(fn):
    def run(query, reference, label, weights):
        def total(query, reference):
            nearest = fn(query, reference, label, weights.shape[1])
            return jnp.sum(nearest * weights), nearest

        return jax.value_and_grad(total, (0, 1), has_aux=True)(query, reference)

    return run


nearest_and_gradients = jax.jit(value_and_gradients(nearest_squared_distance))


slow_nearest_and_gradients = jax.jit(value_and_gradients(full_matrix))


def check_nearest(found, seed, shape, empty_row):
    queries, pixels, channels, rows = shape
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((queries, channels)).astype(np.float32)
    reference = rng.standard_normal((pixels, channels)).astype(np.float32)
    label = rng.integers(0, rows + 1, pixels)
    label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
    if empty_row:
        label[label == rows // 2] = matching.NOBODY
    weights = rng.standard_normal((queries, rows)).astype(np.float32)
    squared = np.square(query[:, None] - reference).sum(axis=-1)
    for row in range(rows):
        two = np.sort(squared[:, label == row], axis=1)[:, :2]
        if two.shape[1] == 2:
            weights[two[:, 1] - two[:, 0] < FEW, row] = 0

    (_, nearest), gradients = found(query, reference, label, weights)
    (_, expected), slow = slow_nearest_and_gradients(query, reference, label, weights)
    # Squared distances of up to about 50 from differences of products: 50 x 1e-7, a few times.
    np.testing.assert_allclose(nearest, expected, atol=5e-5)
    for gradient, of_slow in zip(gradients, slow, strict=True):
        # Sums of at most 31 x 5 terms of order 1, in another order.
        np.testing.assert_allclose(gradient, of_slow, atol=1e-4)
    present = np.isin(np.arange(rows), label)
    assert (np.asarray(nearest)[:, ~present] == FAR).all()
    assert present.any() or not any(np.asarray(gradient).any() for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(NEAREST_SHAPES),
    empty_row=st.booleans(),
)
def test_gradient_of_the_nearest_pixel(seed, shape, empty_row):
    check_nearest(nearest_and_gradients, seed, shape, empty_row)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_nearest_pixel_over_several_tiles_and_chunks(small_parts, seed):
    # A new function, as what is traced depends on the parts.
    found = jax.jit(value_and_gradients(lambda *x: nearest_squared_distance(*x)))
    check_nearest(found, seed, (24, 45, 3, 4), empty_row=seed > 0)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (30, 60, 3, 5))),
    seed=st.integers(0, 10**6),
    kernel=st.booleans(),
)
def test_small_integers_of_any_size_have_exact_distances(sizes, seed, kernel):
    """Many ties, rows without a pixel, sizes that divide neither tiles nor chunks."""
    queries, pixels, channels, rows = sizes
    rng = np.random.default_rng(seed)
    query = rng.integers(0, 4, (queries, channels)).astype(np.float32)
    reference = rng.integers(0, 4, (pixels, channels)).astype(np.float32)
    label = rng.integers(0, rows + 1, pixels)
    label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
    blocks = Blocks(16, 8, 2) if kernel and jax.default_backend() == "cpu" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching_global, "blocks_here", lambda *_: blocks)
        patch.setattr(matching_global, "_chunk_sizes", lambda: (13, 7))
        arrays = map(jnp.asarray, (query, reference, label))
        found = nearest_squared_distance(*arrays, rows)
    squared = np.square(query[:, None] - reference).sum(axis=-1)
    for row in range(rows):
        expected = squared[:, label == row].min(axis=1, initial=FAR)
        np.testing.assert_array_equal(found[:, row], expected)


@pytest.mark.parametrize("blocks", [None, Blocks(16, 16, 2), Blocks(16, 2, 2)])
@pytest.mark.parametrize("tile", [512, 2])
def test_of_pixels_at_the_same_distance_the_first_gets_the_gradient(monkeypatch, tile, blocks):
    """Integers, so that distances are exact. JAX's own `min` would share it out."""
    if blocks and jax.default_backend() != "cpu":
        blocks = blocks._replace(pixels=16)  # the least that GPUs take
    monkeypatch.setattr(matching_global, "_chunk_sizes", lambda: (2048, tile))
    monkeypatch.setattr(matching_global, "blocks_here", lambda *_: blocks)
    query = jnp.array([[0.0, 0.0], [4.0, 0.0]])
    #                        row 1, far   row 0      row 1      row 1       row 1      row 0
    reference = jnp.array([[-3.0, 0], [0.0, 5.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    label = jnp.array([1, 0, 1, 1, 1, 0], jnp.uint8)
    weights = jnp.array([[1.0, 10.0], [100.0, 1000.0]])
    run = value_and_gradients(lambda *arguments: nearest_squared_distance(*arguments))
    (_, nearest), (query_gradient, gradient) = run(query, reference, label, weights)
    np.testing.assert_array_equal(nearest, [[25, 4], [41, 4]])
    # Sum over the queries of 2 x weight x (pixel - query).
    expected = np.zeros((6, 2))
    expected[1] = 2 * 1 * np.array([0, 5]) + 2 * 100 * np.array([-4, 5])
    expected[2] = 2 * 10 * np.array([2, 0]) + 2 * 1000 * np.array([-2, 0])
    np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(
        query_gradient, [[-40, -10], [2 * 100 * 4 + 2 * 1000 * 2, -2 * 100 * 5]]
    )


def test_what_is_beyond_far_pulls_at_nothing(small_parts):
    query, reference = jnp.zeros((2, 2)), jnp.array([[0.0, 300.0], [1.0, 2.0], [400.0, 0.0]])
    run = value_and_gradients(lambda *arguments: nearest_squared_distance(*arguments))
    label = jnp.array([1, 0, 1], jnp.uint8)
    (_, nearest), (query_gradient, gradient) = run(query, reference, label, jnp.ones((2, 2)))
    np.testing.assert_array_equal(nearest, [[5, FAR], [5, FAR]])
    np.testing.assert_array_equal(gradient, [[0, 0], [4, 8], [0, 0]])
    np.testing.assert_array_equal(query_gradient, [[-2, -4], [-2, -4]])


def test_half_precision_adds_up_many_gradients():
    """All of 4,000 query pixels pull at one reference pixel; each adds about 1 to the sum."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.uniform(0, 1, (4000, 4)), jnp.bfloat16)
    reference, label = jnp.ones((1, 4), jnp.bfloat16), jnp.zeros(1, jnp.uint8)

    def total(reference):
        nearest = nearest_squared_distance(query, reference, label, 1)
        return jnp.sum(nearest.astype(jnp.float32))

    found = np.asarray(jax.grad(total)(reference), np.float64)
    expected = 2 * (1 - np.asarray(query, np.float64)).sum(axis=0, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1 / 256)  # rounded once
