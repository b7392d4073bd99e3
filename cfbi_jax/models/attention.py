"""Collaborative instance-level attention (paper section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

# PyTorch's default for linear layers, which the authors left as it is.
DENSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def masked_means(
    embedding: Float[Array, "b r h w c"],
    label: UInt8[Array, "b r h w"],
    frame_valid: Float[Array, "b r"],
    num_rows: int,
) -> tuple[Float[Array, "b rows c"], Float[Array, "b rows c"]]:
    """Mean embedding over each row's pixels, and over all other pixels, of the valid frames.

    Sums and counts of several frames are added before the division; `sum / (count + 1e-5)`, so a
    row without pixels gets zeros.
    """
    embedding = embedding.astype(jnp.float32)
    rows = jnp.arange(num_rows, dtype=label.dtype)
    inside = (label[..., None] == rows).astype(jnp.float32) * frame_valid[:, :, None, None, None]
    outside = frame_valid[:, :, None, None, None] - inside

    def mean(mask):
        total = jnp.einsum("brhwo,brhwc->boc", mask, embedding)
        return total / (jnp.sum(mask, axis=(1, 2, 3))[..., None] + 1e-5)

    return mean(inside), mean(outside)


def instance_vector(
    reference: Float[Array, "b r h w c"],
    reference_label: UInt8[Array, "b r h w"],
    reference_valid: Float[Array, "b r"],
    previous: Float[Array, "b h w c"],
    previous_label: UInt8[Array, "b h w"],
    num_rows: int,
    background: bool = True,
) -> Float[Array, "b rows d"]:
    """Guidance vector per row: mean embeddings of (reference object, reference rest, previous
    object, previous rest); `background=False` leaves the two rests out (paper Table 4, I)."""
    always = jnp.ones((previous.shape[0], 1), jnp.float32)
    means = [
        *masked_means(reference, reference_label, reference_valid, num_rows),
        *masked_means(previous[:, None], previous_label[:, None], always, num_rows),
    ]
    if not background:
        means = means[::2]
    return jnp.concatenate(means, axis=-1)


class Gate(nn.Module):
    """Channel gate `1 + tanh(W v + c)` from the instance vector v (paper Fig. 4)."""

    features: int

    @nn.compact
    def __call__(self, vector: Float[Array, "n d"]) -> Float[Array, "n 1 1 features"]:
        gate = nn.Dense(self.features, kernel_init=DENSE_INIT, name="linear")(vector)
        return (1 + jnp.tanh(gate))[:, None, None, :]


class DynamicLogit(nn.Module):
    """A logit per pixel whose 1x1 kernel and bias are linear in the instance vector (as released;
    the paper does not mention it)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], vector: Float[Array, "n d"]
    ) -> Float[Array, "n h w"]:
        weights = nn.Dense(x.shape[-1] + 1, kernel_init=DENSE_INIT, name="linear")(vector)
        logit = jnp.einsum("nhwc,nc->nhw", x.astype(jnp.float32), weights[:, :-1])
        return logit + weights[:, -1, None, None]


class StaticLogit(nn.Module):
    """The same with a kernel of its own, for the network without instance attention."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w"]:
        return nn.Dense(1, kernel_init=DENSE_INIT, name="linear")(x.astype(jnp.float32))[..., 0]
