"""What training starts from. MobileNetV2s with folded norms are compared with NumPy."""

import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
from backbone_files import torchvision_mobilenet_state
from small import SMALL, random_variables

import cfbi_jax
from cfbi_jax.models.cfbi import CFBI, initial_variables
from cfbi_jax.models.images import IMAGENET_FORMAT, OFFICIAL_FORMAT, prepare
from cfbi_jax.models.mobilenet_v2 import MobileNetV2
from cfbi_jax.weights import initial
from cfbi_jax.weights.initial import initial_checkpoint
from cfbi_jax.weights.official import convert_state_dict

MOBILE = CFBI(**SMALL, backbone="mobilenet_v2")


@pytest.fixture
def random(monkeypatch):
    """The variables that the rest of a network is taken from; nothing to compile."""
    monkeypatch.setattr(initial, "initial_variables", random_variables)
    return random_variables(MOBILE, seed=3)


def backbone(variables):
    return {key: variables[key]["deeplab"]["backbone"] for key in ("params", "frozen")}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_rest_is_random(checkpoint, random):
    """All but the backbone is `random`."""

    def rest(variables):
        collections = {key: dict(value) for key, value in variables.items()}
        for content in collections.values():
            content["deeplab"] = {k: v for k, v in content["deeplab"].items() if k != "backbone"}
        return collections

    assert_same(rest(checkpoint.variables), rest(random))


def test_random():
    model = CFBI(**SMALL)
    found = initial_checkpoint(model, "", seed=0)
    assert found.model == model and found.image_format == IMAGENET_FORMAT
    assert_same(found.variables, initial_variables(model, 0))
    kernels = [
        tree["params"]["pixel_embedding"]["pointwise"]["kernel"]
        for tree in (found.variables, initial_checkpoint(model, "", seed=1).variables)
    ]
    assert not np.array_equal(*kernels)


def test_checkpoint(tmp_path, caplog):
    model = CFBI(**SMALL)
    variables = random_variables(model, seed=4)
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", model, variables, OFFICIAL_FORMAT)
    found = initial_checkpoint(model, str(tmp_path / "ckpt"), seed=0)
    assert found.model == model and found.image_format == OFFICIAL_FORMAT
    assert_same(found.variables, variables)
    assert not caplog.records

    # Fields without parameters may differ: training goes on with those of the configuration.
    changed = model.clone(dropout=0.3, local_downsample=False)
    assert initial_checkpoint(changed, str(tmp_path / "ckpt"), seed=0).model == changed
    assert (
        "ckpt was trained with other settings: local_downsample is True there, config.model."
        in (caplog.text)
    )
    for other, difference in (
        (CFBI(**{**SMALL, "embedding_dim": 24}), "embedding_dim is .* there, .*embedding_dim 24"),
        (MOBILE, "backbone is resnet101 there, config.model.backbone mobilenet_v2"),
    ):
        with pytest.raises(ValueError, match=f"ckpt: weights of another network: .*{difference}"):
            initial_checkpoint(other, str(tmp_path / "ckpt"), seed=0)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file.*config\.init_from"):
        initial_checkpoint(MOBILE, str(tmp_path / "none.pth"), seed=0)


# ---- .pth ----


def save_pth(path, state):
    torch = pytest.importorskip("torch", reason="needs the extra [convert]")
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, path)
    return str(path)


def test_torchvision_backbone(tmp_path, random):
    path = save_pth(tmp_path / "mobilenet.pth", torchvision_mobilenet_state())
    found = initial_checkpoint(MOBILE, path, seed=3)
    assert found.image_format == IMAGENET_FORMAT
    _, full = convert_state_dict(recipe.recipe_state_dict("mbv2_cfbi"))
    assert_same(backbone(found.variables), backbone(full))
    assert_rest_is_random(found, random)
    with pytest.raises(ValueError, match=r"mobilenet\.pth: .*do not fit"):
        initial_checkpoint(CFBI(**SMALL), path, seed=0)


