"""Layers that the backbones and the ensembler share.

Images and features are channels-last, `[batch, height, width, channels]`. Parameters live in the
`params` collection; the constants of frozen batch norm live in `frozen`, which no optimiser sees.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt8

NORM_EPSILON = 1e-5
# Pixels of a matrix product of `_kernel_gradient`: enough to be fast, few enough for the cache.
GRADIENT_PIXELS = 4096


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int = 0,
    depthwise: bool = False,
    scale: Float[Array, "b 1 1 c"] | None = None,
) -> Float[Array, "b oh ow o"]:
    """2-D cross-correlation of `scale * x` with PyTorch's geometry (`padding` pixels of zeros on
    every side).

    Pointwise kernels become one matrix product and depthwise ones a sum of shifted products: XLA
    computes both several times faster than its own convolution on CPUs, with the same numbers.
    `scale` goes into a pointwise kernel of every image's own: no scaled copy of x is made.
    """
    if scale is not None:
        if kernel.shape[:2] == (1, 1) and padding == 0 and not depthwise:
            kernels = (scale[:, 0, 0, :, None] * kernel[0, 0]).astype(x.dtype)
            return _pointwise_by_image(x[:, ::stride, ::stride], kernels)
        x = x * scale.astype(x.dtype)
    if depthwise:
        return _depthwise(x, kernel, stride, dilation, (padding, padding))
    margins = [padding, padding]
    for axis, size in enumerate(x.shape[1:3]):
        if kernel.shape[axis] == 3 and padding == dilation >= size:  # outer taps see zeros alone
            kernel = jax.lax.slice_in_dim(kernel, 1, 2, axis=axis)
            margins[axis] = 0
    if kernel.shape[:2] == (1, 1) and margins == [0, 0]:
        return _pointwise(x[:, ::stride, ::stride], kernel[0, 0])
    return _convolve(x, kernel, stride, dilation, tuple(margins))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x, kernel, stride, dilation, margins):
    by_xla = partial(_convolve_by_xla, stride=stride, dilation=dilation, margins=margins)
    if not _mostly_padding(kernel, stride, dilation, margins):
        return by_xla(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_convolve_by_rows, dilation=dilation), default=by_xla
    )


def _convolve_by_xla(x, kernel, stride, dilation, margins):
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
        return _convolve_by_xla(x, kernel, stride, dilation, margins)

    def by_xla(x, kernel, gradient):
        return jax.linear_transpose(partial(convolve, x), kernel)(gradient)[0]

    def by_taps(x, kernel, gradient):
        return _kernel_gradient(x, gradient, kernel.shape[:2], stride, dilation, margins)

    if _mostly_padding(kernel, stride, dilation, margins):
        turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
        input_gradient = _convolve.fun(gradient, turned, stride, dilation, margins)
    else:
        (input_gradient,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(gradient)
    kernel_gradient = jax.lax.platform_dependent(x, kernel, gradient, cpu=by_taps, default=by_xla)
    return input_gradient, kernel_gradient


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _mostly_padding(kernel, stride, dilation, margins) -> bool:
    """Whether outer taps see so much padding that `_convolve_by_rows` pays."""
    wide = kernel.shape[:2] == (3, 3) and dilation >= 8
    return wide and stride == 1 and margins == (dilation, dilation)


def _convolve_by_rows(x, kernel, dilation):
    """A 3x3 convolution of the same size as sums of matrix products, without the rows of pixels
    that a row of taps sees as padding: for CPUs, whose convolution computes zeros."""
    height, width = x.shape[1:3]

    def seen(size, offset):  # where the output meets the input, and where in the output
        start = max(offset, 0)
        return slice(start, size + min(offset, 0)), (max(-offset, 0), start)

    total = 0
    for i, row_offset in enumerate((-dilation, 0, dilation)):
        rows, row_margin = seen(height, row_offset)
        product = jnp.einsum("bhwc,jco->bhwjo", x[:, rows], kernel[i])
        for j, column_offset in enumerate((-dilation, 0, dilation)):
            columns, column_margin = seen(width, column_offset)
            margins = ((0, 0), row_margin, column_margin, (0, 0))
            total = total + jnp.pad(product[:, :, columns, j], margins)
    return total


@jax.custom_vjp
def _pointwise(x: Float[Array, "b h w i"], kernel: Float[Array, "i o"]) -> Float[Array, "b h w o"]:
    return jnp.einsum("bhwi,io->bhwo", x, kernel)


def _pointwise_backward(residuals, gradient):
    x, kernel = residuals

    def by_xla(x, gradient):
        return jnp.einsum("bhwi,bhwo->io", x, gradient)

    def by_images(x, gradient):
        return _kernel_gradient(x, gradient, (1, 1), 1, 1, (0, 0))[0, 0]

    kernel_gradient = jax.lax.platform_dependent(x, gradient, cpu=by_images, default=by_xla)
    return jnp.einsum("bhwo,io->bhwi", gradient, kernel), kernel_gradient


_pointwise.defvjp(lambda x, kernel: (_pointwise(x, kernel), (x, kernel)), _pointwise_backward)


@jax.custom_vjp
def _pointwise_by_image(
    x: Float[Array, "b h w i"], kernels: Float[Array, "b i o"]
) -> Float[Array, "b h w o"]:
    return jnp.einsum("bhwi,bio->bhwo", x, kernels)


def _pointwise_by_image_backward(residuals, gradient):
    x, kernels = residuals

    def by_xla(x, gradient):
        return jnp.einsum("bhwi,bhwo->bio", x, gradient)

    def by_images(x, gradient):  # for the reasons that `_kernel_gradient` states
        products = jax.lax.map(lambda image: jnp.einsum("hwi,hwo->oi", *image), (x, gradient))
        return jnp.swapaxes(products, 1, 2)

    kernel_gradients = jax.lax.platform_dependent(x, gradient, cpu=by_images, default=by_xla)
    return jnp.einsum("bhwo,bio->bhwi", gradient, kernels), kernel_gradients


_pointwise_by_image.defvjp(
    lambda x, kernels: (_pointwise_by_image(x, kernels), (x, kernels)), _pointwise_by_image_backward
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x, kernel, stride, dilation, margins):
    windows = _windows(x, kernel.shape[:2], stride, dilation, margins)
    taps = kernel.reshape(-1, kernel.shape[-1])
    return sum(window * tap for window, tap in zip(windows, taps, strict=True))


def _depthwise_forward(x, kernel, stride, dilation, margins):
    return _depthwise(x, kernel, stride, dilation, margins), (x, kernel)


def _depthwise_backward(stride, dilation, margins, residuals, gradient):
    x, kernel = residuals

    def by_xla(x, kernel, gradient):
        return jax.vjp(partial(_depthwise.fun, **geometry), x, kernel)[1](gradient)

    def by_images(x, kernel, gradient):
        """The kernel's from sums over rows of pixels, which XLA vectorises, unlike whole sums."""

        def add(total, image):
            x, gradient = (part[None] for part in image)
            (input_gradient,) = jax.linear_transpose(
                lambda x: _depthwise.fun(x, kernel, **geometry), x
            )(gradient)
            windows = _windows(x, kernel.shape[:2], stride, dilation, margins)
            sums = [jnp.sum((window * gradient)[0], axis=0) for window in windows]
            return total + jnp.stack(sums), input_gradient[0]

        taps = kernel.shape[0] * kernel.shape[1]
        total = jnp.zeros((taps, *gradient.shape[2:]), kernel.dtype)
        total, input_gradient = jax.lax.scan(add, total, (x, gradient))
        return input_gradient, jnp.sum(total, axis=1).reshape(kernel.shape)

    geometry = dict(stride=stride, dilation=dilation, margins=margins)
    return jax.lax.platform_dependent(x, kernel, gradient, cpu=by_images, default=by_xla)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _kernel_gradient(
    x: Float[Array, "b h w i"],
    gradient: Float[Array, "b oh ow o"],
    kernel_size: tuple[int, int],
    stride: int,
    dilation: int,
    margins: tuple[int, int],
) -> Float[Array, "kh kw i o"]:
    """A convolution's kernel gradient, for CPUs: one matrix product per tap, a few images at a
    time.

    XLA's own convolution is several times slower there. So is one product over all images, because
    XLA transposes its first operand element by element, and computes what led to it once more in
    that order; operands of a loop are computed before it, and a few images fit the cache.
    """
    batch, height, width, _ = gradient.shape
    chunk = max(1, min(GRADIENT_PIXELS // (height * width), -(-batch // 2)))

    def chunks(x):
        x = jnp.pad(x, ((0, -batch % chunk), *[(0, 0)] * 3))
        return x.reshape(-1, chunk, *x.shape[1:])

    def add(total, images):
        x, gradient = images
        products = [
            jnp.einsum("bhwo,bhwi->oi", gradient, window)
            for window in _windows(x, kernel_size, stride, dilation, margins)
        ]
        return total + jnp.stack(products), None

    taps = kernel_size[0] * kernel_size[1]
    total = jnp.zeros((taps, gradient.shape[-1], x.shape[-1]), x.dtype)
    total, _ = jax.lax.scan(add, total, (chunks(x), chunks(gradient)))
    return jnp.swapaxes(total, 1, 2).reshape(*kernel_size, x.shape[-1], gradient.shape[-1])


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
            y = y + bias.astype(self.dtype)
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
        return x * factor.astype(self.dtype) + offset.astype(self.dtype)


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


def resized_conv2d(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c o"], size: tuple[int, int], method: str
) -> Float[Array, "n oh ow o"]:
    """`conv2d(resize(x, size, method), kernel, padding=1)`, for a `size` far above that of `x`.

    Both are linear, so the channels are mixed before the resize, where there are few pixels, and a
    tap's shift becomes one of the interpolation matrix: the output at `(p, q)` is

        sum over taps (i, j) of rows[i][p, :] @ (x @ kernel[i, j]) @ columns[j][q, :]
    """
    batch, height, width, _ = x.shape
    features = kernel.shape[-1]

    def shifted(size_in, size_out):  # [taps, out, in]
        matrix = interpolation_matrix(size_in, size_out, method, True)
        zeros = np.zeros_like(matrix[:1])
        below = np.concatenate([zeros, matrix[:-1]])
        above = np.concatenate([matrix[1:], zeros])
        return np.stack([below, matrix, above])

    rows = np.concatenate(shifted(height, size[0]), axis=1)
    columns = np.moveaxis(shifted(width, size[1]), 0, 2).reshape(size[1], -1)
    by_row_of_taps = []
    with jax.default_matmul_precision("highest"):
        for taps in kernel:
            mixed = jnp.einsum("nhwc,jco->nhwjo", x, taps).reshape(batch * height, -1, features)
            wide = jnp.einsum("qk,mko->mqo", columns.astype(x.dtype), mixed)
            by_row_of_taps.append(wide.reshape(batch, height, -1))
        stacked = jnp.concatenate(by_row_of_taps, axis=1)
        output = jnp.einsum("pk,nkm->npm", rows.astype(x.dtype), stacked)
    return output.reshape(batch, *size, features)
