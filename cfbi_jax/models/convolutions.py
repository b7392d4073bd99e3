"""Convolutions and their gradients, in the forms that XLA computes fast on CPUs as on GPUs.

Images and features are channels-last, `[batch, height, width, channels]`.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
        x = x * everywhere(scale, x)
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


def everywhere(x: Float[Array, "..."], like: Float[Array, "b h w c"]) -> Float[Array, "..."]:
    """`x` in the type of `like`, to be added to all its pixels or multiplied by them.

    Its gradient is a sum over pixels, for which half precision would not do: it stops growing. XLA
    adds in the type that it is given (on GPUs from NVIDIA's Hopper on), so here that is float32.
    """
    if like.dtype == jnp.float32:
        return x.astype(jnp.float32)
    return _everywhere(x, like.shape, like.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _everywhere(x, shape, dtype):
    return jnp.broadcast_to(x.astype(dtype), shape)


def _everywhere_backward(shape, dtype, x, gradient):
    in_float32 = x.astype(jnp.float32)
    spread = jax.linear_transpose(lambda x: jnp.broadcast_to(x, shape), in_float32)
    (total,) = spread(gradient.astype(jnp.float32))
    return (total.astype(x.dtype),)


_everywhere.defvjp(lambda x, shape, dtype: (_everywhere(x, shape, dtype), x), _everywhere_backward)


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
    products = [x * everywhere(tap, x) for x, tap in zip(windows, taps, strict=True)]
    return sum(products[1:], products[0])


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
            sums = [jnp.sum((window * gradient)[0], axis=0, dtype=dtype) for window in windows]
            return total + jnp.stack(sums), input_gradient[0]

        dtype = jnp.promote_types(x.dtype, jnp.float32)  # as in `_kernel_gradient`
        taps = kernel.shape[0] * kernel.shape[1]
        total = jnp.zeros((taps, *gradient.shape[2:]), dtype)
        total, input_gradient = jax.lax.scan(add, total, (x, gradient))
        return input_gradient, jnp.sum(total, axis=1).reshape(kernel.shape).astype(kernel.dtype)

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
    # Half precision would stop growing: it rounds what a hundred images add away.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    batch, height, width, _ = gradient.shape
    chunk = max(1, min(GRADIENT_PIXELS // (height * width), -(-batch // 2)))

    def chunks(x):
        x = jnp.pad(x, ((0, -batch % chunk), *[(0, 0)] * 3))
        return x.reshape(-1, chunk, *x.shape[1:])

    def add(total, images):
        x, gradient = images
        products = [
            jnp.einsum("bhwo,bhwi->oi", gradient, window, preferred_element_type=dtype)
            for window in _windows(x, kernel_size, stride, dilation, margins)
        ]
        return total + jnp.stack(products), None

    taps = kernel_size[0] * kernel_size[1]
    total = jnp.zeros((taps, gradient.shape[-1], x.shape[-1]), dtype)
    total, _ = jax.lax.scan(add, total, (chunks(x), chunks(gradient)))
    total = total.astype(x.dtype)
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
