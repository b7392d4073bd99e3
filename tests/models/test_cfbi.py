"""The network as a whole, small: padding, batches, references, and the paper's switches."""

import math
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SMALL, random_variables, small_network

from cfbi_jax.models.cfbi import (
    CFBI,
    build_model,
    initial_variables,
    mask_padding,
    model_config,
    parameter_shapes,
)
from cfbi_jax.models.ensembler import FeelvosHead

SIZE = (9, 13)  # of the embedding


@pytest.fixture(scope="module")
def network():
    return small_network()


def random_inputs(batch, references, num_objects, seed=0, low=32):
    """Arguments of `CFBI.segment` but for the number of rows."""
    rng = np.random.default_rng(seed)

    def embedding(*shape):
        return jnp.asarray(rng.random((*shape, *SIZE, 16)), jnp.float32)

    def label(*shape):
        return jnp.asarray(rng.integers(0, num_objects + 1, (*shape, *SIZE)), jnp.uint8)

    return {
        "reference": embedding(batch, references),
        "reference_label": label(batch, references),
        "num_references": jnp.full(batch, references, jnp.int32),
        "previous": embedding(batch),
        "previous_label": label(batch),
        "current": embedding(batch),
        "low_level": jnp.asarray(rng.random((batch, *SIZE, low)), jnp.float32),
        "num_objects": jnp.full(batch, num_objects, jnp.int32),
    }


@cache
def jitted_segment(model, num_rows):
    return jax.jit(
        lambda variables, inputs: model.apply(
            variables, **inputs, num_rows=num_rows, method=CFBI.segment
        )
    )


def segment(model, variables, inputs, num_rows):
    return jitted_segment(model, num_rows)(variables, inputs)


