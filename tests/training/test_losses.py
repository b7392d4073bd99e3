"""The bootstrapped cross-entropy against numbers made by hand and a slow NumPy version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfbi_jax.training.losses import bootstrapped_cross_entropy, mining_ratio

loss_and_gradient = jax.jit(
    lambda *arguments: (
        bootstrapped_cross_entropy(*arguments),
        jax.grad(lambda logits: jnp.sum(bootstrapped_cross_entropy(logits, *arguments[1:])))(
            arguments[0]
        ),
    )
)


def test_mining_ratio():
    found = [float(mining_ratio(step, 50)) for step in (0, 10, 25, 49, 50, 51, 10**6)]
    np.testing.assert_allclose(found, [0, 0.2, 0.5, 0.98, 1, 1, 1], rtol=1e-6)
    assert float(mining_ratio(jnp.int32(25), 50)) == 0.5
    found = [float(mining_ratio(step, 3.5)) for step in (1, 3, 4)]  # of seven steps
    np.testing.assert_allclose(found, [1 / 3.5, 3 / 3.5, 1], rtol=1e-6)
    assert float(mining_ratio(0, 0)) == 1  # mines from the start


def by_hand():
    """4 x 5 pixels whose losses are 0, 1, ... 19 times log 2, in a mixed order; two rows."""
    bits = np.random.default_rng(0).permutation(20)
    label = np.arange(20) % 2
    true = np.exp2(-bits.astype(np.float64))
    probability = np.stack([true, 1 - true], axis=0)
    probability = np.where(label == 0, probability, probability[::-1])
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(probability), -1e4)  # a probability of 0
    return bits, logits.reshape(1, 2, 4, 5), label.reshape(1, 4, 5).astype(np.uint8)


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (0.0, 190 / 20),  # all of them
        (1.0, (19 + 18 + 17) / 3),  # 15 % of 20
        (0.5, sum(range(9, 20)) / 11),  # int(0.575 * 20) = int(11.5)
    ],
)
def test_by_hand(ratio, expected):
    _, logits, label = by_hand()
    found, _ = loss_and_gradient(logits.astype(np.float32), label, jnp.float32(ratio))
    np.testing.assert_allclose(found, [expected * np.log(2)], rtol=1e-5)


def test_ignored_pixels_are_zeros_in_the_ranking():
    bits, logits, label = by_hand()
    logits = logits.astype(np.float32)
    label[0].reshape(-1)[bits >= 2] = 255  # pixels of 0 and 1 bits are left
    for ratio, expected in ((0.0, 1 / 20), (1.0, 1 / 3)):
        loss, gradient = loss_and_gradient(logits, label, jnp.float32(ratio))
        np.testing.assert_allclose(loss, [expected * np.log(2)], rtol=1e-5)
        assert np.abs(gradient).max() > 0
        assert not np.asarray(gradient[0, :, label[0] == 255]).any()
    loss, gradient = loss_and_gradient(logits, np.full_like(label, 255), jnp.float32(0.5))
    assert loss == 0 and not np.asarray(gradient).any()


def slow(logits, label, ratio):
    """(loss, its gradient) of one sample, float64. logits [rows, h, w]."""
    rows, height, width = logits.shape
    losses, slopes = [], []
    for y, x in np.ndindex(height, width):
        weights = [np.exp(value - logits[:, y, x].max()) for value in logits[:, y, x]]
        probability = np.array(weights) / sum(weights)
        slope = np.zeros((rows, height, width))
        losses.append(0.0)
        if label[y, x] != 255:
            losses[-1] = -np.log(probability[label[y, x]])
            slope[:, y, x] = probability
            slope[label[y, x], y, x] -= 1
        slopes.append(slope)
    count = int((ratio * 0.15 + (1 - ratio)) * height * width)
    hardest = sorted(range(height * width), key=lambda i: -losses[i])[:count]
    return sum(losses[i] for i in hardest) / count, sum(slopes[i] for i in hardest) / count


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 7), (7, 1), (5, 6), (9, 4)]),
    ratio=st.integers(0, 16).map(lambda i: i / 16),
    ignored=st.sampled_from([0, 0.3, 0.9]),
)
def test_against_a_slow_version(seed, shape, ratio, ignored):
    """Three samples with 1, 2 and 4 rows; the other rows are padding of -inf."""
    exact = (ratio * 0.15 + (1 - ratio)) * shape[0] * shape[1]
    assume(ratio == 0 or abs(exact - round(exact)) > 1e-4)  # float32 may round the count
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((3, 4, *shape)).astype(np.float32)
    label = np.zeros((3, *shape), np.uint8)
    for sample, rows in enumerate((1, 2, 4)):
        logits[sample, rows:] = -np.inf
        label[sample] = rng.integers(0, rows, shape)
    label[rng.random(label.shape) < ignored] = 255
    loss, gradient = loss_and_gradient(logits, label, jnp.float32(ratio))
    assert np.isfinite(gradient).all()
    for sample, rows in enumerate((1, 2, 4)):
        expected, slope = slow(logits[sample, :rows].astype(np.float64), label[sample], ratio)
        # Float32 against float64, on losses of up to about 20.
        np.testing.assert_allclose(loss[sample], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient[sample, :rows], slope, atol=1e-6)
        assert not np.asarray(gradient[sample, rows:]).any()
