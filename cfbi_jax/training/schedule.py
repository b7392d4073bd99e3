"""The optimiser: SGD with Nesterov momentum, coupled weight decay, clipping, warm-up and decay."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

POWER = 0.9


def learning_rate(
    base: float, num_train_steps: int, warmup_steps: int, minimum: float
) -> Callable[[Num[Array, ""] | int], Float[Array, ""]]:
    """Step (counted from 0) -> rate: linear from 0 to `base`, then polynomial, never below
    `minimum`."""

    def at(step):
        step = jnp.asarray(step, jnp.float32)
        rising = base * step / max(warmup_steps, 1)
        done = (step - warmup_steps) / (num_train_steps - warmup_steps + 1)
        falling = base * jnp.maximum(1 - done, 0) ** POWER
        return jnp.maximum(jnp.where(step < warmup_steps, rising, falling), minimum)

    return at


def optimizer(
    rate: Callable, weight_decay: float, momentum: float, max_gradient_norm: float
) -> optax.GradientTransformation:
    """Clips the summed gradient, then adds `weight_decay * parameter` to it, then momentum."""
    return optax.chain(
        optax.clip_by_global_norm(max_gradient_norm),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(rate, momentum=momentum, nesterov=True),
    )
