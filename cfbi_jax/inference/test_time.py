"""Test-time augmentation: the views (scale, mirror image) of a frame, and their average."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cfbi_jax.models import images
from cfbi_jax.models.cfbi import mask_padding
from cfbi_jax.models.resizing import interpolation_matrix


@dataclasses.dataclass(frozen=True)
class View:
    """How one copy of the network sees the video: `size` is (height, width) of its input."""

    size: tuple[int, int]
    mirrored: bool


def views_of(
    size: tuple[int, int], scales: tuple[float, ...], flip: bool, max_long_edge: int | None
) -> tuple[View, ...]:
    """The views of a video of `size`, each scale straight and, with `flip`, mirrored.

    `max_long_edge=None` is the released rule: 1040 pixels for a single scale, 800 for several.
    """
    if max_long_edge is None:
        single = len(scales) == 1
        max_long_edge = (
            images.MAX_LONG_EDGE_SINGLE_SCALE if single else images.MAX_LONG_EDGE_MULTI_SCALE
        )
    return tuple(
        View(images.network_size(size, scale, max_long_edge), mirrored)
        for scale in scales
        for mirrored in ((False, True) if flip else (False,))
    )


def mirror(x: Array, mirrored: bool) -> Array:
    """`x` with its last axis (of widths) reversed if `mirrored`."""
    return x[..., ::-1] if mirrored else x


def view_frame(
    frame: UInt8[Array, "height width 3"], view: View, image_format: images.ImageFormat
) -> Float[Array, "1 h w 3"]:
    """The network's input of `view`. Mirrored after the resize, as the released code does."""
    prepared = images.prepare(frame[None], view.size, image_format)
    return prepared[:, :, ::-1] if view.mirrored else prepared


def mean_probabilities(
    logits: Sequence[Float[Array, "rows _ _"]],
    views: Sequence[View],
    size: tuple[int, int],
    num_objects: Int[Array, ""],
) -> Float[Array, "rows height width"]:
    """The views' logits -> mean probabilities at the video's own size, 0 for padding rows."""
    lines = [interpolation_matrix(x.shape[1], size[0], "bilinear", True) for x in logits]
    return _probabilities(logits, lines, views, size[1], num_objects)


def most_likely_rows(
    logits: Sequence[Float[Array, "rows _ _"]],
    views: Sequence[View],
    size: tuple[int, int],
    num_objects: Int[Array, ""],
    lines_at_once: int,
) -> UInt8[Array, "height width"]:
    """The row of the largest mean probability, for a few lines of pixels at a time: memory for
    those alone, however large the video."""
    height = size[0]
    missing = -height % lines_at_once
    lines = tuple(
        np.pad(
            interpolation_matrix(x.shape[1], height, "bilinear", True), ((0, missing), (0, 0))
        ).reshape(-1, lines_at_once, x.shape[1])
        for x in logits
    )

    def some_lines(lines):
        probabilities = _probabilities(logits, lines, views, size[1], num_objects)
        return jnp.argmax(probabilities, axis=0).astype(jnp.uint8)

    return jax.lax.map(some_lines, lines).reshape(-1, size[1])[:height]


def _probabilities(logits, lines, views, width, num_objects):
    """`lines`: per view, the interpolation matrix of the output's lines `[lines, h]`."""
    total = 0
    with jax.default_matmul_precision("highest"):
        for x, matrix, view in zip(logits, lines, views, strict=True):
            columns = interpolation_matrix(x.shape[2], width, "bilinear", True)
            full = jnp.einsum("lh,rhw->rlw", matrix, x)
            full = jnp.einsum("pw,rlw->rlp", columns, full)
            masked = mask_padding(full[None], num_objects[None])[0]
            total += mirror(jax.nn.softmax(masked, axis=0), view.mirrored)
    return total / len(views)
