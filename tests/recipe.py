"""Pseudo-random weights that anybody can regenerate, and the golden arrays made with them.

The golden arrays in `tests/data` were computed with the authors' released PyTorch code, in float32,
and these weights. `manifest_<model>.json` lists `[key, shape, dtype]` of an official state dict,
`checksums_<model>.json` the crc32 of every tensor of the recipe.
"""

import json
import math
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"

_EMBEDDING_ALIASES = {"0": "seperate_conv", "1": "bn1", "3": "embedding_conv", "4": "bn2"}
_MOBILENET_ALIASES = (
    "low_level_features|high_level_features|feautre_8x|feature_16x|feature_32x"  # sic
)
_BACKBONE = r"^feature_extracter\.backbone\."
# Gains that keep activations in a useful range; all others are 1.
_NORM_GAINS = [
    (_BACKBONE + r"layer\d+\.\d+\.bn3\.weight$", 0.25),
    (_BACKBONE + r"features\.(1\.conv\.4|\d+\.conv\.7)\.weight$", 0.7),
    (r"^bn2\.weight$", 0.3),
]
_MATRIX_GAINS = [
    (_BACKBONE + r"features\.0\.0\.weight$", 3.0),
    (r"^dynamic_seghead\.IA_final_bg\.weight$", 0.25),
]


def canonical_key(key: str) -> str:
    """The one name of a tensor that a state dict holds under several."""
    key = key.removeprefix("module.")
    key = re.sub(
        r"^semantic_embedding\.([0134])\.", lambda m: _EMBEDDING_ALIASES[m.group(1)] + ".", key
    )
    return re.sub(f"({_BACKBONE})({_MOBILENET_ALIASES})\\.", r"\1features.", key)


def _gain(gains, key):
    return next((gain for pattern, gain in gains if re.search(pattern, key)), 1.0)


def recipe_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32; depends on the canonical key and the shape alone."""
    key = canonical_key(key)
    kind = key.rsplit(".", 1)[-1]
    random = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    z = random.standard_normal(shape).astype(np.float32)
    if kind == "weight" and len(shape) > 1:
        fan_in = math.prod(shape[1:])
        return z * np.float32(_gain(_MATRIX_GAINS, key) * math.sqrt(2 / fan_in))
    if kind == "weight":
        return np.float32(_gain(_NORM_GAINS, key)) * (np.float32(1) + np.float32(0.1) * z)
    if kind == "running_var":
        return np.float32(1) + np.float32(0.1) * np.abs(z)
    if kind == "alpha":
        return np.float32(1) + np.float32(0.1) * z
    scale = {"bias": 0.1, "running_mean": 0.1, "beta": 0.1, "gamma": 0.5}
    scale |= {"bg_bias": 0.3, "fg_bias": 0.3}
    return np.float32(scale[kind]) * z


@cache
def recipe_state_dict(model: str) -> dict[str, np.ndarray]:
    """A full official state dict, `model` "r101_cfbi" or "mbv2_cfbi". Do not write into it."""
    manifest = json.loads((DATA / f"manifest_{model}.json").read_text())
    tensors = {}
    state = {}
    for key, shape, _ in manifest:
        name = canonical_key(key)
        if name not in tensors:
            tensors[name] = recipe_tensor(name, tuple(shape))
        state[key] = tensors[name]
    return state


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of `tests/data/<name>.npz`."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)
