"""The network before its first step: random, from a checkpoint, or on top of a backbone file."""

import logging
import zlib
from pathlib import Path
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from cfbi_jax.models.cfbi import CFBI, initial_variables, model_config, parameter_shapes
from cfbi_jax.models.images import IMAGENET_FORMAT, OFFICIAL_FORMAT, ImageFormat
from cfbi_jax.models.layers import NORM_EPSILON
from cfbi_jax.weights.checkpoint import Checkpoint, check_finite, check_shapes, load_checkpoint
from cfbi_jax.weights.official import convert_backbone, convert_state_dict, strip_module

LOGGER = logging.getLogger(__name__)

# What NumPy and we meet in what is no .npz, among them a lone array, and a member without a header,
# which comes as bytes.
_NO_ARRAYS = (ValueError, OSError, EOFError, BadZipFile, zlib.error, TypeError, AttributeError)

# TensorFlow's: RGB in -1..1.
TENSORFLOW_FORMAT = ImageFormat("rgb", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def initial_checkpoint(model: CFBI, init_from: str, seed: int) -> Checkpoint:
    """What training starts from.

    `init_from` may be "": random weights; a checkpoint folder of this project; a `.pth` file of an
    official CFBI, of DeepLabv3+ or of torchvision's ResNet-101 or MobileNetV2; an `.npz` file of a
    MobileNetV2 whose batch norms are folded into its convolutions. What a file does not cover is
    random. The image format is the one that the weights were made with.

    Raises FileNotFoundError, or ValueError for weights of another architecture, or that hold NaN or
    infinity.
    """
    if not init_from:
        return Checkpoint(model, initial_variables(model, seed), IMAGENET_FORMAT)
    path = Path(init_from)
    if path.is_dir():
        checkpoint = load_checkpoint(path)
        different = _differences(checkpoint.model, model)
        try:
            check_shapes(checkpoint.variables, model, path)
        except ValueError as error:
            raise ValueError(f"{path}: weights of another network: {different}") from error
        if different:
            LOGGER.warning("%s was trained with other settings: %s", path, different)
        return Checkpoint(model, checkpoint.variables, checkpoint.image_format)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder to start from (config.init_from)")
    if path.suffix == ".npz":
        part, image_format = _folded_mobilenet(path, model), TENSORFLOW_FORMAT
    else:
        from cfbi_jax.weights.pth import read_pth  # needs torch

        state = read_pth(path)
        try:
            state = strip_module(state)
            if any(key.startswith("dynamic_seghead.") for key in state):
                _, part = convert_state_dict(state)
                check_shapes(part, model, path)
                image_format = OFFICIAL_FORMAT
            else:
                part, image_format = convert_backbone(state, model), IMAGENET_FORMAT
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    check_finite(part, path)
    variables = initial_variables(model, seed)
    covered = len(jax.tree.leaves(part))
    LOGGER.info(
        "%s: %d of %d arrays; the rest is random", path, covered, len(jax.tree.leaves(variables))
    )
    return Checkpoint(model, _merged(variables, part), image_format)


def _differences(stored: CFBI, model: CFBI) -> str:
    before, now = model_config(stored), model_config(model)
    different = (k for k in now if now[k] != before[k])
    return ", ".join(f"{k} is {before[k]} there, config.model.{k} {now[k]}" for k in different)


def _merged(tree: dict, part: dict) -> dict:
    """`tree` with the arrays of `part` in their places."""
    merged = dict(tree)
    for key, value in part.items():
        merged[key] = _merged(tree[key], value) if isinstance(value, dict) else jnp.asarray(value)
    return merged


def _folded_mobilenet(path: Path, model: CFBI) -> dict:
    """Variables of the backbone from `blockNN/{stem,expand,depthwise,project}/{kernel,bias}`.

    A folded norm becomes a frozen one that adds the bias alone. Arrays of anything but these blocks
    (a classifier, a pyramid) are left out.
    """
    if model.backbone != "mobilenet_v2":
        raise ValueError(f"{path}: a MobileNetV2; the model's backbone is {model.backbone}")
    try:
        with np.load(path) as file:
            arrays = {k: file[k].astype(np.float32) for k in file if k.startswith("block")}
    except _NO_ARRAYS as error:
        raise ValueError(f"{path}: damaged or no .npz file ({error})") from error
    shapes = _backbone_shapes(model)
    params, frozen, used = {}, {}, set()
    for path_of, shape in shapes.items():
        block, layer = path_of
        number = 0 if block == "stem" else int(block.removeprefix("block"))
        key = f"block{number:02d}/{layer}"
        for name in (f"{key}/kernel", f"{key}/bias"):
            if name not in arrays:
                raise ValueError(f"{path}: {name} is missing; expected a whole MobileNetV2")
        kernel, bias = arrays[f"{key}/kernel"], arrays[f"{key}/bias"]
        if layer == "depthwise" and kernel.shape == (*shape[:2], shape[3], 1):
            kernel = kernel.reshape(shape)  # TensorFlow's layout
        for name, array, expected in (("kernel", kernel, shape), ("bias", bias, shape[-1:])):
            if array.shape != expected:
                raise ValueError(f"{path}: {key}/{name} is {array.shape}, expected {expected}")
        used |= {f"{key}/kernel", f"{key}/bias"}
        conv, norm = f"{layer}_conv", f"{layer}_bn"
        constants = {
            "scale": np.ones_like(bias),
            "bias": bias,
            "mean": np.zeros_like(bias),
            "var": np.full_like(bias, 1 - NORM_EPSILON),
        }
        if block == "stem":
            params[conv], frozen[norm] = {"kernel": kernel}, constants
        else:
            params.setdefault(block, {})[conv] = {"kernel": kernel}
            frozen.setdefault(block, {})[norm] = constants
    extra = sorted(set(arrays) - used)
    if extra:
        raise ValueError(f"{path}: unknown arrays {extra[:5]}; expected blocks 00 to 17")
    return {
        "params": {"deeplab": {"backbone": params}},
        "frozen": {"deeplab": {"backbone": frozen}},
    }


def _backbone_shapes(model: CFBI) -> dict[tuple[str, str], tuple[int, ...]]:
    """(block, layer) -> kernel shape of every convolution of the MobileNetV2."""
    backbone = parameter_shapes(model)["params"]["deeplab"]["backbone"]
    shapes = {}
    for block, content in backbone.items():
        if block == "stem_conv":
            shapes["stem", "stem"] = content["kernel"].shape
            continue
        for conv, leaf in content.items():
            shapes[block, conv.removesuffix("_conv")] = leaf["kernel"].shape
    return shapes
