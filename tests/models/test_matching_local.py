"""Local matching (paper eq. 4 and 5) and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_matching import FAR, FEW, f32, full_windows, random_case, slow_local

from cfbi_jax.models import matching, matching_local
from cfbi_jax.models.matching_local import windowed_squared_distance

# On GPUs, as in the network: no TF32.
pytestmark = pytest.mark.usefixtures("exact_products")

LOCAL_SHAPES = [
    # (height, width, rows, windows, rate)
    (1, 1, 1, (2,), 1),
    (1, 9, 3, (3, 1, 2), 1),
    (7, 2, 2, (6, 1), 2),
    (6, 8, 4, (4, 2), 1),
    (5, 9, 3, (4, 2), 2),
]
# Numbers of a row of 11 pixels with 3 channels in three strips of 4: windows of 3 and 1, 3 rows.
ROW_OF_11 = 3 * (4 + 2 * 3) * ((2 * 3 + 1) * (4 + 3) + 4 * 3 * 2)
local_matching = jax.jit(
    matching_local.local_matching, static_argnames=("windows", "downsample", "atrous_rate")
)


def check_local(matching_of, seed, size, rows, windows, rate):
    query, reference, label, bias = random_case(seed, *size, 3, rows)
    found = matching_of(
        *f32(query, reference[0], label[0]),
        jnp.asarray(bias, jnp.float32),
        windows,
        downsample=False,
        atrous_rate=rate,
    )
    expected = slow_local(query, reference[0], label[0], bias, windows, rate)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(LOCAL_SHAPES))
def test_local_matching(seed, shape):
    height, width, *choices = shape
    check_local(local_matching, seed, (height, width), *choices)


@pytest.mark.parametrize(
    "sizes, size, rows, windows, rate",
    [
        ((4, 1), (6, 11), 3, (3, 1), 1),  # the last strip is shorter; row by row
        ((3, 1), (4, 9), 1, (2, 1), 2),
        ((5, 1), (2, 5), 3, (4, 2), 2),  # one strip, narrower than the windows
        ((2, 1), (1, 7), 4, (5,), 1),  # windows over several strips
        ((1, 1), (3, 4), 2, (1,), 1),
        ((4, 2 * ROW_OF_11), (7, 11), 3, (3, 1), 1),  # blocks of two rows, the last has one
        ((4, 5 * ROW_OF_11), (7, 11), 3, (3, 1), 1),  # two blocks of four rows instead of 5 and 2
    ],
)
def test_local_matching_over_several_strips(monkeypatch, sizes, size, rows, windows, rate):
    monkeypatch.setattr(matching_local, "_strip_sizes", lambda: sizes)
    # Not the jitted one: strips are read at tracing.
    check_local(matching_local.local_matching, 2, size, rows, windows, rate)


@pytest.mark.parametrize("shape", LOCAL_SHAPES[1:])
@pytest.mark.parametrize("sizes", [(3, 1), (3, 1000), (36, 2**22)])
def test_gradient_of_the_nearest_pixel_in_windows(monkeypatch, shape, sizes):
    height, width, rows, windows, rate = shape
    monkeypatch.setattr(matching_local, "_strip_sizes", lambda: sizes)

    @jax.jit
    def gradients(query, previous, label, weights):
        def total(query, previous):
            arguments = query, previous, label, rows, windows, rate
            return jnp.sum(windowed_squared_distance(*arguments) * weights)

        return jax.grad(total, (0, 1))(query, previous)

    @jax.jit
    def slow_gradients(query, previous, label, weights):
        def total(query, previous):
            nearest, farther = full_windows(query, previous, label, rows, windows, rate)
            weighted = jnp.where(farther > FEW, weights, 0)
            return jnp.sum(nearest * weighted), weighted

        return jax.grad(total, (0, 1), has_aux=True)(query, previous)

    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, previous = rng.standard_normal((2, height, width, 3)).astype(np.float32)
        label = rng.integers(0, rows + (seed > 0), (height, width))
        label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
        weights = rng.standard_normal((height, width, len(windows), rows)).astype(np.float32)
        expected, weights = slow_gradients(query, previous, label, weights)
        found = gradients(query, previous, label, weights)
        for gradient, slow in zip(found, expected, strict=True):
            # Sums of at most 9 x 9 x 2 x 4 terms of order 1, in another order.
            np.testing.assert_allclose(gradient, slow, atol=1e-4)


@pytest.mark.parametrize("sizes", [(36, 2**22), (1, 1)])
def test_of_pixels_at_the_same_distance_in_a_window_one_gets_the_gradient(monkeypatch, sizes):
    """All of a flat frame are; pixels of nobody and outside the window are not among them."""
    monkeypatch.setattr(matching_local, "_strip_sizes", lambda: sizes)
    query, previous = jnp.ones((1, 7, 2)), jnp.zeros((1, 7, 2))
    label = jnp.array([[1, 0, 0, matching.NOBODY, 0, 0, 1]], jnp.uint8)
    weights = jnp.zeros((1, 7, 2, 2)).at[0, 3].set(jnp.array([[1.0, 10.0], [100.0, 1000.0]]))
    run = jax.value_and_grad(
        lambda *x: jnp.sum(windowed_squared_distance(*x, label, 2, (1, 3)) * weights),
        (0, 1),
    )
    total, (query_gradient, gradient) = run(query, previous)
    assert total == 1 * 2 + 10 * FAR + 100 * 2 + 1000 * 2  # the inner window has no row 1
    np.testing.assert_array_equal(query_gradient[0, 3], 2 * np.array([1101, 1101]))
    assert not np.delete(query_gradient[0], 3, axis=0).any()
    given_to = np.asarray(gradient[0, :, 0])
    np.testing.assert_array_equal(given_to, gradient[0, :, 1])
    assert sorted(given_to[[2, 4]] + given_to[[1, 5]]) in ([-202, 0], [-200, -2])
    assert sorted(given_to[[0, 6]]) == [-2000, 0]
    assert given_to[3] == 0
