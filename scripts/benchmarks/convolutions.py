"""The convolutions of a part of the network: their number of operations, and their time alone."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.measure import compile_program, time_call
from cfbi_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`shape` is the input's [b, h, w, c]; `kernel` [kh, kw, in, out]."""

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int
    dilation: int
    padding: int
    depthwise: bool
    dtype: str
    resized_to: tuple[int, int] | None = None  # the size of `layers.resized_conv2d`,
    method: str = ""  # and its method

    @property
    def flops(self) -> float:
        batch, *size, _ = self.shape
        taps, features = self.kernel[0] * self.kernel[1], self.kernel[3]
        channels = 1 if self.depthwise else self.kernel[2]
        spans = zip(size, self.kernel[:2], strict=True)
        height, width = (
            (side + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for side, kernel in spans
        )
        own = 2 * batch * height * width * taps * channels * features
        if self.resized_to is None:
            return own
        # The interpolation of the mixed channels: along the width, then along the height.
        tall, wide = self.resized_to
        return own + 2 * batch * features * 3 * height * wide * (3 * width + tall)

    @property
    def name(self) -> str:
        kernel = "x".join(str(side) for side in self.kernel[:2])
        channels = "depthwise" if self.depthwise else f"{self.kernel[2]} -> {self.kernel[3]}"
        extra = f" stride {self.stride}" * (self.stride > 1)
        extra += f" dilation {self.dilation}" * (self.dilation > 1)
        return f"{kernel} {channels} of {self.shape[1]} x {self.shape[2]}{extra}"


def record(function: Callable, *arguments: Any) -> tuple[Counter[Convolution], Any]:
    """How often every convolution occurs in `function`, and the shapes of its result. Only traces.

    Those in the body of a loop are counted once.
    """
    found: Counter[Convolution] = Counter()
    plain, resized = layers.conv2d, layers.resized_conv2d

    def conv2d(x, kernel, *, stride=1, dilation=1, padding=0, depthwise=False, scale=None):
        found[
            Convolution(
                x.shape, kernel.shape, stride, dilation, padding, depthwise, x.dtype.name
            )
        ] += 1  # fmt: skip
        return plain(
            x,
            kernel,
            stride=stride,
            dilation=dilation,
            padding=padding,
            depthwise=depthwise,
            scale=scale,
        )

    def resized_conv2d(x, kernel, size, method):
        # Channels are mixed before the resize, where there are few pixels.
        found[
            Convolution(x.shape, kernel.shape, 1, 1, 1, False, x.dtype.name, tuple(size), method)
        ] += 1  # fmt: skip
        return resized(x, kernel, size, method)

    with (
        mock.patch.object(layers, "conv2d", conv2d),
        mock.patch.object(layers, "resized_conv2d", resized_conv2d),
    ):
        shapes = jax.eval_shape(lambda *arguments: function(*arguments), *arguments)
    return found, shapes


def total_flops(found: Counter[Convolution]) -> float:
    return float(sum(convolution.flops * count for convolution, count in found.items()))


def seconds_alone(found: Counter[Convolution], runs: int) -> tuple[float, list[dict[str, Any]]]:
    """The sum over all convolutions of their time alone, and each one's.

    By XLA's own convolution, or for pointwise kernels by a matrix product, which is faster. Where
    the network mixes channels before a resize, by the network's own function, resize included.
    """
    details = []
    for convolution, count in found.items():
        x = jnp.ones(convolution.shape, convolution.dtype)
        kernel = jnp.ones(convolution.kernel, convolution.dtype)
        program = compile_program(_alone(convolution), x, kernel)
        seconds = time_call(program.call, x, kernel, runs=runs).median
        details.append(
            {
                "name": convolution.name,
                "count": count,
                "seconds": seconds,
                "gflop_per_second": convolution.flops / seconds / 1e9,
            }
        )
    return sum(line["count"] * line["seconds"] for line in details), details


def _alone(convolution: Convolution) -> Callable:
    stride, padding = convolution.stride, convolution.padding

    def pointwise(x, kernel):
        return jnp.einsum("bhwi,io->bhwo", x[:, ::stride, ::stride], kernel[0, 0])

    def general(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            rhs_dilation=(convolution.dilation, convolution.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=convolution.shape[-1] if convolution.depthwise else 1,
        )

    def resized(x, kernel):
        return layers.resized_conv2d(x, kernel, convolution.resized_to, convolution.method)

    if convolution.resized_to:
        return resized
    is_pointwise = convolution.kernel[:2] == (1, 1) and not padding and not convolution.depthwise
    return pointwise if is_pointwise else general
