"""Loss, predictions and gradients against the authors' code: golden cases i and j."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe import DATA, golden, recipe_state_dict

from cfbi_jax.compilation import compiler_options
from cfbi_jax.models.images import OFFICIAL_FORMAT
from cfbi_jax.training.losses import bootstrapped_cross_entropy, mining_ratio
from cfbi_jax.training.step import Batch, StepOptions, clip_losses, pack_rows
from cfbi_jax.weights.names import official_key, to_official
from cfbi_jax.weights.official import convert_state_dict

MINING_STEP = 50_000
BIASES = ("bg_bias", "fg_bias")


def test_loss():
    case = golden("case_i_loss")
    logits, target = (jnp.asarray(case[name][:, 0]) for name in ("logits", "target"))
    for i, step in enumerate(case["steps"]):
        ratio = mining_ratio(int(step), MINING_STEP)
        found = bootstrapped_cross_entropy(logits, target, ratio)
        np.testing.assert_allclose(found, case["loss"][i], rtol=1e-6)
    found = bootstrapped_cross_entropy(logits, target, mining_ratio(0, 0))
    np.testing.assert_allclose(found, case["loss_hardmining0"], rtol=1e-6)


@pytest.fixture(scope="module")
def gradients():
    """step -> (losses [clip], predictions [clip, h, w], gradient by official key)."""
    case = golden("case_j_train")
    model, variables = convert_state_dict(recipe_state_dict("r101_cfbi"))
    model = model.clone(dropout=0.0)
    num_objects = case["gt_ids"].astype(np.int32)
    options = StepOptions(max_objects=2, mining_step=MINING_STEP)
    packing = pack_rows(num_objects, 1, 2)
    batch = Batch(
        frames=case["frames"],
        labels=np.stack([case["ref_label"], case["prev_label"], case["cur_label"]], axis=1),
        num_objects=num_objects,
        index=np.arange(2, dtype=np.int32),
        packing=jax.tree.map(lambda x: x[0], packing),
    )

    @partial(jax.jit, compiler_options=compiler_options())
    def value_and_gradient(params, step):
        def mean_loss(params):
            losses, _, prediction = clip_losses(
                model,
                OFFICIAL_FORMAT,
                options,
                params,
                variables["frozen"],
                step,
                jax.random.key(0),
                jax.tree.map(jnp.asarray, batch),
            )
            return jnp.mean(losses), (losses, prediction)

        return jax.grad(mean_loss, has_aux=True)(params)

    results = {}
    for step in (0, 60_000):
        gradient, (losses, prediction) = value_and_gradient(variables["params"], jnp.int32(step))
        by_key = {}
        for path, value in jax.tree_util.tree_flatten_with_path(gradient)[0]:
            names = ("params", *(part.key for part in path))
            by_key[official_key(names)] = to_official(names[-1], np.asarray(value))
        results[step] = np.asarray(losses), np.asarray(prediction)[:, 0], by_key
    return results


@pytest.mark.parametrize("step", [0, 60_000])
def test_losses_and_predictions(gradients, step):
    case = golden("case_j_train")
    losses, prediction, _ = gradients[step]
    np.testing.assert_allclose(losses, case[f"step{step}_loss"], rtol=2e-5)
    np.testing.assert_array_equal(prediction, case[f"step{step}_pred"])


@pytest.mark.parametrize("step", [0, 60_000])
def test_gradients(gradients, step):
    """Norms of every parameter's gradient, and all values where they are stored.

    The tolerances are the gradient's own noise: changing every weight of this case by at most one
    unit in its last place moves the two biases (scalars, sums over all pixels that nearly cancel)
    by up to 5 %, and other norms by up to 1.2 %, as some pixels find another nearest pixel.
    """
    case = golden("case_j_train")
    norms = json.loads((DATA / f"case_j_train_gradnorm_step{step}.json").read_text())
    found = gradients[step][2]
    assert found.keys() == norms.keys()
    errors = []
    for key, expected in norms.items():
        norm = np.linalg.norm(found[key].astype(np.float64))
        assert norm == pytest.approx(expected, rel=0.06 if key in BIASES else 0.012), key
        errors.append(abs(norm / expected - 1))
    assert np.median(errors) < 5e-4
    prefix = f"step{step}_grad/"
    stored = {key.removeprefix(prefix): case[key] for key in case if key.startswith(prefix)}
    assert len(stored) == 58
    for key, expected in stored.items():
        cosine = np.sum(found[key] * expected) / np.linalg.norm(found[key])
        assert cosine / np.linalg.norm(expected) > 0.9998, key
        if key not in BIASES:
            largest = np.abs(expected).max()
            np.testing.assert_allclose(found[key], expected, atol=0.025 * largest, err_msg=key)