def test_official_network(tmp_path, random):
    path = save_pth(tmp_path / "official.pth", recipe.recipe_state_dict("mbv2_cfbi"))
    model = CFBI(backbone="mobilenet_v2")
    found = initial_checkpoint(model, path, seed=0)
    assert found.image_format == OFFICIAL_FORMAT
    _, expected = convert_state_dict(recipe.recipe_state_dict("mbv2_cfbi"))
    assert_same(found.variables, expected)
    with pytest.raises(ValueError, match=r"official\.pth: the arrays are not"):
        initial_checkpoint(MOBILE, path, seed=0)


# ---- .npz of a MobileNetV2 with folded norms ----

CHANNELS = [32, 16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]


def folded_arrays(seed=0):
    """Random float16 arrays of the published layout."""
    rng = np.random.default_rng(seed)
    shapes = {"block00/stem": (3, 3, 3, 32)}
    for block, (inputs, outputs) in enumerate(zip(CHANNELS, CHANNELS[1:], strict=False), 1):
        hidden = inputs if block == 1 else 6 * inputs
        if block > 1:
            shapes[f"block{block:02d}/expand"] = (1, 1, inputs, hidden)
        shapes[f"block{block:02d}/depthwise"] = (3, 3, 1, hidden)
        shapes[f"block{block:02d}/project"] = (1, 1, hidden, outputs)
    arrays = {}
    for key, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[:3]))
        arrays[f"{key}/kernel"] = (scale * rng.standard_normal(shape)).astype(np.float16)
        arrays[f"{key}/bias"] = (0.3 * rng.standard_normal(shape[-1])).astype(np.float16)
    arrays["classifier/logits/bias"] = np.zeros(21, np.float16)  # not of the backbone
    return arrays


def slow_conv(x, kernel, bias, stride=1, pad=0, depthwise=False):
    """float64 [h, w, c]; one output pixel after the other."""
    size = kernel.shape[0]
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    height, width = ((s - size) // stride + 1 for s in x.shape[:2])
    out = np.empty((height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = x[i * stride : i * stride + size, j * stride : j * stride + size]
            if depthwise:
                out[i, j] = (window * kernel[:, :, 0]).sum(axis=(0, 1)) + bias
            else:
                out[i, j] = np.tensordot(window, kernel, 3) + bias
    return out


def slow_block(x, arrays, number, stride):
    def layer(name):
        key = f"block{number:02d}/{name}"
        return (arrays[f"{key}/{leaf}"].astype(np.float64) for leaf in ("kernel", "bias"))

    inputs = x
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)))  # as the official code: before the expansion
    if number > 1:
        x = np.clip(slow_conv(x, *layer("expand")), 0, 6)
    x = np.clip(slow_conv(x, *layer("depthwise"), stride, depthwise=True), 0, 6)
    x = slow_conv(x, *layer("project"))
    return x + inputs if x.shape == inputs.shape else x


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "mobilenet.npz"
    np.savez(path, **folded_arrays())
    return path


def test_folded_mobilenet_is_that_of_numpy(npz, random):
    checkpoint = initial_checkpoint(MOBILE, str(npz), seed=3)
    assert_rest_is_random(checkpoint, random)
    assert jax.tree.structure(checkpoint.variables) == jax.tree.structure(random)
    assert {leaf.dtype for leaf in jax.tree.leaves(checkpoint.variables)} == {np.dtype("float32")}

    frame = np.random.default_rng(1).integers(0, 256, (33, 49, 3), np.uint8)
    image = prepare(jnp.asarray(frame[None]), (33, 49), checkpoint.image_format)
    expected = frame / 127.5 - 1
    np.testing.assert_allclose(image[0], expected, atol=1e-6)

    # The low-level features are the output of block 3: stem, two strides and a shortcut.
    low_level = jax.jit(lambda variables, image: MobileNetV2().apply(variables, image)[1])
    found = low_level(backbone(checkpoint.variables), image)
    arrays = folded_arrays()
    stem = (arrays[f"block00/stem/{leaf}"].astype(np.float64) for leaf in ("kernel", "bias"))
    expected = np.clip(slow_conv(expected, *stem, stride=2, pad=1), 0, 6)
    for number, stride in ((1, 1), (2, 2), (3, 1)):
        expected = slow_block(expected, arrays, number, stride)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found[0], expected, atol=1e-5)

    # A deep block is where it belongs.
    kernel = checkpoint.variables["params"]["deeplab"]["backbone"]["block16"]["expand_conv"]
    np.testing.assert_array_equal(kernel["kernel"], arrays["block16/expand/kernel"])


