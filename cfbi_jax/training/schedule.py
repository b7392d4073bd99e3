"""The optimiser: clipping, SGD with momentum (paper section 4; Nesterov's, coupled weight decay) or
Adam, and the rate's warm-up and decay. What the paper does not say is as in trainers of the
authors' family."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

POWER = 0.9
OPTIMIZERS = ("sgd", "adam")
ADAM_B2 = 0.99  # of squares; the usual 0.999 remembers longer than short trainings last


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
    rate: Callable,
    weight_decay: float,
    momentum: float,
    max_gradient_norm: float,
    freeze_backbone: bool = False,
    name: str = "sgd",
) -> optax.GradientTransformation:
    """Clips the summed gradient; then either

    "sgd": adds `weight_decay * parameter` to it, then momentum (the paper's), or
    "adam": Adam with `momentum` as its b1, and decoupled weight decay (AdamW).

    `freeze_backbone`: its weights, whose gradient is 0 then, do not decay either.
    """

    def of_head(params):
        def of_array(path, _):
            return "backbone" not in [key.key for key in path]

        return jax.tree_util.tree_map_with_path(of_array, params)

    mask = of_head if freeze_backbone else None
    clip = optax.clip_by_global_norm(max_gradient_norm)
    if name == "adam":
        adam = optax.adamw(rate, b1=momentum, b2=ADAM_B2, weight_decay=weight_decay, mask=mask)
        return optax.chain(clip, adam)
    return optax.chain(
        clip,
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.sgd(rate, momentum=momentum, nesterov=True),
    )