def assert_same(found, expected):
    """Equal but for float32 rounding: padding and batching change the order of sums."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * scale)


@pytest.mark.parametrize("num_objects", [0, 2])
def test_padded_rows_change_nothing(network, num_objects):
    inputs = random_inputs(1, 1, num_objects)
    expected = segment(*network, inputs, num_objects + 1)
    for padding in (1, 7):
        found = segment(*network, inputs, num_objects + 1 + padding)
        assert_same(found[:, : num_objects + 1], expected)
        masked = jax.nn.softmax(mask_padding(found, inputs["num_objects"]), axis=1)
        np.testing.assert_array_equal(masked[:, num_objects + 1 :], 0)
        np.testing.assert_allclose(
            masked[:, : num_objects + 1], jax.nn.softmax(expected, axis=1), atol=1e-4
        )


def test_videos_of_a_batch_keep_their_own_number_of_objects(network):
    alone = [random_inputs(1, 1, n, seed=n) for n in (0, 1, 3)]
    together = {k: jnp.concatenate([inputs[k] for inputs in alone]) for k in alone[0]}
    found = segment(*network, together, 4)
    for i, n in enumerate((0, 1, 3)):
        expected = segment(*network, alone[i], n + 1)
        assert_same(found[i, : n + 1], expected[0])


def test_padded_references_change_nothing(network):
    inputs = random_inputs(1, 2, 2)
    expected = segment(*network, inputs, 3)
    padded = dict(inputs)
    for name in ("reference", "reference_label"):  # with what an unused place may hold
        padded[name] = jnp.concatenate([inputs[name], inputs[name][:, ::-1] + 1], axis=1)
    assert_same(segment(*network, padded, 3), expected)
    one_less = {**inputs, "num_references": jnp.array([1])}
    assert np.abs(segment(*network, one_less, 3) - expected).max() > 1e-3


def test_order_of_references_and_of_rows_is_immaterial(network):
    inputs = random_inputs(1, 3, 2)
    expected = segment(*network, inputs, 3)
    turned = dict(inputs)
    for name in ("reference", "reference_label"):
        turned[name] = inputs[name][:, ::-1]
    assert_same(segment(*network, turned, 3), expected)
    swapped = dict(inputs)
    table = jnp.array([0, 2, 1], jnp.uint8)
    for name in ("reference_label", "previous_label"):
        swapped[name] = table[inputs[name]]
    found = segment(*network, swapped, 3)
    assert_same(found[:, [0, 2, 1]], expected)


def test_an_object_without_any_pixel_is_finite(network):
    inputs = random_inputs(1, 1, 1)
    inputs["num_objects"] = jnp.array([3])  # objects 2 and 3 vanished at stride 4
    assert np.isfinite(segment(*network, inputs, 4)).all()


def shapes(model):
    flat, _ = jax.tree_util.tree_flatten_with_path(parameter_shapes(model)["params"])
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in flat}


def test_switches_remove_what_the_paper_removes():
    """Input widths follow from the paper: windows, previous mask, and one global map each."""
    full = shapes(CFBI())
    assert full["matching_feature/conv/kernel"] == (1, 1, 15, 64)
    assert full["ensembler/layer1/conv1/kernel"] == (1, 1, 364, 64)
    assert full["ensembler/gate1/linear/kernel"] == (400, 364)

    pixel = shapes(CFBI(pixel_background=False))
    assert pixel["matching_feature/conv/kernel"] == (1, 1, 8, 64)
    assert pixel["ensembler/layer1/conv1/kernel"] == (1, 1, 264, 64)
    assert pixel["ensembler/gate1/linear/kernel"] == (400, 264)

    instance = shapes(CFBI(instance_background=False))
    assert instance["ensembler/gate1/linear/kernel"] == (200, 364)

    biases = {"background_bias", "foreground_bias"}
    assert set(full) - set(shapes(CFBI(distance_bias=False))) == biases

    single = shapes(CFBI(windows=(12,)))
    assert single["matching_feature/conv/kernel"] == (1, 1, 5, 64)

    no_attention = shapes(CFBI(instance_attention=False))
    assert not any("gate" in name for name in no_attention)
    assert no_attention["ensembler/logits/foreground/linear/kernel"] == (128, 1)

    feelvos = shapes(CFBI(head="feelvos"))
    assert feelvos["ensembler/depthwise1/kernel"] == (7, 7, 1, 364)
    assert feelvos["ensembler/pointwise4/kernel"] == (1, 1, 256, 256)


@pytest.mark.parametrize(
    "switch",
    [
        dict(pixel_background=False),
        dict(instance_background=False),
        dict(distance_bias=False),
        dict(instance_attention=False),
        dict(head="feelvos"),
        dict(head="feelvos", instance_attention=False, pixel_background=False, windows=(3,)),
        dict(global_atrous_rate=2, local_atrous_rate=2),
    ],
)
def test_every_switch_runs_and_ignores_padding(switch):
    model = CFBI(**{**SMALL, **switch})
    variables = random_variables(model, seed=1)
    inputs = random_inputs(1, 1, 2)
    expected = segment(model, variables, inputs, 3)
    assert np.isfinite(expected).all()
    found = segment(model, variables, inputs, 5)
    assert_same(found[:, :3], expected)


def test_every_parameter_learns_without_what_the_paper_adds():
    """Gradients of the whole network are golden; these are of the least head, quick to compile."""
    off = dict.fromkeys(("pixel_background", "instance_background", "distance_bias"), False)
    model = CFBI(**{**SMALL, **off, "head": "feelvos", "windows": (3,)})
    variables = random_variables(model, seed=1)
    inputs = random_inputs(1, 1, 2)

    def square(params):
        logits = model.apply(
            variables | {"params": params}, **inputs, num_rows=3, method=CFBI.segment
        )
        return jnp.sum(logits**2)

    gradient = jax.jit(jax.grad(square))(variables["params"])
    for path, array in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = jax.tree_util.keystr(path)
        assert np.isfinite(array).all(), name
        embedding = "deeplab" in name or "pixel_embedding" in name  # is given here
        assert np.any(array != 0) != embedding, name


def intermediates(model, variables, inputs, num_rows):
    """What `segment` notes, and what the prehead and the head get."""

    def found(variables, inputs):
        got = {}

        def note(call, arguments, keywords, context):
            if context.module.name in ("matching_feature", "ensembler"):
                got[context.module.name] = arguments[0]
            return call(*arguments, **keywords)

        with nn.intercept_methods(note):
            _, sown = model.apply(
                variables, **inputs, num_rows=num_rows, method=CFBI.segment, mutable="intermediates"
            )
        return got | {name: value for name, (value,) in sown["intermediates"].items()}

    return jax.jit(found)(variables, inputs)


def test_what_the_switches_of_table_4_leave_out(network):
    """The full network's inputs, which golden numbers know, without those of the background."""
    inputs = random_inputs(1, 2, 2)
    full = intermediates(*network, inputs, 3)
    width, windows = SMALL["embedding_dim"], len(SMALL["windows"])

    # Reference object and previous object, without the rest of both.
    means = np.split(full["instance_vector"], 4, axis=-1)
    model = CFBI(**SMALL, instance_background=False)
    found = intermediates(model, random_variables(model, seed=0), inputs, 3)
    assert_same(found["instance_vector"], np.concatenate([means[0], means[2]], axis=-1))
    assert np.abs(means[0] - means[1]).max() > 0.01

    # Global map, local maps, previous mask; current embedding and that of the previous object.
    model = CFBI(**SMALL, pixel_background=False)
    variables = random_variables(model, seed=0)
    for name in ("background_bias", "foreground_bias"):
        variables["params"][name] = network[1]["params"][name]
    found = intermediates(model, variables, inputs, 3)
    assert found["matching_feature"].shape[-1] == windows + 2
    assert_same(found["matching_feature"], full["matching_feature"][..., : windows + 2])
    assert_same(found["ensembler"][..., : 2 * width], full["ensembler"][..., : 2 * width])
    feature = found["ensembler"].shape[-1] - 2 * width
    assert feature == full["ensembler"].shape[-1] - 3 * width == SMALL["matching_dim"]