def test_depthwise_kernels_in_tensorflows_layout(npz, random):
    expected = initial_checkpoint(MOBILE, str(npz), seed=0)
    arrays = folded_arrays()
    for key, array in arrays.items():
        if key.endswith("depthwise/kernel"):
            arrays[key] = array.swapaxes(2, 3)
    np.savez(npz, **arrays)
    assert_same(initial_checkpoint(MOBILE, str(npz), seed=0).variables, expected.variables)


def without(key):
    return lambda arrays: arrays.pop(key)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("block07/expand/kernel"), "block07/expand/kernel is missing"),
        (without("block17/project/bias"), "block17/project/bias is missing"),
        (
            lambda arrays: arrays.update({"block18/expand/bias": np.zeros(3)}),
            r"unknown arrays \['block18/expand/bias'\]",
        ),
        (
            lambda arrays: arrays.update({"block02/project/kernel": np.zeros((1, 1, 96, 16))}),
            r"block02/project/kernel is \(1, 1, 96, 16\), expected \(1, 1, 96, 24\)",
        ),
        (
            lambda arrays: arrays.update({"block02/depthwise/kernel": np.zeros((5, 5, 1, 96))}),
            r"block02/depthwise/kernel is \(5, 5, 1, 96\), expected \(3, 3, 1, 96\)",
        ),
        (
            lambda arrays: arrays.update({"block02/project/bias": np.zeros(16)}),
            r"block02/project/bias is \(16,\), expected \(24,\)",
        ),
    ],
)
def test_another_mobilenet(tmp_path, change, message):
    arrays = folded_arrays()
    change(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz: {message}"):
        initial_checkpoint(MOBILE, str(tmp_path / "x.npz"), seed=0)


def test_what_is_no_number(tmp_path):
    arrays = folded_arrays()
    arrays["block03/project/bias"][1] = np.nan
    np.savez(tmp_path / "x.npz", **arrays)
    name = "frozen/deeplab/backbone/block3/project_bn/bias"
    with pytest.raises(ValueError, match=rf"x\.npz: 1 arrays hold NaN .*{name} \(1 of 24\)"):
        initial_checkpoint(MOBILE, str(tmp_path / "x.npz"), seed=0)


def test_another_backbone(npz):
    with pytest.raises(ValueError, match=r"mobilenet\.npz: a MobileNetV2; the model's .*resnet101"):
        initial_checkpoint(CFBI(**SMALL), str(npz), seed=0)


@pytest.mark.parametrize(
    "damage", ["garbage", "cut short", "flipped", "compressed", "one array", "no header"]
)
def test_damaged_file(npz, damage):
    if damage == "compressed":
        np.savez_compressed(npz, **folded_arrays())
    data = bytearray(npz.read_bytes())
    if damage == "compressed":
        names = struct.unpack_from("<HH", data, 26)  # lengths in the first file's header
        data[30 + sum(names)] |= 6  # a kind of block that does not exist
    if damage == "flipped":
        data[len(data) // 2] ^= 255  # caught by the archive's checksums
    npz.write_bytes({"garbage": b"no archive", "cut short": data[:-1000]}.get(damage, data))
    if damage == "one array":
        with npz.open("wb") as file:
            np.save(file, np.ones(3))
    if damage == "no header":
        with zipfile.ZipFile(npz, "w") as archive:
            archive.writestr("block00/stem/kernel.npy", b"no array")
    with pytest.raises(ValueError, match=r"mobilenet\.npz: damaged or no \.npz file"):
        initial_checkpoint(MOBILE, str(npz), seed=0)
