"""Scales of the random layers: what the calibrated network computes, by NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SMALL, random_variables

from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT, prepare
from cfbi_jax.models.layers import FrozenBatchNorm
from cfbi_jax.weights.calibration import LOGIT_SCALE, NEAREST, calibrated
from cfbi_jax.weights.checkpoint import Checkpoint

MODEL = CFBI(**SMALL)


def norms(tree, path=()):
    if "var" in tree:
        return {path: tree}
    return {k: v for key in tree for k, v in norms(tree[key], (*path, key)).items()}


def leaves(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def pairs():
    return np.random.default_rng(0).integers(0, 256, (3, 2, 49, 49, 3), np.uint8)


@pytest.fixture(scope="module")
def start():
    """A backbone with statistics, and norms on top of it that are the identity."""
    fresh = random_variables(MODEL, seed=1)
    for path, norm in norms(fresh["frozen"]).items():
        if "backbone" not in path:
            zero, one = np.zeros_like(norm["mean"]), np.ones_like(norm["mean"])
            norm.update(scale=one, bias=zero, mean=zero, var=one)
    return Checkpoint(MODEL, fresh, IMAGENET_FORMAT)


@pytest.fixture(scope="module")
def found(start, pairs):
    return calibrated(start, pairs)


def embed(checkpoint, pairs):
    """(embedding, outputs of all frozen norms) of all frames, in one batch."""
    images = prepare(jnp.asarray(pairs.reshape(-1, 49, 49, 3)), (49, 49), IMAGENET_FORMAT)
    apply = partial(
        checkpoint.model.apply,
        method=CFBI.embed,
        capture_intermediates=lambda module, _: isinstance(module, FrozenBatchNorm),
    )
    (embedding, _), captured = jax.jit(apply)(checkpoint.variables, images)
    outputs = {}

    def collect(tree, path=()):
        for key, value in tree.items():
            if key == "__call__":
                outputs[path] = np.asarray(value[0], np.float64)
            elif isinstance(value, dict):
                collect(value, (*path, key))

    collect(captured["intermediates"])
    return np.asarray(embedding, np.float64), outputs


def test_norms_without_statistics_normalise(start, found, pairs):
    _, outputs = embed(found, pairs)
    before = norms(start.variables["frozen"])
    assert set(outputs) == set(before)
    head = {path for path in outputs if "backbone" not in path}
    assert len(head) == 9  # five of ASPP, its projection, three of the decoder
    for path in head:
        np.testing.assert_allclose(outputs[path].mean((0, 1, 2)), 0, atol=1e-4)
        variance = outputs[path].var((0, 1, 2))
        assert np.all(variance < 1.001)
        assert np.median(variance) > 0.99


def test_embedding_and_logits(start, found, pairs):
    embedding, _ = embed(found, pairs)
    frames = embedding.reshape(3, 2, -1, embedding.shape[-1])
    nearest = [
        np.square(query[:, None] - reference[None]).sum(-1).min(1) for reference, query in frames
    ]
    assert np.median(nearest) == pytest.approx(NEAREST, rel=1e-3)
    for name, before in leaves(start.variables["params"]["ensembler"]["logits"]).items():
        after = leaves(found.variables["params"]["ensembler"]["logits"])[name]
        np.testing.assert_allclose(after, LOGIT_SCALE * np.asarray(before), rtol=1e-6)


def test_nothing_else_changes(start, found):
    before, after = leaves(start.variables), leaves(found.variables)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    allowed = ("['mean']", "['var']", "['logits']", "['pixel_embedding']['norm2']")
    assert changed and all(any(part in name for part in allowed) for name in changed)
    assert not any("backbone" in name for name in changed)


def test_still_videos_leave_the_embedding_as_it_is(start, pairs):
    found = calibrated(start, pairs[:, [0, 0]])
    before, after = (x.variables["params"]["pixel_embedding"] for x in (start, found))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.variables))


def test_a_channel_without_life_is_not_blown_up(start, pairs):
    """Its variance counts as a hundredth of the others' mean."""
    variables = jax.tree.map(np.array, start.variables)
    kernel = variables["params"]["deeplab"]["aspp"]["aspp1"]["conv"]["kernel"]
    kernel[..., 0] = 0
    kernel[..., 1] *= 1e-3
    found = calibrated(dataclasses.replace(start, variables=variables), pairs)
    plain = norms(calibrated(start, pairs).variables["frozen"])
    (path,) = (p for p in plain if "aspp1" in p)
    variance = np.asarray(norms(found.variables["frozen"])[path]["var"])
    live = np.asarray(plain[path]["var"])[2:].sum() / len(variance)  # the first two have none
    np.testing.assert_allclose(variance[:2], live / 100, rtol=1e-3)


def test_norms_that_a_file_gave_anything_stay(start, pairs):
    variables = jax.tree.map(np.array, start.variables)
    before = norms(variables["frozen"])
    given = [path for path in before if "backbone" not in path][:4]
    for path, name in zip(given, ("mean", "bias", "var", "scale"), strict=True):
        before[path][name][0] += 0.5
    kept = {path: {k: v.copy() for k, v in before[path].items()} for path in given}
    after = norms(
        calibrated(dataclasses.replace(start, variables=variables), pairs).variables["frozen"]
    )
    for path, values in kept.items():
        for name, value in values.items():
            np.testing.assert_array_equal(after[path][name], value)


def test_a_whole_network_stays(pairs):
    whole = Checkpoint(MODEL, random_variables(MODEL, seed=2), IMAGENET_FORMAT)
    assert calibrated(whole, pairs) is whole


def test_half_precision_has_float32_constants(start, found, pairs):
    """As a run that goes on has them, and close to those of single precision."""
    model = MODEL.clone(compute_dtype=jnp.bfloat16)
    half = calibrated(dataclasses.replace(start, model=model), pairs)
    assert {x.dtype for x in jax.tree.leaves(half.variables)} == {np.dtype(np.float32)}
    exact = norms(found.variables["frozen"])
    for path, norm in norms(half.variables["frozen"]).items():
        for name in ("mean", "var"):
            scale = np.abs(exact[path][name]).max()
            assert np.abs(norm[name] - exact[path][name]).max() < 0.1 * scale
            if np.any(norm[name] != exact[path][name]):  # not of bfloat16's few values
                rounded = norm[name].astype(jnp.bfloat16).astype(np.float32)
                assert np.any(rounded != norm[name])
