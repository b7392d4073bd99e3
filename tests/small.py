"""A network of the same classes with small widths, random weights, and videos for it."""

from functools import cache

import jax.numpy as jnp
import numpy as np

from cfbi_jax.models.cfbi import CFBI, initial_variables

SMALL = dict(
    resnet_blocks=(1, 1, 1, 1),
    resnet_width=8,
    decoder_dim=32,
    embedding_dim=16,
    matching_dim=16,
    ensembler_dim=32,
    windows=(3, 1, 2),
)


@cache
def small_network() -> tuple[CFBI, dict]:
    """(model, variables). Do not write into the variables."""
    model = CFBI(**SMALL)
    variables = initial_variables(model, seed=0)
    # Zero in a fresh network: make every path count.
    variables["params"]["background_bias"] = jnp.float32(-1.0)
    variables["params"]["foreground_bias"] = jnp.float32(0.5)
    return model, variables


def random_video(num_frames: int, size=(40, 56), seed: int = 0) -> np.ndarray:
    """uint8 [t, h, w, 3] of coloured blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_frames, size[0] // 8, size[1] // 8, 3)).astype(np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def mask_of(boxes: dict[int, tuple[int, int, int, int]], size=(40, 56)) -> np.ndarray:
    """uint8 [h, w] with each id in its box (top, left, bottom, right)."""
    mask = np.zeros(size, np.uint8)
    for object_id, (top, left, bottom, right) in boxes.items():
        mask[top:bottom, left:right] = object_id
    return mask
