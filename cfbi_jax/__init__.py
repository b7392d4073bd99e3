"""CFBI video object segmentation (Yang et al., ECCV 2020) in JAX and Flax.

segmenter = cfbi_jax.VideoSegmenter.from_checkpoint("CKPT_DIR")
for label in segmenter.segment(frames, {0: first_mask}):
    ...
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cfbi_jax.inference.segmenter import VideoSegmenter
    from cfbi_jax.models.cfbi import build_model
    from cfbi_jax.weights.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["VideoSegmenter", "build_model", "load_checkpoint", "save_checkpoint"]

_HOMES = {
    "VideoSegmenter": "cfbi_jax.inference.segmenter",
    "build_model": "cfbi_jax.models.cfbi",
    "load_checkpoint": "cfbi_jax.weights.checkpoint",
    "save_checkpoint": "cfbi_jax.weights.checkpoint",
}


def __getattr__(name: str):
    # Imported on first use: scoring a folder of PNGs, say, needs no JAX.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
