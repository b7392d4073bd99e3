"""Collaborative ensembler (paper section 3.3), and FEELVOS' head that it replaces in Table 5.

Both work on one row of one video at a time, `[n, h, w, c]` with n = batch * rows, and return a
foreground and a background logit per pixel. `vector` is the row's instance vector, or None for the
network without instance-level attention.

    stride 4   364 -> layer1, 2 -------------------- concat(low-level) -> skip 64 --+
    stride 8              layer3, 4, 5                                              |
    stride 16                    layer6, 7, 8 -> ASPP 256, resized -------------- concat
                                                                                    |
    stride 4                          logits <- conv2 128 <- conv1 128 <------------+
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cfbi_jax.models.attention import DynamicLogit, Gate, StaticLogit
from cfbi_jax.models.convolutions import everywhere
from cfbi_jax.models.deeplab import ASPP_DILATIONS
from cfbi_jax.models.layers import (
    Conv,
    GatedChannelTransform,
    GroupNorm,
    ResizedConv,
    SplitConv,
    channel_energy,
    computed_once,
    groups_of,
)

# (output width in units of `features`, stride, dilation) of layer1 .. layer8
BLOCKS = ((1, 1, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (2, 1, 4), (2, 2, 1), (2, 1, 2), (2, 1, 4))
STAGE_1_BLOCKS = 2
FEELVOS_LAYERS, FEELVOS_KERNEL = 4, 7

Logits = tuple[Float[Array, "n h w"], Float[Array, "n h w"]]


def _norm(x, dtype, name, limit=32):
    return GroupNorm(groups_of(x.shape[-1], limit), dtype, name=name)(x)


class ResBlock(nn.Module):
    """Bottleneck of `gate * x` with group norm; GCT on the input of the residual branch only."""

    features: int
    stride: int = 1
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], gate: Float[Array, "n 1 1 c"]
    ) -> Float[Array, "n oh ow features"]:
        width, dtype = self.features // 4, self.dtype
        gct = GatedChannelTransform(name="gct")(channel_energy(x) * jnp.square(gate))
        y = Conv(width, dtype=dtype, name="conv1")(x, gate * gct)
        y = nn.relu(_norm(y, dtype, "norm1"))
        y = Conv(width, 3, self.stride, self.dilation, dtype=dtype, name="conv2")(y)
        y = nn.relu(_norm(y, dtype, "norm2"))
        y = _norm(Conv(self.features, dtype=dtype, name="conv3")(y), dtype, "norm3")
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = Conv(self.features, stride=self.stride, dtype=dtype, name="downsample_conv")
            x = _norm(shortcut(x, gate), dtype, "downsample_norm")
        else:
            x = x * everywhere(gate, x)
        return computed_once(nn.relu(x + y))


class GctConvNorm(nn.Module):
    """GCT -> convolution -> group norm -> ReLU."""

    features: int
    kernel_size: int = 1
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w features"]:
        gct = GatedChannelTransform(name="gct")(channel_energy(x))
        conv = Conv(
            self.features,
            self.kernel_size,
            dilation=self.dilation,
            dtype=self.dtype,
            name="conv",
        )
        return nn.relu(_norm(conv(x, gct), self.dtype, "norm"))


class EnsemblerAspp(nn.Module):
    """ASPP with GCT and group norm; its pooling branch has no norm."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w features"]:
        width = self.features // 2
        branches = [GctConvNorm(width, dtype=self.dtype, name="aspp1")(x)]
        for i, dilation in enumerate(ASPP_DILATIONS, 2):
            branch = GctConvNorm(width, 3, dilation, self.dtype, name=f"aspp{i}")
            branches.append(branch(x))
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        pooled = nn.relu(Conv(width, dtype=self.dtype, name="pooling_conv")(pooled))
        pooled = everywhere(pooled, branches[0])
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        return GctConvNorm(self.features, dtype=self.dtype, name="project")(x)


class LogitPair(nn.Module):
    """Foreground and background logit, from the instance vector where there is one."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], vector: Float[Array, "n d"] | None) -> Logits:
        if vector is None:
            return StaticLogit(name="foreground")(x), StaticLogit(name="background")(x)
        return (
            DynamicLogit(name="foreground")(x, vector),
            DynamicLogit(name="background")(x, vector),
        )


class CollaborativeEnsembler(nn.Module):
    """Paper section 3.3: residual blocks down to stride 16, each gated by the instance vector
    (section 3.2), ASPP and a decoder with the low-level features, for every object row.

    features: of the deepest blocks and the decoder. `vector`: None leaves all gates open, and the
    logits' kernels are then the same for every row.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n h w c"],
        low_level: Float[Array, "n h w low"],
        vector: Float[Array, "n d"] | None,
    ) -> Logits:
        dtype, half = self.dtype, self.features // 2

        def gate(channels, name):
            if vector is None:
                return jnp.ones((x.shape[0], 1, 1, channels))
            return Gate(channels, name=name)(vector)

        for i, (width, stride, dilation) in enumerate(BLOCKS, 1):
            block = ResBlock(width * self.features, stride, dilation, dtype, name=f"layer{i}")
            x = block(x, gate(x.shape[-1], f"gate{i}"))
            if i == STAGE_1_BLOCKS:
                skip = low_level.astype(dtype), x
        x = x * everywhere(gate(x.shape[-1], "gate9"), x)
        x = EnsemblerAspp(self.features, dtype, name="aspp")(x)

        energy = jnp.concatenate([channel_energy(part) for part in skip], axis=-1)
        gct = GatedChannelTransform(name="skip_gct")(energy)
        skip = SplitConv(half // 2, dtype, name="skip_conv")(skip, gct)
        skip = nn.relu(_norm(skip, dtype, "skip_norm", limit=16))
        deep = x.shape[-1]
        gate10 = gate(deep + skip.shape[-1], "gate10")
        x = x * everywhere(gate10[..., :deep], x)
        skip = skip * everywhere(gate10[..., deep:], skip)
        x = ResizedConv(half, "bicubic", dtype, name="conv1")(x, skip)
        x = nn.relu(_norm(x, dtype, "norm1"))
        x = x * everywhere(gate(half, "gate11"), x)
        x = nn.relu(_norm(Conv(half, 3, dtype=dtype, name="conv2")(x), dtype, "norm2"))
        return LogitPair(name="logits")(x, vector)


class FeelvosHead(nn.Module):
    """Four depthwise separable convolutions, 7x7 (Voigtlaender et al., CVPR 2019, section 3.5)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n h w c"],
        low_level: Float[Array, "n h w low"],
        vector: Float[Array, "n d"] | None,
    ) -> Logits:
        dtype = self.dtype
        for i in range(1, FEELVOS_LAYERS + 1):
            if vector is not None:
                x = x * everywhere(Gate(x.shape[-1], name=f"gate{i}")(vector), x)
            x = Conv(
                x.shape[-1],
                FEELVOS_KERNEL,
                depthwise=True,
                use_bias=True,
                dtype=dtype,
                name=f"depthwise{i}",
            )(x)
            x = nn.relu(_norm(x, dtype, f"depthwise_norm{i}"))
            x = Conv(self.features, use_bias=True, dtype=dtype, name=f"pointwise{i}")(x)
            x = nn.relu(_norm(x, dtype, f"pointwise_norm{i}"))
        return LogitPair(name="logits")(x, vector)
