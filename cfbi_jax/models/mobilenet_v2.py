"""MobileNetV2 (width 1.0), by default at output stride 16, with frozen batch norm."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cfbi_jax.models.layers import Conv, FrozenBatchNorm, computed_once

# (expansion, channels, number of blocks, stride of the first block)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LOW_LEVEL_BLOCK = 3  # the stem counts as block 0


class InvertedResidual(nn.Module):
    """1x1 expansion -> depthwise 3x3 -> 1x1 projection, identity shortcut where shapes allow.

    The *input* is padded, before the expansion, by the depthwise kernel's margin: official weights
    saw border pixels of `relu6(bn(0))` there, not of 0.
    """

    features: int
    expansion: int
    stride: int = 1
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow o"]:
        shortcut = x
        margin = self.dilation
        x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        hidden = shortcut.shape[-1] * self.expansion
        if self.expansion != 1:
            x = Conv(hidden, dtype=self.dtype, name="expand_conv")(x)
            x = nn.relu6(FrozenBatchNorm(dtype=self.dtype, name="expand_bn")(x))
        x = Conv(
            hidden,
            3,
            self.stride,
            self.dilation,
            padding=0,
            depthwise=True,
            dtype=self.dtype,
            name="depthwise_conv",
        )(x)
        x = nn.relu6(FrozenBatchNorm(dtype=self.dtype, name="depthwise_bn")(x))
        x = Conv(self.features, dtype=self.dtype, name="project_conv")(x)
        x = FrozenBatchNorm(dtype=self.dtype, name="project_bn")(x)
        if self.stride == 1 and shortcut.shape[-1] == self.features:
            x = computed_once(shortcut + x)
        return x


class MobileNetV2(nn.Module):
    """`output_stride` is 4, 8, 16 or 32: what would reduce the size further dilates instead."""

    dtype: DTypeLike = jnp.float32
    output_stride: int = 16

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b oh ow 320"], Float[Array, "b h4 w4 24"]]:
        """Returns (features at the output stride, output of block 3 = low-level, at stride 4)."""
        x = Conv(32, 3, stride=2, dtype=self.dtype, name="stem_conv")(images)
        x = nn.relu6(FrozenBatchNorm(dtype=self.dtype, name="stem_bn")(x))
        low_level = None
        block, reached, dilation = 0, 2, 1
        for expansion, features, count, stride in STAGES:
            # Past the stride limit a stage dilates instead; its first block keeps the dilation
            # reached so far, its later blocks use the new one.
            first_dilation = dilation
            if reached >= self.output_stride:
                dilation *= stride
                stride = 1
            reached *= stride
            for i in range(count):
                block += 1
                x = InvertedResidual(
                    features,
                    expansion,
                    stride=stride if i == 0 else 1,
                    dilation=first_dilation if i == 0 else dilation,
                    dtype=self.dtype,
                    name=f"block{block}",
                )(x)
                if block == LOW_LEVEL_BLOCK:
                    low_level = x
        return x, low_level
