"""Networks with random weights, and random videos for them."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from cfbi_jax.inference.options import MAX_OBJECTS
from cfbi_jax.models.cfbi import CFBI, build_model, parameter_shapes

MODELS = ("r101", "mbv2", "quickstart")
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
BLOCK = 8  # pixels; a picture of noise would be the slowest JPEG there is


def make_model(name: str, dtype: str, matching_dtype: str) -> CFBI:
    """r101 and mbv2: the published networks; quickstart: that of configs/quickstart.py."""
    if name == "quickstart":
        config = runpy.run_path(str(QUICKSTART))["get_config"]()
        model = build_model(config.model.to_dict())
    else:
        model = CFBI(backbone={"r101": "resnet101", "mbv2": "mobilenet_v2"}[name])
    return model.clone(
        compute_dtype=jnp.dtype(dtype).type, matching_dtype=jnp.dtype(matching_dtype).type
    )


def random_variables(model: CFBI, seed: int = 0) -> dict:
    """Weights that keep activations in range; drawn with NumPy, so that nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return z * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        if name in ("scale", "alpha"):
            # Frozen statistics do not normalise: residual sums would double from block to block.
            middle = 0.7 if path[0].key == "frozen" else 1.0
            return np.float32(middle) + np.float32(0.1) * z
        if name == "var":
            return 1 + np.float32(0.1) * np.abs(z)
        return np.float32(0.1) * z

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(model))


def random_frames(
    count: int, size: tuple[int, int], seed: int = 0
) -> UInt8[np.ndarray, "count height width 3"]:
    """RGB frames of coloured blocks."""
    rng = np.random.default_rng(seed)
    height, width = size
    shape = (count, -(-height // BLOCK), -(-width // BLOCK), 3)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    frames = blocks.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)
    return np.ascontiguousarray(frames[:, :height, :width])


def block_label(size: tuple[int, int], objects: int) -> UInt8[np.ndarray, "height width"]:
    """Objects 1..`objects` side by side, background around each. Errors: ValueError if there is
    no room, or if they are more than labels can name."""
    height, width = size
    if objects > MAX_OBJECTS:
        raise ValueError(f"{objects} objects; expected at most {MAX_OBJECTS}, as ids go")
    if width < 2 * objects + 1 or height < 3:
        raise ValueError(
            f"{objects} objects in {height} x {width} pixels; expected room for all: "
            f"3 x {2 * objects + 1} pixels or more"
        )
    borders = np.linspace(0, width, 2 * objects + 2).astype(int)
    label = np.zeros(size, np.uint8)
    for i in range(1, objects + 1):
        label[height // 4 : -(-3 * height // 4), borders[2 * i - 1] : borders[2 * i]] = i
    return label


def embedding_size(network_size: tuple[int, int]) -> tuple[int, int]:
    """Size at stride 4."""
    return tuple(-(-side // 4) for side in network_size)
