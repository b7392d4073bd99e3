"""Layers that the backbones and the ensembler share.

Images and features are channels-last, `[batch, height, width, channels]`. Parameters live in the
`params` collection; the constants of frozen batch norm live in `frozen`, which no optimiser sees.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cfbi_jax.models.convolutions import conv2d, everywhere
from cfbi_jax.models.resizing import resized_conv2d

NORM_EPSILON = 1e-5


class Conv(nn.Module):
    """Convolution of `scale * x` with PyTorch's geometry; `padding=None` keeps the size at stride
    1."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int | None = None
    depthwise: bool = False
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], scale: Float[Array, "b 1 1 c"] | None = None
    ) -> Float[Array, "b oh ow features"]:
        size = self.kernel_size
        in_features = 1 if self.depthwise else x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.he_normal(), (size, size, in_features, self.features)
        )
        padding = self.dilation * (size - 1) // 2 if self.padding is None else self.padding
        y = conv2d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            dilation=self.dilation,
            padding=padding,
            depthwise=self.depthwise,
            scale=scale,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + everywhere(bias, y)
        return y


class ResizedConv(nn.Module):
    """3x3 convolution of the concatenation of `x`, resized to the size of `skip`, and `skip`."""

    features: int
    method: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], skip: Float[Array, "b oh ow d"]
    ) -> Float[Array, "b oh ow features"]:
        channels = x.shape[-1]
        shape = (3, 3, channels + skip.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype)
        x, skip = x.astype(self.dtype), skip.astype(self.dtype)
        y = resized_conv2d(x, kernel[:, :, :channels], skip.shape[1:3], self.method)
        return y + conv2d(skip, kernel[:, :, channels:], padding=1)


class SplitConv(nn.Module):
    """1x1 convolution of `parts` side by side, times `scale`, without joining them in memory."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, parts: Sequence[Float[Array, "n h w _"]], scale: Float[Array, "n 1 1 c"]
    ) -> Float[Array, "n h w features"]:
        shape = (1, 1, scale.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype)
        y, start = 0, 0
        for x in parts:
            mine = slice(start, start + x.shape[-1])
            y += conv2d(x.astype(self.dtype), kernel[:, :, mine], scale=scale[..., mine])
            start = mine.stop
        return y


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics, scale and bias are all constants (collection `frozen`)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        scale = self.variable("frozen", "scale", jnp.ones, shape).value
        bias = self.variable("frozen", "bias", jnp.zeros, shape).value
        mean = self.variable("frozen", "mean", jnp.zeros, shape).value
        var = self.variable("frozen", "var", jnp.ones, shape).value
        factor = scale / jnp.sqrt(var + NORM_EPSILON)
        offset = bias - mean * factor
        x = x.astype(self.dtype)
        return x * everywhere(factor, x) + everywhere(offset, x)


class GroupNorm(nn.Module):
    """Group norm as trained: epsilon 1e-5, statistics in float32, the variance about the mean.

    Sums are taken per channel first and then over a group's channels: with two channels in a group
    XLA's CPU backend sums over both at once three times slower.
    """

    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x = x.astype(jnp.float32)

        def group_mean(x):  # [n, h, w, c] -> [n, 1, 1, c]
            means = jnp.mean(x, axis=(1, 2)).reshape(batch, self.groups, -1).mean(axis=-1)
            return jnp.repeat(means, channels // self.groups, axis=-1)[:, None, None]

        mean = group_mean(x)
        variance = group_mean(jnp.square(x - mean))
        factor = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
        return (x * factor + (bias - mean * factor)).astype(self.dtype)


def dropout(
    x: Float[Array, "n h w c"], rate: float, keys: Key[Array, " n"]
) -> Float[Array, "n h w c"]:
    """Drops elements at `rate`; image i draws with `keys[i]`, whatever else is in the batch."""

    def kept(key):
        return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(kept)(keys), x / (1 - rate), 0)


def groups_of(channels: int, limit: int = 32) -> int:
    """Number of groups for `channels`: `limit` where it divides, as in every published width."""
    return math.gcd(limit, channels)


def channel_energy(x: Float[Array, "n h w c"]) -> Float[Array, "n 1 1 c"]:
    """Sum of squares per channel, in float32: it leaves the range of float16."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True)


class GatedChannelTransform(nn.Module):
    """GCT (Yang et al., CVPR 2020): a gate per channel, from the `channel_energy` of all.

    The gate is for `scale` of the next `Conv`, which multiplies by it for less than a product with
    the features costs.
    """

    @nn.compact
    def __call__(self, energy: Float[Array, "n 1 1 c"]) -> Float[Array, "n 1 1 c"]:
        shape = (energy.shape[-1],)
        alpha = self.param("alpha", nn.initializers.ones_init(), shape)
        gamma = self.param("gamma", nn.initializers.zeros_init(), shape)
        beta = self.param("beta", nn.initializers.zeros_init(), shape)
        embedding = alpha * jnp.sqrt(energy + NORM_EPSILON)
        mean = jnp.mean(jnp.square(embedding), axis=-1, keepdims=True)
        return 1 + jnp.tanh(gamma * embedding / jnp.sqrt(mean + NORM_EPSILON) + beta)


def computed_once(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """The output of a residual block, kept from being computed again in everything that reads it.

    Without the barrier XLA's CPU backend fuses the sums of all blocks before into every one: block
    22 would read 22 branches. It takes `compilation.compiler_options` for barriers to last there.
    """
    return jax.lax.optimization_barrier(x)
