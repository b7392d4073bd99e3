"""DeepLabv3+ (Chen et al., ECCV 2018): backbone, atrous spatial pyramid pooling and decoder."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cfbi_jax.models.convolutions import everywhere
from cfbi_jax.models.layers import Conv, FrozenBatchNorm, ResizedConv, dropout
from cfbi_jax.models.mobilenet_v2 import MobileNetV2
from cfbi_jax.models.resnet import ResNet

ASPP_DILATIONS = (6, 12, 18)


class ConvBnRelu(nn.Module):
    features: int
    kernel_size: int = 1
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
        x = Conv(
            self.features,
            self.kernel_size,
            dilation=self.dilation,
            dtype=self.dtype,
            name="conv",
        )(x)
        return nn.relu(FrozenBatchNorm(dtype=self.dtype, name="bn")(x))


class ResizedConvBnRelu(nn.Module):
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], skip: Float[Array, "b oh ow d"]
    ) -> Float[Array, "b oh ow features"]:
        x = ResizedConv(self.features, "bilinear", self.dtype, name="conv")(x, skip)
        return nn.relu(FrozenBatchNorm(dtype=self.dtype, name="bn")(x))


class Aspp(nn.Module):
    """Parallel 1x1, three dilated 3x3 and a global average, concatenated and projected."""

    features: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], dropout_keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b h w features"]:
        branches = [ConvBnRelu(self.features, dtype=self.dtype, name="aspp1")(x)]
        for i, dilation in enumerate(ASPP_DILATIONS, 2):
            branch = ConvBnRelu(self.features, 3, dilation, dtype=self.dtype, name=f"aspp{i}")
            branches.append(branch(x))
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        pooled = ConvBnRelu(self.features, dtype=self.dtype, name="pooling")(pooled)
        pooled = everywhere(pooled, branches[0])
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        x = ConvBnRelu(self.features, dtype=self.dtype, name="project")(x)
        return x if dropout_keys is None else dropout(x, self.dropout, dropout_keys)


class Decoder(nn.Module):
    """Refines the pyramid's output at stride 4 with the backbone's low-level features."""

    features: int
    low_level_features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h16 w16 c"], low_level: Float[Array, "b h4 w4 low"]
    ) -> Float[Array, "b h4 w4 features"]:
        low = ConvBnRelu(self.low_level_features, dtype=self.dtype, name="low_level")(low_level)
        x = ResizedConvBnRelu(self.features, dtype=self.dtype, name="conv1")(x, low)
        return ConvBnRelu(self.features, 3, dtype=self.dtype, name="conv2")(x)


class DeepLab(nn.Module):
    """`backbone` is "resnet101" or "mobilenet_v2"; `resnet_*` and `features` set its size."""

    backbone: str
    resnet_blocks: tuple[int, ...]
    resnet_width: int
    features: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], dropout_keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b h4 w4 features"], Float[Array, "b h4 w4 low"]]:
        """Returns (decoder output, low-level backbone features), both at stride 4.

        `dropout_keys` are one key per image, while training.
        """
        if self.backbone == "resnet101":
            backbone = ResNet(self.resnet_blocks, self.resnet_width, self.dtype, name="backbone")
        elif self.backbone == "mobilenet_v2":
            backbone = MobileNetV2(dtype=self.dtype, name="backbone")
        else:
            raise ValueError(
                f'backbone is "{self.backbone}"; expected "resnet101" or "mobilenet_v2"'
            )
        x, low_level = backbone(images.astype(self.dtype))
        x = Aspp(self.features, self.dropout, self.dtype, name="aspp")(x, dropout_keys)
        low_dim = self.features * 3 // 16
        x = Decoder(self.features, low_dim, self.dtype, name="decoder")(x, low_level)
        return x, low_level
