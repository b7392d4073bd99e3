"""The bootstrapped cross-entropy of CFBI's training (paper section 4, "Training Details").

That it moves to the hardest pixels little by little, and how ignored pixels count, is how the
released loss has it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8

IGNORED = 255
HARDEST_SHARE = 0.15


def mining_ratio(step: Num[Array, ""] | int, mining_step: float | int) -> Float[Array, ""]:
    """How far the loss has moved from all pixels (0) to the hardest 15 % alone (1).

    Linear until `mining_step`, half of all steps as released; 0 mines from the start.
    """
    if not mining_step:
        return jnp.float32(1)
    return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / mining_step)


def bootstrapped_cross_entropy(
    logits: Float[Array, "b rows h w"], label: UInt8[Array, "b h w"], ratio: Float[Array, ""]
) -> Float[Array, " b"]:
    """Mean cross-entropy of each sample's hardest `ratio * 0.15 + (1 - ratio)` of all pixels.

    Padding rows hold -inf (`models.cfbi.mask_padding`). Pixels labelled 255 count as loss 0 and
    take part in the ranking, as in the released loss.
    """
    pixels = label.shape[1] * label.shape[2]
    log_probability = jax.nn.log_softmax(logits, axis=1)
    row = jnp.where(label == IGNORED, 0, label).astype(jnp.int32)
    loss = -jnp.take_along_axis(log_probability, row[:, None], axis=1)[:, 0]
    loss = jnp.where(label == IGNORED, 0, loss).reshape(-1, pixels)
    count = jnp.floor((ratio * HARDEST_SHARE + (1 - ratio)) * pixels)
    hardest_first = -jnp.sort(-loss, axis=1)
    return jnp.sum(jnp.where(jnp.arange(pixels) < count, hardest_first, 0), axis=1) / count
