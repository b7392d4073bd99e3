"""From RGB frames to what the network reads: size, channel order and normalisation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cfbi_jax.models.resizing import resize

STRIDE = 16
# Longest edge, in pixels, of the released test settings.
MAX_LONG_EDGE_SINGLE_SCALE = 1040
MAX_LONG_EDGE_MULTI_SCALE = 800


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """What a checkpoint's weights were trained on; part of every checkpoint.

    channel_order: "rgb" or "bgr". mean, std: per channel *in that order*, of values in 0..1.
    """

    channel_order: str = "rgb"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f'channel_order is "{self.channel_order}"; expected "rgb" or "bgr"')


# The authors read images as BGR and gave blue the mean that ImageNet's red has.
OFFICIAL_FORMAT = ImageFormat(channel_order="bgr")
IMAGENET_FORMAT = ImageFormat(channel_order="rgb")


def network_size(
    size: tuple[int, int], scale: float = 1.0, max_long_edge: int = MAX_LONG_EDGE_SINGLE_SCALE
) -> tuple[int, int]:
    """(height, width) at which a video of `size` enters the network at test time.

    The long edge is limited first, then the scale applies, then every side becomes the nearest
    `16 k + 1` (half to even, as numpy rounds).
    """
    long_edge = max(size)
    limit = max_long_edge / long_edge if long_edge > max_long_edge else 1.0
    # In this order: a factor of limit * scale rounds differently, and int() then cuts a pixel off.
    sides = (int(side * limit * scale) for side in size)
    return tuple(
        side if side % STRIDE == 1 else int(np.round((side - 1) / STRIDE)) * STRIDE + 1
        for side in sides
    )


def prepare(
    frames: UInt8[Array, "b height width 3"], size: tuple[int, int], image_format: ImageFormat
) -> Float[Array, "b h w 3"]:
    """RGB frames -> normalised network input of `size`.

    Bicubic on 0..255 with pixel centres, repeated borders and no clipping (OpenCV's INTER_CUBIC).
    """
    images = frames.astype(jnp.float32)
    if image_format.channel_order == "bgr":
        images = images[..., ::-1]
    images = resize(images, size, "bicubic", align_corners=False)
    mean = jnp.asarray(image_format.mean, jnp.float32)
    std = jnp.asarray(image_format.std, jnp.float32)
    return (images / 255 - mean) / std
