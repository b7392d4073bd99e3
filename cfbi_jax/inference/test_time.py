"""Test-time augmentation: the views (scale, mirror image) of a frame, and their average."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from cfbi_jax.models import images
from cfbi_jax.models.cfbi import mask_padding
from cfbi_jax.models.layers import resize


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


def view_probabilities(
    logits: Float[Array, "1 rows h w"],
    view: View,
    size: tuple[int, int],
    num_objects: Int[Array, ""],
) -> Float[Array, "rows height width"]:
    """A view's logits -> probabilities at the video's own size, not mirrored, 0 for padding."""
    full = resize(jnp.moveaxis(logits, 1, 0)[:, 0, ..., None], size)[..., 0]
    masked = mask_padding(full[None], num_objects[None])[0]
    return mirror(jax.nn.softmax(masked, axis=0), view.mirrored)
