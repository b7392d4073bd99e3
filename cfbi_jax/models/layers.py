"""Layers that the backbones and the ensembler share.

Images and features are channels-last, `[batch, height, width, channels]`. Parameters live in the
`params` collection; the constants of frozen batch norm live in `frozen`, which no optimiser sees.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

NORM_EPSILON = 1e-5


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int = 0,
    depthwise: bool = False,
) -> Float[Array, "b oh ow o"]:
    """2-D cross-correlation with PyTorch's geometry (`padding` pixels of zeros on every side).

    Pointwise kernels become one matrix product and depthwise ones a sum of shifted products: XLA
    computes both several times faster than its own convolution on CPUs, with the same numbers.
    """
    if depthwise:
        return _depthwise_conv2d(x, kernel, stride, dilation, padding)
    margins = [padding, padding]
    for axis, size in enumerate(x.shape[1:3]):
        if kernel.shape[axis] == 3 and padding == dilation >= size:  # outer taps see zeros alone
            kernel = jax.lax.slice_in_dim(kernel, 1, 2, axis=axis)
            margins[axis] = 0
    if kernel.shape[:2] == (1, 1) and margins == [0, 0]:
        return jnp.einsum("bhwi,io->bhwo", x[:, ::stride, ::stride], kernel[0, 0])
    return _convolve(x, kernel, stride, dilation, tuple(margins))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, stride, dilation, margins):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(margin, margin) for margin in margins],
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_forward(x, kernel, stride, dilation, margins):
    return _convolve(x, kernel, stride, dilation, margins), (x, kernel)


def _convolve_backward(stride, dilation, margins, residuals, gradient):
    x, kernel = residuals

    def convolve(x, kernel):
        return _convolve.fun(x, kernel, stride, dilation, margins)

    def by_xla(x, kernel, gradient):
        return jax.linear_transpose(partial(convolve, x), kernel)(gradient)[0]

    def by_taps(x, kernel, gradient):
        """One matrix product per tap: on CPUs several times faster than XLA's convolution."""
        products = [
            jnp.einsum("bhwi,bhwo->io", window, gradient)
            for window in _windows(x, kernel.shape[:2], stride, dilation, margins)
        ]
        return jnp.stack(products).reshape(kernel.shape)

    (input_gradient,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(gradient)
    kernel_gradient = jax.lax.platform_dependent(x, kernel, gradient, cpu=by_taps, default=by_xla)
    return input_gradient, kernel_gradient


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _windows(x, kernel_size, stride, dilation, margins) -> Iterator[Float[Array, "b oh ow c"]]:
    """The input shifted to every tap of a kernel, from the top left one on."""
    x = jnp.pad(x, ((0, 0), *((margin, margin) for margin in margins), (0, 0)))
    spans = [
        (size - dilation * (taps - 1) - 1) // stride * stride + 1
        for size, taps in zip(x.shape[1:3], kernel_size, strict=True)
    ]
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            top, left = i * dilation, j * dilation
            yield x[:, top : top + spans[0] : stride, left : left + spans[1] : stride]


def _depthwise_conv2d(x, kernel, stride, dilation, padding):
    windows = _windows(x, kernel.shape[:2], stride, dilation, (padding, padding))
    taps = kernel.reshape(-1, kernel.shape[-1])
    return sum(window * tap for window, tap in zip(windows, taps, strict=True))


class Conv(nn.Module):
    """Convolution with PyTorch's geometry; `padding=None` keeps the size at stride 1."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int | None = None
    depthwise: bool = False
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
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
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(self.dtype)
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
        return x * factor.astype(self.dtype) + offset.astype(self.dtype)


def group_norm(groups: int, dtype: DTypeLike, name: str | None = None) -> nn.GroupNorm:
    """Group norm as trained: epsilon 1e-5 and the two-pass variance, statistics in float32."""
    return nn.GroupNorm(
        num_groups=groups, epsilon=NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name
    )


def groups_of(channels: int, limit: int = 32) -> int:
    """Number of groups for `channels`: `limit` where it divides, as in every published width."""
    return math.gcd(limit, channels)


class GatedChannelTransform(nn.Module):
    """GCT (Yang et al., CVPR 2020): a gate per channel from the channels' own L2 norms."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        shape = (x.shape[-1],)
        alpha = self.param("alpha", nn.initializers.ones_init(), shape)
        gamma = self.param("gamma", nn.initializers.zeros_init(), shape)
        beta = self.param("beta", nn.initializers.zeros_init(), shape)
        # In float32 whatever the compute type: the sum of squares leaves float16's range.
        energy = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True)
        embedding = alpha * jnp.sqrt(energy + NORM_EPSILON)
        mean = jnp.mean(jnp.square(embedding), axis=-1, keepdims=True)
        gate = 1 + jnp.tanh(gamma * embedding / jnp.sqrt(mean + NORM_EPSILON) + beta)
        return x * gate.astype(x.dtype)


