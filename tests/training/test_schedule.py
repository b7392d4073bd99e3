"""The learning rate's formula, and the optimiser against NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfbi_jax.training.schedule import learning_rate, optimizer

PAPER = dict(base=0.01, num_train_steps=100_000, warmup_steps=1000, minimum=1e-5)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1e-5),  # the formula says 0; the minimum holds everywhere
        (1, 1e-5),
        (500, 0.005),
        (999, 0.00999),
        (1000, 0.01),
        (1001, 0.01 * (99_000 / 99_001) ** 0.9),
        (50_500, 0.01 * (49_501 / 99_001) ** 0.9),
        (99_900, 0.01 * (101 / 99_001) ** 0.9),
        (99_999, 1e-5),  # the formula says 6e-7
    ],
)
def test_learning_rate_of_the_paper(step, expected):
    # float32 holds 1 - done to 6e-8, of 1e-3 at step 99,900.
    assert float(learning_rate(**PAPER)(step)) == pytest.approx(expected, rel=1e-4)
    assert float(learning_rate(**PAPER)(jnp.int32(step))) == pytest.approx(expected, rel=1e-4)


def test_learning_rate_without_minimum_or_warm_up():
    rate = learning_rate(0.02, 10, 4, 0.0)
    rising = [0.02 * step / 4 for step in range(4)]
    falling = [0.02 * (k / 7) ** 0.9 for k in (7, 6, 5, 4, 3, 2)]
    np.testing.assert_allclose([rate(step) for step in range(10)], rising + falling, rtol=1e-5)
    # A rate asked for beyond the end is the minimum, and no NaN.
    assert float(learning_rate(0.02, 10, 4, 1e-4)(50)) == pytest.approx(1e-4)
    assert float(learning_rate(0.02, 10, 0, 0.0)(0)) == pytest.approx(0.02)


DECAY, MOMENTUM, LIMIT = 0.05, 0.8, 5.0
RATE = learning_rate(0.3, 6, 2, 0.01)
SHAPES = {"kernel": (3, 4), "bias": (4,), "scalar": ()}


def trajectory():
    """Parameters, and gradients of 6 steps: some of a norm above `LIMIT`, some below."""
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    sizes = [0.1, 10, 1, 50, 0.01, 3]
    return params, [
        {name: size * rng.standard_normal(shape) for name, shape in SHAPES.items()}
        for size in sizes
    ]


def by_package():
    params, gradients = trajectory()
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    tx = optimizer(RATE, DECAY, MOMENTUM, LIMIT)
    state = tx.init(params)
    for gradient in gradients:
        gradient = {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params


def test_optimizer_is_clipped_nesterov_sgd_with_coupled_decay():
    params, gradients = trajectory()
    velocity = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    norms = []
    for step, (gradient, found) in enumerate(zip(gradients, by_package(), strict=True)):
        norms.append(np.sqrt(sum(np.sum(value**2) for value in gradient.values())))
        for name in params:
            slope = gradient[name] * min(1, LIMIT / norms[-1]) + DECAY * params[name]
            velocity[name] = MOMENTUM * velocity[name] + slope
            rate = float(RATE(step))
            params[name] = params[name] - rate * (slope + MOMENTUM * velocity[name])
            # Float32 against float64.
            np.testing.assert_allclose(found[name], params[name], rtol=1e-5, atol=1e-6)
    assert min(norms) < LIMIT < max(norms)


def test_adam_is_that_of_its_paper_with_decoupled_decay():
    params, gradients = trajectory()
    tx = optimizer(RATE, DECAY, MOMENTUM, LIMIT, name="adam")
    found = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = tx.init(found)
    first = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step, gradient in enumerate(gradients):
        given = {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}
        updates, state = tx.update(given, state, found)
        found = optax.apply_updates(found, updates)
        norm = np.sqrt(sum(np.sum(value**2) for value in gradient.values()))
        for name in params:
            slope = gradient[name] * min(1, LIMIT / norm)
            first[name] = MOMENTUM * first[name] + (1 - MOMENTUM) * slope
            second[name] = 0.99 * second[name] + 0.01 * slope**2
            mean = first[name] / (1 - MOMENTUM ** (step + 1))
            square = second[name] / (1 - 0.99 ** (step + 1))
            move = mean / (np.sqrt(square) + 1e-8) + DECAY * params[name]
            params[name] = params[name] - float(RATE(step)) * move
            np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_frozen_backbone_does_not_decay(name):
    params = {"deeplab": {"backbone": {"kernel": jnp.ones(3)}, "decoder": {"kernel": jnp.ones(3)}}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for freeze in (False, True):
        tx = optimizer(lambda step: 0.1, 0.5, MOMENTUM, LIMIT, freeze, name)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert np.all(updates["deeplab"]["decoder"]["kernel"] < 0)
        assert np.all((updates["deeplab"]["backbone"]["kernel"] == 0) == freeze)


def test_optimizer_is_pytorchs():
    torch = pytest.importorskip("torch")
    params, gradients = trajectory()
    params = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    sgd = torch.optim.SGD(
        params.values(), lr=1.0, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    for step, (gradient, found) in enumerate(zip(gradients, by_package(), strict=True)):
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(params.values(), LIMIT)
        sgd.param_groups[0]["lr"] = float(RATE(step))
        sgd.step()
        for name, param in params.items():
            # Float32 against float64; PyTorch also adds 1e-6 to the norm it divides by.
            np.testing.assert_allclose(found[name], param.detach(), rtol=1e-5, atol=1e-6)
