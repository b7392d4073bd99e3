"""Single operations against the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe

from cfbi_jax.models import (
    attention,
    deeplab,
    ensembler,
    layers,
    matching,
    matching_global,
    matching_local,
    mobilenet_v2,
    resizing,
)
from cfbi_jax.models.cfbi import MatchingFeature, augment_background
from cfbi_jax.weights.official import convert_state_dict

# On GPUs, as in the network: no TF32.
pytestmark = pytest.mark.usefixtures("exact_products")

OPS = recipe.golden("ops")
MAPS = 5e-5


def to_nhwc(x):
    return jnp.asarray(np.asarray(x, np.float32).transpose(0, 2, 3, 1))


def assert_close(found, expected, atol=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name, references, options",
    [
        ("gm_one_ref", 1, {}),
        ("gm_two_refs", 2, {}),
        ("gm_one_ref_atrous2", 1, {"atrous_rate": 2}),
        ("gm_one_ref_atrous3", 1, {"atrous_rate": 3}),
        ("gm_two_refs_atrous2", 2, {"atrous_rate": 2}),
        ("gm_train_atrous2", 1, {"atrous_rate": 2}),
        ("gm_one_ref_float16", 1, {"dtype": jnp.float16}),
    ],
)
def test_global_matching(name, references, options):
    reference = jnp.stack([jnp.asarray(OPS[f"gm_ref{i}"]) for i in range(references)])
    label = jnp.stack([jnp.asarray(OPS[f"gm_label{i}"]) for i in range(references)])
    found = matching_global.global_matching(
        jnp.asarray(OPS["gm_query"])[None],
        reference[None],
        label[None],
        jnp.asarray(OPS["gm_bias"]),
        **options,
    )
    assert_close(found[0], OPS[name], MAPS)


def test_global_matching_without_any_labelled_pixel():
    nobody = jnp.full((1, 1, 9, 11), 7, jnp.uint8)
    found = matching_global.global_matching(
        jnp.asarray(OPS["gm_query"])[None],
        jnp.asarray(OPS["gm_ref0"])[None, None],
        nobody,
        jnp.asarray(OPS["gm_bias"]),
    )
    np.testing.assert_array_equal(found[0], OPS["gm_empty_label"])


@pytest.mark.parametrize(
    "variant, options",
    [
        ("odd_down", {}),
        ("even_down", {}),
        ("odd_atrous2", {"downsample": False, "atrous_rate": 2}),
        ("odd_plain", {"downsample": False}),
    ],
)
def test_local_matching(variant, options):
    stored = {k: OPS[f"lm_{variant}_{k}"] for k in ("query", "prev", "label", "windows", "out")}
    ascending = [int(k) for k in stored["windows"]]
    windows = (ascending[-1], *ascending[:-1])  # the network's channel order: largest first
    found = matching_local.local_matching(
        jnp.asarray(stored["query"])[None],
        jnp.asarray(stored["prev"])[None],
        jnp.asarray(stored["label"])[None],
        jnp.asarray(OPS["gm_bias"]),
        windows,
        **options,
    )
    assert_close(found[0], stored["out"], MAPS)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_background_distance(rows):
    foreground = jnp.moveaxis(jnp.asarray(OPS[f"f2b_in_{rows}"]), 0, -1)
    found = matching.background_distance(foreground, jnp.ones((1, rows)))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(found), -1, 0), OPS[f"f2b_out_{rows}"])


@pytest.mark.parametrize("name, references", [("att_train", 1), ("att_eval_two_refs", 2)])
def test_instance_vector(name, references):
    reference = to_nhwc(OPS["att_ref"])[None, :references]
    # one-hot [r, rows, 1, h, w] -> row numbers; pixels of no row become 255
    one_hot = OPS["att_ref_label"][:references, :, 0]
    label = np.where(one_hot.any(axis=1), one_hot.argmax(axis=1), 255).astype(np.uint8)
    previous_one_hot = OPS["att_prev_label"][:, 0]
    previous_label = np.where(
        previous_one_hot.any(axis=0), previous_one_hot.argmax(axis=0), 255
    ).astype(np.uint8)
    found = attention.instance_vector(
        reference,
        jnp.asarray(label)[None],
        jnp.ones((1, references)),
        to_nhwc(OPS["att_prev"]),
        jnp.asarray(previous_label)[None],
        num_rows=3,
    )
    assert_close(found[0], OPS[name], 1e-5)


def test_mean_embedding_of_a_single_pixel():
    """Sums are divided by the count plus 1e-5, as released: rows of few pixels feel it."""
    embedding = jnp.full((1, 1, 1, 2, 3), 7.0)
    label = jnp.array([[[[0, 1]]]], jnp.uint8)
    inside, outside = attention.masked_means(embedding, label, jnp.ones((1, 1)), 3)
    one, two = 7 / (1 + 1e-5), 14 / (2 + 1e-5)
    for found, expected in ((inside, [one, one, 0]), (outside, [one, one, two])):
        np.testing.assert_allclose(found[0], np.outer(expected, np.ones(3)), rtol=1e-6)


def test_linear_layers_begin_as_pytorchs():
    """Uniform within 1 / sqrt(inputs)."""
    kernel = attention.DENSE_INIT(jax.random.key(0), (400, 300))
    assert 0.999 < np.abs(kernel).max() * np.sqrt(400) <= 1
    assert np.std(kernel) * np.sqrt(400) == pytest.approx(1 / np.sqrt(3), rel=0.01)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resize(method):
    tried = 0
    for name, expected in OPS.items():
        if name.startswith(f"{method}_7x9_to_"):
            x = to_nhwc(OPS["interp_in"])[..., : expected.shape[1]]
            found = resizing.resize(x, expected.shape[2:], method)
            assert_close(found.transpose(0, 3, 1, 2), expected, 1e-5)
            tried += 1
    assert tried >= 2


@pytest.mark.parametrize("name", [n for n in OPS if n.startswith("nearest_")])
def test_nearest_indices(name):
    _, size_in, _, size_out = name.split("_")
    np.testing.assert_array_equal(resizing.nearest_indices(int(size_in), int(size_out)), OPS[name])


# ------------------------------------------------------------ modules, with the recipe's weights


@pytest.fixture(scope="module")
def resnet_variables():
    return convert_state_dict(recipe.recipe_state_dict("r101_cfbi"))[1]


def part(variables, *path):
    """The variables of the submodule at `path`, by collection."""
    found = {}
    for collection, tree in variables.items():
        for key in path:
            tree = tree.get(key, {})
        found[collection] = jax.tree.map(jnp.asarray, tree)
    return found


def assert_channels(found, expected, step=4, atol=2e-5):
    assert_close(np.asarray(found).transpose(0, 3, 1, 2)[:, ::step], expected, atol)


def test_gct_gate_and_blocks(resnet_variables):
    x, head = to_nhwc(OPS["mod_x256"]), jnp.asarray(OPS["mod_head"])
    block = part(resnet_variables, "ensembler", "layer2")
    gct = layers.GatedChannelTransform().apply(part(block, "gct"), layers.channel_energy(x))
    assert_channels(x * gct, OPS["gct_layer2.GCT1"])
    gate = attention.Gate(256).apply(part(resnet_variables, "ensembler", "gate2"), head)
    assert_channels(x * gate, OPS["ia_IA2"])
    ones = jnp.ones((x.shape[0], 1, 1, 256))
    found = ensembler.ResBlock(256, dilation=2).apply(block, x, ones)
    assert_channels(found, OPS["bottleneck_layer2"])
    block = part(resnet_variables, "ensembler", "layer3")
    found = ensembler.ResBlock(512, stride=2).apply(block, x, ones)
    assert_channels(found, OPS["bottleneck_layer3_stride2"])


def test_aspps(resnet_variables):
    found = ensembler.EnsemblerAspp(256).apply(
        part(resnet_variables, "ensembler", "aspp"), to_nhwc(OPS["aspp_head_in"])
    )
    assert_channels(found, OPS["aspp_head_out"], step=1)
    found = deeplab.Aspp(256, dropout=0.1).apply(
        part(resnet_variables, "deeplab", "aspp"), to_nhwc(OPS["aspp_deeplab_in"])
    )
    assert_channels(found, OPS["aspp_deeplab_out"], step=1, atol=5e-5)


def test_matching_feature(resnet_variables):
    variables = part(resnet_variables, "matching_feature")
    found = MatchingFeature(64).apply(variables, to_nhwc(OPS["prehead_in"]))
    assert_channels(found, OPS["prehead_out"], step=1)


def test_dynamic_logits_and_background_augmentation(resnet_variables):
    x, head = to_nhwc(OPS["ialogit_x"]), jnp.asarray(OPS["ialogit_head"])
    variables = part(resnet_variables, "ensembler", "logits")
    foreground, background = ensembler.LogitPair().apply(variables, x, head)
    assert_close(foreground, OPS["ialogit_fg"][:, 0], 5e-5)
    assert_close(background, OPS["ialogit_bg"][:, 0], 5e-5)
    found = augment_background(foreground[None], background[None], jnp.ones((1, 3)))
    assert_close(found, OPS["ialogit_pred"], 1e-4)


@pytest.mark.parametrize(
    "number, source, features, stride, dilation",
    [
        (3, "mbv2_block_in", 24, 1, 1),
        (4, "mbv2_block_in", 32, 2, 1),
        (15, "mbv2_block_in160", 160, 1, 2),
    ],
)
def test_inverted_residual(number, source, features, stride, dilation):
    variables = convert_state_dict(recipe.recipe_state_dict("mbv2_cfbi"))[1]
    block = mobilenet_v2.InvertedResidual(features, 6, stride, dilation)
    found = block.apply(
        part(variables, "deeplab", "backbone", f"block{number}"), to_nhwc(OPS[source])
    )
    assert_channels(found, OPS[f"mbv2_features{number}_out"], step=1)
