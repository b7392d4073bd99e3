"""A tiny run in which something is not finite, or does not fit into memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import STEPS, checkpoint_steps, error_of

from cfbi_jax.training import loop, preparation
from cfbi_jax.training.diagnosis import explain
from cfbi_jax.training.metric_writers import read_metrics
from cfbi_jax.training.step import create_state
from cfbi_jax.weights.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


def spoiled(weights, path, name, value):
    checkpoint = load_checkpoint(weights)
    variables = jax.tree.map(np.array, checkpoint.variables)
    *parents, last = name.split("/")
    array = functools.reduce(lambda tree, key: tree[key], parents, variables)[last]
    array[(0,) * array.ndim] = value
    save_checkpoint(path, checkpoint.model, variables, checkpoint.image_format)
    return str(path)


EMBEDDING = "pixel_embedding/pointwise"


@pytest.mark.parametrize(
    "name, value, message",
    [
        (f"{EMBEDDING}/kernel", np.nan, rf"weights {EMBEDDING}/kernel \(1 of \d+\); clips"),
        # Finite, but what is computed with it is not.
        (
            f"{EMBEDDING}/kernel",
            3e38,
            rf"the output of {EMBEDDING} of clip 0 \(\d+ of \d+\); clips",
        ),
        (
            "deeplab/backbone/conv1/kernel",
            3e38,
            r"the output of deeplab/backbone/conv1 of clip 0 \(\d+ of \d+\); clips",
        ),
        (
            "matching_feature/conv/bias",
            np.inf,
            r"weights matching_feature/conv/bias \(1 of \d+\); clips",
        ),
    ],
)
def test_not_finite(config, weights, tmp_path, monkeypatch, name, value, message):
    out = tmp_path / "out"
    config.init_from = spoiled(weights, tmp_path / "spoiled", f"params/{name}", value)
    if not np.isfinite(value):
        with pytest.raises(ValueError, match=rf"spoiled: 1 arrays .* params/{name} \(1 of"):
            preparation.prepare(config, tmp_path / "refused")
        monkeypatch.setattr("cfbi_jax.weights.checkpoint.check_finite", lambda *_: None)
    config.log_every_steps = 2  # known a step later
    clips = preparation.prepare(config, tmp_path / "other").clips
    text = error_of(config, out, monkeypatch)
    assert re.search(f"step 1: not finite, first in {message}", text), text
    assert f"clips 0 ({clips[0].name}), 1 ({clips[1].name})" in text
    assert not checkpoint_steps(out) and not read_metrics(out / "metrics.jsonl")


def test_a_head_that_overflows_later_on(config, weights, tmp_path):
    """In what follows the embedding, at a step that is not the first."""
    name = "params/matching_feature/conv/kernel"
    config.init_from = spoiled(weights, tmp_path / "spoiled", name, 3e38)
    training = preparation.prepare(config, tmp_path / "out")
    variables = jax.tree.map(jnp.asarray, training.start.variables)
    state = create_state(variables, optax.sgd(0.1), seed=0)._replace(step=jnp.int32(3))
    text = explain(training.start, training.clips, training.options, state, 2)
    first = "step 4: not finite, first in the output of matching_feature/norm of clip 6 "
    assert text.startswith(first), text
    names = [training.clips[index].name for index in (6, 7)]
    assert text.endswith(f"clips 6 ({names[0]}), 7 ({names[1]})"), text


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite(config, tmp_path, monkeypatch, what):
    """Where weights and activations are: an infinite loss, and a root at 0, which has no slope."""
    training = preparation.prepare(config, tmp_path / "out")
    variables = jax.tree.map(jnp.asarray, training.start.variables)
    state = create_state(variables, optax.sgd(0.1), seed=0)

    def loss(logits, *_):
        mean = jnp.mean(logits, axis=(1, 2, 3))
        return mean / 0 if what == "loss" else jnp.sqrt(jnp.abs(mean) * 0)

    monkeypatch.setattr("cfbi_jax.training.step.bootstrapped_cross_entropy", loss)
    text = explain(training.start, training.clips, training.options, state, 2)
    named = {
        "loss": r"the loss of clip 0, -?inf",
        "gradient": r"the gradient of clip 0 to \w+(/\w+)* \(\d+ of \d+\)",
    }
    assert re.match(f"step 1: not finite, first in {named[what]}; clips 0 ", text), text


def test_not_finite_is_known_even_where_nothing_is_logged(config, weights, tmp_path, monkeypatch):
    config.init_from = spoiled(
        weights, tmp_path / "spoiled", "params/deeplab/backbone/conv1/kernel", 3e38
    )
    config.log_every_steps = config.checkpoint_every_steps = config.picture_every_steps = 0
    monkeypatch.setattr(loop, "CHECK_EVERY", 3)
    steps = []
    monkeypatch.setattr(loop.Evaluations, "due", lambda self, step: steps.append(step))
    text = error_of(config, tmp_path / "out", monkeypatch)
    assert "step 1: not finite" in text
    assert max(steps) < 3 < STEPS


def test_out_of_memory_names_what_helps(config, tmp_path, monkeypatch):
    def make_train_step(*_):
        def step(state, batch):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"
            )

        return step

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    text = error_of(config, tmp_path / "out", monkeypatch)
    assert text.startswith("error: out of device memory; less memory: config.remat=segment or all")
    assert "config.accumulate" in text and text.endswith("allocating 99 bytes")
