"""ResNet-101 at output stride 16, with frozen batch norm and DeepLab's multi-grid."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cfbi_jax.models.layers import Conv, FrozenBatchNorm, computed_once

MULTI_GRID = (1, 2, 4)


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (which carries the stride) -> 1x1 with four times the width, plus the shortcut."""

    width: int
    stride: int = 1
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow o"]:
        out = 4 * self.width
        y = Conv(self.width, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(FrozenBatchNorm(dtype=self.dtype, name="bn1")(y))
        y = Conv(self.width, 3, self.stride, self.dilation, dtype=self.dtype, name="conv2")(y)
        y = nn.relu(FrozenBatchNorm(dtype=self.dtype, name="bn2")(y))
        y = Conv(out, dtype=self.dtype, name="conv3")(y)
        y = FrozenBatchNorm(dtype=self.dtype, name="bn3")(y)
        if self.stride != 1 or x.shape[-1] != out:
            x = Conv(out, stride=self.stride, dtype=self.dtype, name="downsample_conv")(x)
            x = FrozenBatchNorm(dtype=self.dtype, name="downsample_bn")(x)
        return computed_once(nn.relu(x + y))


class ResNet(nn.Module):
    """Stage 4 keeps stride 16 and dilates by 2 times the multi-grid instead."""

    blocks: tuple[int, ...]
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h16 w16 c"], Float[Array, "b h4 w4 low"]]:
        """Returns (features at stride 16, low-level features at stride 4 = output of stage 1)."""
        x = Conv(self.width, 7, stride=2, padding=3, dtype=self.dtype, name="conv1")(images)
        x = nn.relu(FrozenBatchNorm(dtype=self.dtype, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        low_level = None
        for stage, (count, stride) in enumerate(zip(self.blocks, (1, 2, 2, 1), strict=True), 1):
            for i in range(count):
                dilation = 2 * MULTI_GRID[i % len(MULTI_GRID)] if stage == 4 else 1
                x = Bottleneck(
                    self.width * 2 ** (stage - 1),
                    stride=stride if i == 0 else 1,
                    dilation=dilation,
                    dtype=self.dtype,
                    name=f"layer{stage}_{i}",
                )(x)
            if stage == 1:
                low_level = x
        return x, low_level