def test_without_distance_bias_both_are_zero(network):
    _, variables = network
    model = CFBI(**SMALL, distance_bias=False)
    params = dict(variables["params"])
    zero = {name: jnp.float32(0) for name in ("background_bias", "foreground_bias")}
    inputs = random_inputs(1, 1, 2)
    expected = segment(CFBI(**SMALL), {**variables, "params": params | zero}, inputs, 3)
    for name in zero:
        assert params.pop(name) != 0
    assert_same(segment(model, {**variables, "params": params}, inputs, 3), expected)


@pytest.mark.parametrize("attention", [True, False])
def test_feelvos_head(attention):
    """Against its layers written out: gate, 7 x 7 for each channel, norm, 1 x 1, norm."""
    features, channels = 32, 48
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *SIZE, channels)).astype(np.float32)
    vector = rng.standard_normal((2, 8)).astype(np.float32) if attention else None
    low_level = jnp.zeros((2, *SIZE, 4))
    head = FeelvosHead(features)
    shapes = jax.eval_shape(head.init, jax.random.key(0), x, low_level, vector)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes["params"]
    )

    def norm(y, of):  # in 16 or 32 groups, all that divides these widths
        n, h, w, c = y.shape
        groups = y.reshape(n, h * w, math.gcd(32, c), -1)
        mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        y = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(y.shape)
        return np.maximum(y * of["scale"] + of["bias"], 0)

    y = x.astype(np.float64)
    for i in range(1, 5):
        if attention:
            linear = params[f"gate{i}"]["linear"]
            y = y * (1 + np.tanh(vector @ linear["kernel"] + linear["bias"]))[:, None, None]
        padded = np.pad(y, ((0, 0), (3, 3), (3, 3), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), (1, 2))
        depthwise, pointwise = params[f"depthwise{i}"], params[f"pointwise{i}"]
        y = np.einsum("nhwcij,ijc->nhwc", patches, depthwise["kernel"][:, :, 0])
        y = norm(y + depthwise["bias"], params[f"depthwise_norm{i}"])
        y = norm(y @ pointwise["kernel"][0, 0] + pointwise["bias"], params[f"pointwise_norm{i}"])
    found = jax.jit(head.apply)({"params": params}, x, low_level, vector)
    for name, logit in zip(("foreground", "background"), found, strict=True):
        linear = params["logits"][name]["linear"]
        if attention:
            kernel = vector @ linear["kernel"] + linear["bias"]
            expected = np.einsum("nhwc,nc->nhw", y, kernel[:, :-1]) + kernel[:, -1, None, None]
        else:
            expected = (y @ linear["kernel"] + linear["bias"])[..., 0]
        assert_same(logit, expected)


