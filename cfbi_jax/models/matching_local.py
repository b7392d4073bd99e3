"""Local matching: the nearest pixel of the previous frame in windows around the query (paper eq. 4
and 5).

    nearest = local_matching(query, previous, previous_label, bias, windows=(12, 2, 4, 6, 8, 10))

Called alone, it multiplies with JAX's default precision, on GPUs TF32 for float32; the network asks
for the highest.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from cfbi_jax.compilation import on_cpu
from cfbi_jax.models.matching import (
    FAR,
    NOBODY,
    biased_distance,
    distances_but_for_rest,
    map_batch,
    pull_together,
    rest_of_distances,
    squared_norm,
)
from cfbi_jax.models.resizing import resize, resize_labels

# Greatest width of the strips in which rows of pixels are correlated, and how many numbers the rows
# that are computed at a time may take (at least one row). On CPUs these sizes were the fastest of
# those tried, on 2 cores; elsewhere every product costs a launch, so there are few and large ones.
STRIP, ROW_NUMBERS = 36, 2**22
LARGE_STRIP, LARGE_ROW_NUMBERS = 128, 2**24


def local_matching(
    query: Float[Array, "b h w c"],
    previous: Float[Array, "b h w c"],
    previous_label: UInt8[Array, "b h w"],
    bias: Float[Array, " rows"],
    windows: tuple[int, ...],
    *,
    downsample: bool = True,
    atrous_rate: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w rows windows"]:
    """Foreground multi-local map (eq. 4 and 5), the windows in the order given.

    Window k compares a pixel with those at most k away in x and y. `downsample` matches at half
    size and resizes the result back (paper section 4); `atrous_rate` r keeps offsets that are
    multiples of r. A row without a pixel in the window gets exactly 1.
    """
    batch, height, width, _ = query.shape
    size = (height // 2 + 1, width // 2 + 1) if downsample else (height, width)
    num_rows = bias.shape[0]

    def match(query, previous, label):
        return windowed_squared_distance(query, previous, label, num_rows, windows, atrous_rate)

    squared = map_batch(
        match,
        resize(query, size).astype(dtype),
        resize(previous, size).astype(dtype),
        resize_labels(previous_label, size),
    )
    distance = biased_distance(squared, bias)
    distance = jnp.moveaxis(distance, -1, -2).reshape(batch, *size, num_rows * len(windows))
    distance = resize(distance, (height, width))
    return distance.reshape(batch, height, width, num_rows, len(windows))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def windowed_squared_distance(
    query: Float[Array, "h w c"],
    previous: Float[Array, "h w c"],
    label: UInt8[Array, "h w"],
    num_rows: int,
    windows: tuple[int, ...],
    atrous_rate: int = 1,
) -> Float[Array, "h w windows rows"]:
    """Minimum squared distance within every window, per row; `FAR` where there is no pixel.

    A matrix product gives the distances of a strip of a query row to the strip `reach` wider of
    every previous row that it meets. Their minima over vertical offsets come first, window after
    window, as these are nested; then the band of horizontal offsets is read off the minima.

    As in `nearest_squared_distance`, the gradient flows to the nearest pixel alone; of pixels at
    the same distance one gets it.
    """
    return _nearest_in_windows(query, previous, label, num_rows, windows, atrous_rate, False)[0]


def _windowed_forward(query, previous, label, num_rows, windows, atrous_rate):
    arguments = query, previous, label
    nearest, index = _nearest_in_windows(*arguments, num_rows, windows, atrous_rate, True)
    return nearest, (*arguments, index)


def _windowed_backward(num_rows, windows, atrous_rate, residuals, gradient):
    query, previous, label, index = residuals
    num_pixels = label.size
    flat = (x.reshape(num_pixels, -1) for x in (query, previous, index, gradient))
    gradients = (x.reshape(query.shape) for x in pull_together(*flat))
    return *gradients, np.zeros(label.shape, jax.dtypes.float0)


windowed_squared_distance.defvjp(_windowed_forward, _windowed_backward)


def _nearest_in_windows(
    query, previous, label, num_rows, windows, atrous_rate, with_index
) -> tuple[Float[Array, "h w windows rows"], Int[Array, "h w windows rows"] | None]:
    """The distances; and of which pixel of the flattened previous frame, or -1, if asked for."""
    height, width, channels = query.shape
    reach = max(windows) // atrous_rate * atrous_rate
    offsets = np.arange(-reach, reach + 1, atrous_rate)

    greatest, numbers = _strip_sizes()
    num_strips = -(-width // greatest)
    strip = -(-width // num_strips)
    right = num_strips * strip - width
    # columns[s, v]: the previous frame's column v of strip s, counted from its left margin
    columns = np.arange(num_strips)[:, None] * strip + np.arange(strip + 2 * reach)
    # rows[i]: those of the i-th block; the last one may go through the last row again
    of_column = offsets.size * (strip + channels) + strip * num_rows * len(windows)
    numbers_of_row = columns.size * of_column
    num_blocks = -(-height // max(1, numbers // numbers_of_row))
    rows = np.arange(num_blocks * -(-height // num_blocks)).reshape(num_blocks, -1)
    rows = np.minimum(rows, height - 1)

    def cut_query(x):
        x = jnp.pad(x, ((0, 0), (0, right), (0, 0)))
        return x.reshape(height, num_strips, strip, -1)[rows]  # [i, j, s, x, c]

    def cut_previous(x, fill=0):
        margin = ((reach, reach), (reach, reach + right), (0, 0))
        x = jnp.pad(x, margin, constant_values=fill)[:, columns]
        return jax.lax.optimization_barrier(x.transpose(1, 3, 0, 2))  # [s, c, y, v]

    query_norm = squared_norm(query)[..., None]
    norm = cut_previous(squared_norm(previous)[..., None])
    previous = cut_previous(-2 * previous)
    label = cut_previous(label[..., None], NOBODY)

    def one_row(y, query, query_norm):
        """[s, x, c] of row y -> [windows, rows, s, x]."""

        def met(x):
            x = jax.lax.dynamic_slice_in_dim(x, y, 2 * reach + 1, axis=2)
            return x[:, :, ::atrous_rate]  # [s, c, o, v]

        product = jnp.einsum("sxc,scov->sxov", query, met(previous))
        squared = distances_but_for_rest(product, query_norm[..., None], met(norm))
        mine = met(label) == jnp.arange(num_rows, dtype=label.dtype).reshape(-1, 1, 1, 1, 1)
        return _least_in_windows(squared, mine, offsets, windows, with_index)

    blocks = rows, cut_query(query), cut_query(query_norm)
    result = jax.lax.map(lambda block: jax.vmap(one_row)(*block), blocks)

    def whole(x):
        x = x.reshape(rows.size, len(windows), num_rows, num_strips * strip)
        return x[:height, ..., :width].transpose(0, 3, 1, 2)

    nearest, index = jax.tree.map(whole, result)
    nearest = nearest + rest_of_distances(query_norm)[..., None]
    if with_index:
        o, i = jnp.divmod(index, offsets.size)
        y = np.arange(height)[:, None, None, None] + o * atrous_rate - reach
        x = np.arange(width)[:, None, None] + i * atrous_rate - reach
        index = jnp.where(nearest < FAR, y * width + x, -1)
    return jnp.minimum(nearest, FAR), index


def _strip_sizes() -> tuple[int, int]:
    return (STRIP, ROW_NUMBERS) if on_cpu() else (LARGE_STRIP, LARGE_ROW_NUMBERS)


def _least_in_windows(
    squared: Float[Array, "s x o v"],
    mine: Bool[Array, "rows s 1 o v"],
    offsets: Int[np.ndarray, " o"],
    windows: tuple[int, ...],
    with_index: bool,
) -> tuple[Float[Array, "windows rows s x"], Int[Array, "windows rows s x"] | None]:
    """Per window and row, the least distance of query x to columns v = x + i at offset o.

    `offsets` holds those of o and of i; the index is o * (their number) + i.
    """
    strip, rate = squared.shape[1], np.diff(offsets[:2]).max(initial=1)
    squared = jax.lax.optimization_barrier(squared)
    nearest, at = jnp.asarray(jnp.inf, squared.dtype), jnp.asarray(-1, jnp.int32)
    found = {}
    for smaller, k in itertools.pairwise([-1, *sorted(windows)]):
        for o in np.flatnonzero((np.abs(offsets) <= k) & (np.abs(offsets) > smaller)):
            here = jnp.where(mine[..., o, :], squared[..., o, :], jnp.inf)
            at = jnp.where(here < nearest, np.int32(o), at)
            nearest = jnp.minimum(nearest, here)
        # [rows, s, x, v]; every window goes on from the one before
        nearest, at = jax.lax.optimization_barrier((nearest, at))

        inside = np.flatnonzero(np.abs(offsets) <= k)
        part = slice(inside[0], inside[-1] + 1)
        band = _diagonals(nearest, strip)[..., ::rate][..., part]
        least, index = jnp.min(band, axis=-1), None
        if with_index:
            # Two plain minima: XLA's CPU backend does not vectorise an arg-min.
            slots = _diagonals(at, strip)[..., ::rate][..., part] * offsets.size
            slots = slots + inside.astype(np.int32)
            slots = jnp.where(band == least[..., None], slots, offsets.size**2)
            index = jnp.min(slots, axis=-1)
        found[k] = least, index
    return jax.tree.map(lambda *x: jnp.stack(x), *(found[k] for k in windows))


def _diagonals(x: Shaped[Array, "*batch n m"], n: int) -> Shaped[Array, "*batch n k"]:
    """`out[i, j] = x[i, i + j]` for j in 0..m-n, by reading the rows with a pitch of m + 1:

    a b c . .               a b c . . .
    . d e f .  read as      d e f . . .  (m = 5, n = 3)
    . . g h i               g h i 0 0 0
    """
    *batch, _, m = x.shape
    flat = x.reshape(*batch, n * m)
    flat = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, n)])
    return flat.reshape(*batch, n, m + 1)[..., : m - n + 1]