# --------------------------------------------------------------------------------------- resizing


def _cubic(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Cubic convolution kernel (Keys, 1981) at distance `t`, with the a of PyTorch and OpenCV."""
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


@lru_cache(maxsize=256)
def interpolation_matrix(size_in: int, size_out: int, method: str, align_corners: bool):
    """Float32 `[size_out, size_in]`: row i holds the weights of output sample i; edges repeat.

    `align_corners=True` reads position `i * (in - 1) / (out - 1)`, False (pixel centres)
    `(i + 1/2) * in / out - 1/2`. Methods: "bilinear", "bicubic".
    """
    index = np.arange(size_out, dtype=np.float64)
    if align_corners:
        position = index * ((size_in - 1) / (size_out - 1) if size_out > 1 else 0.0)
    else:
        position = (index + 0.5) * (size_in / size_out) - 0.5
    base = np.floor(position).astype(np.int64)
    matrix = np.zeros((size_out, size_in), np.float64)
    taps = {"bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}[method]
    for tap in taps:
        distance = position - (base + tap)
        weight = 1 - np.abs(distance) if method == "bilinear" else _cubic(distance)
        np.add.at(matrix, (np.arange(size_out), np.clip(base + tap, 0, size_in - 1)), weight)
    return matrix.astype(np.float32)


def resize(
    x: Float[Array, "n h w c"],
    size: tuple[int, int],
    method: str = "bilinear",
    align_corners: bool = True,
) -> Float[Array, "n oh ow c"]:
    """Separable resize without antialiasing, as two products with constant matrices (never TF32,
    which would round pixel values to a tenth of a grey level)."""
    height, width = x.shape[1:3]
    if (height, width) == tuple(size):
        return x
    rows = interpolation_matrix(height, size[0], method, align_corners)
    columns = interpolation_matrix(width, size[1], method, align_corners)
    with jax.default_matmul_precision("highest"):
        x = jnp.einsum("oh,nhwc->nowc", rows.astype(x.dtype), x)
        return jnp.einsum("pw,nowc->nopc", columns.astype(x.dtype), x)


def nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """Source index of every output index: `floor(i * in / out)` with the ratio in float32.

    Neither `[::stride]` nor half-pixel nearest (which is what `jax.image.resize` does).
    """
    ratio = np.float32(size_in / size_out)
    index = np.floor(np.arange(size_out, dtype=np.float32) * ratio).astype(np.int32)
    return np.minimum(index, size_in - 1)


def resize_labels(
    label: UInt8[Array, "*batch h w"], size: tuple[int, int]
) -> UInt8[Array, "*batch oh ow"]:
    """Nearest-neighbour resize of label maps (see `nearest_indices`)."""
    height, width = label.shape[-2:]
    label = label[..., nearest_indices(height, size[0]), :]
    return label[..., nearest_indices(width, size[1])]
