"""A network of the same classes with small widths, random weights, and videos for it."""

from functools import cache

import jax
import numpy as np

from cfbi_jax.models.cfbi import CFBI, parameter_shapes

SMALL = dict(
    resnet_blocks=(1, 1, 1, 1),
    resnet_width=8,
    decoder_dim=32,
    embedding_dim=16,
    matching_dim=16,
    ensembler_dim=32,
    windows=(3, 1, 2),
)


def random_variables(model: CFBI, seed: int) -> dict:
    """Values under which every parameter matters; unlike an initialisation, nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return z * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        if name in ("scale", "alpha"):
            return 1 + np.float32(0.1) * z
        if name == "var":
            return 1 + np.float32(0.1) * np.abs(z)
        return np.float32(0.1) * z

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(model))


@cache
def small_network() -> tuple[CFBI, dict]:
    """(model, variables). Do not write into the variables."""
    model = CFBI(**SMALL)
    return model, random_variables(model, seed=0)


def random_video(num_frames: int, size=(40, 56), seed: int = 0) -> np.ndarray:
    """uint8 [t, h, w, 3] of coloured blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_frames, size[0] // 8, size[1] // 8, 3)).astype(np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


class GivenVideo:
    """A training video of given frames and labels."""

    def __init__(self, name: str, frames: np.ndarray, labels: np.ndarray):
        self.name, self.frames, self.labels = name, frames, labels

    def __len__(self):
        return len(self.labels)

    def frame(self, t):
        return self.frames[t]

    def mask(self, t):
        return self.labels[t]


def mask_of(boxes: dict[int, tuple[int, int, int, int]], size=(40, 56)) -> np.ndarray:
    """uint8 [h, w] with each id in its box (top, left, bottom, right)."""
    mask = np.zeros(size, np.uint8)
    for object_id, (top, left, bottom, right) in boxes.items():
        mask[top:bottom, left:right] = object_id
    return mask
