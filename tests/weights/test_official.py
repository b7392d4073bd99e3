"""Official state dicts in and out, on full-size dicts made from the recipe."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
from backbone_files import (
    deeplab_state,
    torchvision_mobilenet_state,
    torchvision_resnet_state,
)

from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.weights.official import (
    computed_otherwise,
    convert_backbone,
    convert_state_dict,
    export_state_dict,
)

MODELS = {"r101_cfbi": "resnet101", "mbv2_cfbi": "mobilenet_v2"}


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_the_published_one(name):
    checksums = json.loads((recipe.DATA / f"checksums_{name}.json").read_text())
    state = recipe.recipe_state_dict(name)
    found = {k: zlib.crc32(np.ascontiguousarray(v).tobytes()) for k, v in state.items()}
    assert found == checksums


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact_both_ways(name):
    state = recipe.recipe_state_dict(name)
    model, variables = convert_state_dict(state)
    assert model == CFBI(backbone=MODELS[name])
    exported = export_state_dict(model, variables)
    assert set(exported) == set(state)
    for key, value in state.items():
        assert exported[key].dtype == np.float32
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
    _, again = convert_state_dict(exported)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layouts():
    """One array of each layout, by its meaning rather than by the converter's own rules."""
    state = recipe.recipe_state_dict("r101_cfbi")
    _, variables = convert_state_dict(state)
    params, frozen = variables["params"], variables["frozen"]
    kernel = state["feature_extracter.backbone.layer2.0.conv2.weight"]  # [out, in, y, x]
    ours = params["deeplab"]["backbone"]["layer2_0"]["conv2"]["kernel"]
    assert ours[0, 2, 5, 7] == kernel[7, 5, 0, 2]
    gate = state["dynamic_seghead.IA10.IA.weight"]  # [out, in]
    assert params["ensembler"]["gate10"]["linear"]["kernel"][3, 4] == gate[4, 3]
    alpha = state["dynamic_seghead.layer1.GCT1.alpha"]
    assert params["ensembler"]["layer1"]["gct"]["alpha"][9] == alpha[0, 9, 0, 0]
    depthwise = state["seperate_conv.weight"]  # [c, 1, y, x]
    assert params["pixel_embedding"]["depthwise"]["kernel"][1, 2, 0, 6] == depthwise[6, 0, 1, 2]
    assert params["background_bias"] == state["bg_bias"].item()
    bn = frozen["deeplab"]["backbone"]["bn1"]
    assert bn["var"][3] == state["feature_extracter.backbone.bn1.running_var"][3]
    assert bn["scale"][3] == state["feature_extracter.backbone.bn1.weight"][3]


def test_data_parallel_prefix():
    state = recipe.recipe_state_dict("mbv2_cfbi")
    _, plain = convert_state_dict(state)
    _, prefixed = convert_state_dict({f"module.{k}": v for k, v in state.items()})
    assert plain["params"]["foreground_bias"] == prefixed["params"]["foreground_bias"]
    with pytest.raises(ValueError, match=r"two values for .* module\.bg_bias and bg_bias"):
        convert_state_dict(state | {"module.bg_bias": state["bg_bias"]})


def test_every_problem_is_listed():
    state = dict(recipe.recipe_state_dict("r101_cfbi"))
    del state["embedding_conv.bias"], state["dynamic_seghead.conv2.weight"]
    state["optimizer.momentum"] = np.zeros(3, np.float32)
    state["dynamic_prehead.conv.weight"] = np.zeros((64, 8, 1, 1), np.float32)
    state["dynamic_seghead.bn2.bias"] = state["dynamic_seghead.bn2.bias"].astype(np.float16)
    state["semantic_embedding.0.bias"] = state["semantic_embedding.0.bias"] + 1
    with pytest.raises(ValueError) as error:
        convert_state_dict(state)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("(6 problems):")
    assert [line.strip() for line in lines[1:]] == [
        "missing: dynamic_seghead.conv2.weight (128, 128, 3, 3)",
        "missing: embedding_conv.bias (100,)",
        "extra: optimizer.momentum (3,)",
        "wrong shape: dynamic_prehead.conv.weight is (64, 8, 1, 1), expected (64, 15, 1, 1)",
        "wrong type: dynamic_seghead.bn2.bias is float16, expected float32",
        "two values for one tensor: semantic_embedding.0.bias and seperate_conv.bias",
    ]


def test_other_networks_are_named():
    state = recipe.recipe_state_dict("r101_cfbi")
    with pytest.raises(ValueError, match="CFBI\\+"):
        convert_state_dict({**state, "fpn.toplayer.1.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="not a CFBI state dict.*found conv1.weight"):
        convert_state_dict({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})


@pytest.mark.parametrize("field, value", [("windows", (12,)), ("head", "feelvos")])
def test_a_model_that_the_official_code_lacks_is_not_exported(field, value):
    with pytest.raises(ValueError, match=field):
        export_state_dict(CFBI(**{field: value}), {})


def test_what_the_official_code_would_compute_otherwise():
    assert computed_otherwise(CFBI(backbone="mobilenet_v2", dropout=0.5)) == {}
    model = CFBI(local_downsample=False, compute_dtype=jnp.bfloat16)
    assert computed_otherwise(model) == {
        "local_downsample": (False, True),
        "compute_dtype": ("bfloat16", "float32"),
    }


# --------------------------------------------------------------------------- backbone-only files


@pytest.mark.parametrize(
    "name, make, parts",
    [
        ("r101_cfbi", lambda: deeplab_state("r101_cfbi"), {"backbone", "aspp", "decoder"}),
        ("mbv2_cfbi", lambda: deeplab_state("mbv2_cfbi"), {"backbone", "aspp", "decoder"}),
        ("r101_cfbi", torchvision_resnet_state, {"backbone"}),
        ("mbv2_cfbi", torchvision_mobilenet_state, {"backbone"}),
    ],
)
def test_backbone_files(name, make, parts):
    model, full = convert_state_dict(recipe.recipe_state_dict(name))
    found = convert_backbone(make(), model)
    for collection in ("params", "frozen"):
        assert set(found[collection]) == {"deeplab"}
        assert set(found[collection]["deeplab"]) == parts
        for part in parts:
            expected = full[collection]["deeplab"][part]
            jax.tree.map(
                np.testing.assert_array_equal, found[collection]["deeplab"][part], expected
            )


def test_backbone_file_of_another_network():
    state = torchvision_resnet_state()
    with pytest.raises(ValueError, match="do not fit"):
        convert_backbone(state, CFBI(backbone="mobilenet_v2"))
    state.pop("layer3.4.conv2.weight")
    with pytest.raises(ValueError, match="missing: .*layer3.4.conv2.weight"):
        convert_backbone(state, CFBI())