def test_without_attention_gates_are_one_and_logits_their_own():
    """That is attention whose gates and logits see no instance."""
    model = CFBI(**SMALL, instance_attention=False)
    variables = random_variables(model, seed=1)
    attentive = jax.tree.map(jnp.zeros_like, small_network()[1])

    def fill(tree, own, path=()):
        for key, value in tree.items():
            if isinstance(value, dict):
                value = fill(value, own.get(key, {}), (*path, key))
            elif path[-3:-1] in (("logits", "foreground"), ("logits", "background")):
                if key == "bias":  # the 1x1 kernel and the bias of the logit
                    value = jnp.concatenate([own["kernel"][:, 0], own["bias"]])
            elif key in own:
                value = own[key]
            tree[key] = value
        return tree

    for collection in attentive:
        fill(attentive[collection], variables[collection])
    inputs = random_inputs(1, 1, 2)
    expected = segment(CFBI(**SMALL), attentive, inputs, 3)
    assert float(np.abs(expected).max()) > 0.1
    assert_same(segment(model, variables, inputs, 3), expected)


def test_model_config_round_trip_and_errors():
    model = CFBI(backbone="mobilenet_v2", windows=(4, 2), compute_dtype=jnp.bfloat16)
    assert build_model(model_config(model)) == model
    with pytest.raises(ValueError, match='unknown model field "widnows"'):
        build_model({"widnows": (1,)})
    with pytest.raises(ValueError, match="compute_dtype"):
        build_model({"compute_dtype": "float64"})
    with pytest.raises(ValueError, match='head is "other"'):
        parameter_shapes(CFBI(head="other"))
    with pytest.raises(ValueError, match='backbone is "vgg"'):
        parameter_shapes(CFBI(backbone="vgg"))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("embedding_dim", 50, "expected a multiple of 4"),
        ("matching_dim", 13, "expected a multiple of 4"),
        ("matching_dim", 2, "expected a multiple of 4"),
        ("embedding_dim", 6, "expected a multiple of 4"),
        ("ensembler_dim", 3, "expected a multiple of 4"),
        ("resnet_blocks", (1, 1, 1), "expected 4 numbers"),
        ("resnet_blocks", (1, 1, 1.5, 1), "expected integers, 1 or more"),
        ("decoder_dim", 5, "expected 6 or more"),
        ("windows", 12, "expected integers, 1 or more"),
        ("windows", (2.5,), "expected integers, 1 or more"),
        ("windows", (), "expected 1 or more"),
        ("embedding_dim", 0, "expected 1 or more"),
    ],
)
def test_numbers_that_make_no_network(field, value, message):
    with pytest.raises(ValueError, match=f"model field {field} is .*{message}"):
        build_model({field: value})


def test_the_narrowest_decoder():
    """`decoder_dim` 6 leaves one channel of low-level features."""
    kernel = parameter_shapes(CFBI(**SMALL | {"decoder_dim": 6}))["params"]["deeplab"]["decoder"]
    assert 1 in {leaf.shape[-1] for leaf in jax.tree.leaves(kernel)}
    assert build_model({"decoder_dim": 6}).decoder_dim == 6


def test_initial_variables():
    """A fresh network: shapes as stated, gates open, GCT the identity, biases zero, finite."""
    model = CFBI(**SMALL)
    variables = initial_variables(model, seed=0)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), parameter_shapes(model))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == expected
    assert variables["params"]["background_bias"] == variables["params"]["foreground_bias"] == 0
    np.testing.assert_array_equal(variables["params"]["ensembler"]["skip_gct"]["gamma"], 0)
    kernel = variables["params"]["ensembler"]["conv1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / np.prod(kernel.shape[:3])), rtol=0.1)
    again = initial_variables(model, seed=0)
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    other = initial_variables(model, seed=1)["params"]["ensembler"]["conv1"]["kernel"]
    assert (other != kernel).any()
