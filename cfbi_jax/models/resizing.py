"""Resizes of features, frames and label maps, and a convolution of a resized input.

All but `nearest_indices` and `resize_labels` are products with constant matrices.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


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
