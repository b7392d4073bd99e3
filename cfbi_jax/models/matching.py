"""Foreground-background matching of pixel embeddings (paper section 3.1).

Every per-object tensor has `1 + K` *rows*: row 0 is the background, rows 1..K are the objects; the
number of rows is that of `bias`. A batch pads K, and `valid` keeps padding out of the other rows'
minima (`background_distance`). A label map holds the row of every pixel; a value that is no row
(255) belongs to nobody.

Called alone, local matching (and global matching where `matching_kernel` is not at work) multiplies
with JAX's default precision, on GPUs TF32 for float32; the network asks for the highest.

Distances: `d = |p - q|^2`, and `D = 2 * (sigmoid(d + bias) - 1/2)` is eq. 1. D grows with d, so all
minima are taken over d and the bias and the sigmoid are applied to the minimum.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from cfbi_jax.compilation import on_cpu
from cfbi_jax.models.matching_kernel import blocks_here, nearest_in_tiles
from cfbi_jax.models.resizing import resize, resize_labels

FAR = 5e4  # squared distance that stands for "no such pixel"; below float16's largest number
NOBODY = 255  # label of pixels that match nothing

# Chunks of the global distance matrix: at most so many queries and pixels. One chunk is all of it
# that ever exists, so they bound the memory. On CPUs these sizes were the fastest of those tried,
# on 2 cores; there XLA takes a float32 tile's minima as it multiplies, and no chunk exists at all.
# Elsewhere every chunk costs several launches, so there are few and large ones (128 MiB in
# float32). On most NVIDIA GPUs `matching_kernel` takes their place.
QUERY_CHUNK, REFERENCE_TILE = 32_768, 256
LARGE_QUERY_CHUNK, LARGE_REFERENCE_TILE = 16_384, 2048
# Local matching: greatest width of the strips in which it correlates rows of pixels, and how many
# numbers the rows that it computes at a time may take (at least one row). The same holds.
STRIP, ROW_NUMBERS = 36, 2**22
LARGE_STRIP, LARGE_ROW_NUMBERS = 128, 2**24


def biased_distance(
    squared: Float[Array, "*batch rows"], bias: Float[Array, " rows"]
) -> Float[Array, "*batch rows"]:
    """Eq. 1: squared embedding distance -> [-1, 1]; `bias` holds b_B for row 0, b_F elsewhere.

    Always in float32: in half precision it is the distances alone that are half, as released.
    """
    return 2 * (jax.nn.sigmoid(squared.astype(jnp.float32) + bias) - 0.5)


def _map_batch(fn: Callable, *arrays: Array) -> Array:
    """`vmap` over the first axis; a batch of one skips it, because XLA's CPU backend computes a
    batched product more slowly than a plain one."""
    if arrays[0].shape[0] == 1:
        return fn(*(a[0] for a in arrays))[None]
    return jax.vmap(fn)(*arrays)


def _rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` rounded to its own type: XLA otherwise keeps half-precision intermediates in float32,
    and a distance is a difference of large numbers, so labels would depend on the compiler."""
    if x.dtype == jnp.float32:
        return x
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _squared_norm(x: Float[Array, "*batch c"]) -> Float[Array, "*batch"]:
    return _rounded(jnp.sum(_rounded(jnp.square(x)), axis=-1))


# ---------------------------------------------------------------------------------------- global


def global_matching(
    query: Float[Array, "b h w c"],
    reference: Float[Array, "b r h w c"],
    reference_label: UInt8[Array, "b r h w"],
    bias: Float[Array, " rows"],
    *,
    atrous_rate: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b h w rows"]:
    """Foreground global map (eq. 2): per row the distance to its nearest reference pixel.

    The pixels of all reference frames are one set. A row without a pixel gets exactly 1.
    `atrous_rate` r keeps reference rows and columns 0, r, 2r, ... only. `dtype` is the type of the
    embeddings and distances; the result is float32.
    """
    reference = reference[:, :, ::atrous_rate, ::atrous_rate]
    reference_label = reference_label[:, :, ::atrous_rate, ::atrous_rate]
    batch, height, width, channels = query.shape
    num_rows = bias.shape[0]

    def match(query, reference, label):
        return nearest_squared_distance(query, reference, label, num_rows)

    squared = _map_batch(
        match,
        query.reshape(batch, height * width, channels).astype(dtype),
        reference.reshape(batch, -1, channels).astype(dtype),
        reference_label.reshape(batch, -1),
    )
    squared = squared.reshape(batch, height, width, num_rows)
    return biased_distance(squared, bias)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def nearest_squared_distance(
    query: Float[Array, "q c"],
    reference: Float[Array, "p c"],
    label: UInt8[Array, " p"],
    num_rows: int,
) -> Float[Array, "q rows"]:
    """Per query and row, the squared distance to the row's nearest reference pixel, or `FAR`.

    Reference pixels are sorted by row and each row's block is padded to whole tiles. A tile then
    belongs to one row, so the distances are computed once whatever the number of objects:

        row 0          row 1      row 2
        [####|####|##..|####|#...|###.]      # pixel, . padding, | tile border

    The gradient flows to the nearest pixel alone, so the backward pass needs its index and no
    distance; of pixels at the same distance the first gets it.
    """
    if blocks := blocks_here(query.dtype, query.shape[1]):
        return _by_kernel(query, reference, label, num_rows, blocks, with_index=False)[0]

    tiles, used = _doubled_tiles(reference, label, num_rows)

    def one_chunk(query: Float[Array, "chunk c"]) -> Float[Array, "rows chunk"]:
        def one_tile(nearest, tile):
            return nearest.at[tile.row].min(jnp.min(distances(tile), axis=-1))

        distances, rest = _tile_distances(query)
        start = jnp.full((num_rows, query.shape[0]), jnp.inf, query.dtype)
        nearest = _over_tiles(one_tile, start, tiles, used)
        return jnp.minimum(nearest + rest, FAR)

    return _by_query_chunks(one_chunk, query)


def _nearest_forward(query, reference, label, num_rows):
    """The same, and the index of the nearest pixel (-1 where a row has none)."""
    if blocks := blocks_here(query.dtype, query.shape[1]):
        nearest, index = _by_kernel(query, reference, label, num_rows, blocks, with_index=True)
        return nearest, (query, reference, label, index)

    tiles, used = _doubled_tiles(reference, label, num_rows)

    def one_chunk(query):
        def one_tile(carry, tile):
            nearest, index = carry
            of_tile = distances(tile)
            least = jnp.min(of_tile, axis=-1)
            # Two plain minima: XLA's CPU backend does not vectorise an arg-min.
            slots = jnp.arange(of_tile.shape[1], dtype=jnp.int32)
            slot = jnp.min(jnp.where(of_tile == least[:, None], slots, slots.size - 1), axis=-1)
            closer = least < nearest[tile.row]
            nearest = nearest.at[tile.row].min(least)
            found = jnp.where(closer, tile.source[slot], index[tile.row])
            return nearest, index.at[tile.row].set(found)

        distances, rest = _tile_distances(query)
        start = (
            jnp.full((num_rows, query.shape[0]), jnp.inf, query.dtype),
            jnp.full((num_rows, query.shape[0]), -1, jnp.int32),
        )
        nearest, index = _over_tiles(one_tile, start, tiles, used)
        nearest = nearest + rest
        return jnp.minimum(nearest, FAR), jnp.where(nearest < FAR, index, -1)

    nearest, index = _by_query_chunks(one_chunk, query)
    return nearest, (query, reference, label, index)


def _nearest_backward(num_rows, residuals, gradient):
    query, reference, label, index = residuals
    gradients = _pull_together(query, reference, index, gradient)
    return *gradients, np.zeros(label.shape, jax.dtypes.float0)


nearest_squared_distance.defvjp(_nearest_forward, _nearest_backward)


def _pull_together(
    query: Float[Array, "q c"],
    reference: Float[Array, "p c"],
    index: Int[Array, "q n"],
    gradient: Float[Array, "q n"],
) -> tuple[Float[Array, "q c"], Float[Array, "p c"]]:
    """Gradients of the squared distances to the pixels at `index`; there is none where it is < 0.

    d|p - q|^2 = 2 (p - q) d(p - q), one column after the other to bound the memory.
    """
    # Thousands of query pixels may add to one reference pixel: half precision would stop growing.
    dtype = query.dtype
    query, reference, gradient = (x.astype(jnp.float32) for x in (query, reference, gradient))
    weight = 2 * jnp.where(index < 0, 0, gradient)

    def one_column(carry, column):
        query_gradient, reference_gradient = carry
        index, weight = column
        pull = weight[:, None] * (query - reference[index])
        return (query_gradient + pull, reference_gradient.at[index].add(-pull)), None

    start = (jnp.zeros_like(query), jnp.zeros_like(reference))
    gradients, _ = jax.lax.scan(one_column, start, (index.T, weight.T))
    return tuple(x.astype(dtype) for x in gradients)


def _by_kernel(query, reference, label, num_rows, blocks, with_index):
    """Both of them in one kernel: `[q, rows]` distances, and indices or None."""
    tiles, bounds = _tiles_by_row(reference, label, num_rows, blocks.pixels)
    arrays = query, _squared_norm(query), tiles.pixels, tiles.norms, bounds
    nearest, slot = nearest_in_tiles(*arrays, FAR, blocks, with_index)
    index = jnp.where(slot < 0, -1, tiles.source.reshape(-1)[slot]).T if with_index else None
    return nearest.T, index


def _chunk_sizes() -> tuple[int, int]:
    """Query pixels and reference pixels of a chunk of the distance matrix."""
    if on_cpu():
        return QUERY_CHUNK, REFERENCE_TILE
    return LARGE_QUERY_CHUNK, LARGE_REFERENCE_TILE


def _doubled_tiles(
    reference: Float[Array, "p c"], label: UInt8[Array, " p"], num_rows: int
) -> tuple["_Tiles", Int[Array, ""]]:
    """For `_tile_distances`: the pixels times -2, which is exact, once instead of all products;
    and how many of the tiles have pixels."""
    tile = min(_chunk_sizes()[1], reference.shape[0])
    tiles, bounds = _tiles_by_row(reference, label, num_rows, tile)
    return tiles._replace(pixels=-2 * tiles.pixels), bounds[-1]


def _over_tiles(one_tile: Callable, start: Any, tiles: "_Tiles", used: Int[Array, ""]) -> Any:
    """`one_tile(carry, tile)` for the first `used` tiles, one after the other; the others, which
    there are for many rows and for pixels of nobody, take no time."""

    def body(i, carry):
        return one_tile(carry, jax.tree.map(lambda x: x[i], tiles))

    return jax.lax.fori_loop(0, used, body, start)


def _tile_distances(query: Float[Array, "chunk c"]) -> tuple[Callable, Float[Array, " chunk"]]:
    """Tile of doubled pixels -> squared distances [chunk, n], infinite where the tile is padding,
    but for `_rest`; and that, to be added to the least of them."""
    query_norm = _squared_norm(query)

    def distances(tile: "_Tiles"):
        product = jnp.einsum("qc,pc->qp", query, tile.pixels)
        return _distances_but_for_rest(product, query_norm[:, None], tile.norms)

    return distances, _rest(query_norm)


def _distances_but_for_rest(
    product: Float[Array, "*shape"], query_norm: Float[Array, "..."], norm: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """Squared distances from products of queries with doubled pixels, but for `_rest`.

    That is the same for all pixels and is added to the least of them: the query's norm in float32.
    Half precision has the released network's sums in their order.
    """
    product = _rounded(product)
    if product.dtype == jnp.float32:
        return norm + product
    return _rounded(query_norm + norm) + product


def _rest(query_norm: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return query_norm if query_norm.dtype == jnp.float32 else jnp.zeros_like(query_norm)


def _by_query_chunks(one_chunk: Callable, query: Float[Array, "q c"]):
    """Maps `[chunk, c] -> [rows, chunk]` over chunks of the queries: `[q, rows]` per output."""
    num_queries, channels = query.shape
    chunk = -(-num_queries // -(-num_queries // _chunk_sizes()[0]))  # all about as long
    padded = jnp.pad(query, ((0, -num_queries % chunk), (0, 0)))
    outputs = jax.lax.map(one_chunk, padded.reshape(-1, chunk, channels))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1])[:num_queries], outputs
    )


class _Tiles(NamedTuple):
    """Reference pixels sorted into tiles of one row each; t tiles of n."""

    pixels: Float[Array, "t n c"]
    norms: Float[Array, "t n"]  # squared; infinite for padding
    source: Int[Array, "t n"]  # index among the reference pixels, or their number for padding
    row: Int[Array, " t"]


def _tiles_by_row(
    reference: Float[Array, "p c"], label: UInt8[Array, " p"], num_rows: int, tile: int
) -> tuple[_Tiles, Int[Array, " bounds"]]:
    """Sorts pixels into tiles of one row each: row i has tiles bounds[i] to bounds[i + 1] - 1."""
    num_pixels = reference.shape[0]
    num_tiles = num_pixels // tile + num_rows  # enough for any labels

    row = jnp.minimum(label.astype(jnp.int32), num_rows)
    count = jnp.bincount(row, length=num_rows + 1)
    first = jnp.cumsum(count) - count
    tiles_of_row = -(-count[:num_rows] // tile)
    first_slot = tile * (jnp.cumsum(tiles_of_row) - tiles_of_row)
    # Pixels of nobody go past the last slot and are dropped.
    first_slot = jnp.append(first_slot, num_tiles * tile)

    order = jnp.argsort(row, stable=True)
    sorted_row = row[order]
    slot = first_slot[sorted_row] + jnp.arange(num_pixels) - first[sorted_row]
    source = jnp.full(num_tiles * tile, num_pixels).at[slot].set(order, mode="drop")

    pixels = reference.at[source].get(mode="fill", fill_value=0)
    norms = jnp.where(source < num_pixels, _squared_norm(pixels), jnp.inf)
    last_tile = jnp.cumsum(tiles_of_row)
    tile_row = jnp.searchsorted(last_tile, jnp.arange(num_tiles), side="right")
    bounds = jnp.append(0, last_tile)
    tiled = (x.reshape(num_tiles, tile, *x.shape[1:]) for x in (pixels, norms, source))
    return _Tiles(*tiled, tile_row), bounds


# ----------------------------------------------------------------------------------------- local


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

    squared = _map_batch(
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
    gradients = (x.reshape(query.shape) for x in _pull_together(*flat))
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

    query_norm = _squared_norm(query)[..., None]
    norm = cut_previous(_squared_norm(previous)[..., None])
    previous = cut_previous(-2 * previous)
    label = cut_previous(label[..., None], NOBODY)

    def one_row(y, query, query_norm):
        """[s, x, c] of row y -> [windows, rows, s, x]."""

        def met(x):
            x = jax.lax.dynamic_slice_in_dim(x, y, 2 * reach + 1, axis=2)
            return x[:, :, ::atrous_rate]  # [s, c, o, v]

        product = jnp.einsum("sxc,scov->sxov", query, met(previous))
        squared = _distances_but_for_rest(product, query_norm[..., None], met(norm))
        mine = met(label) == jnp.arange(num_rows, dtype=label.dtype).reshape(-1, 1, 1, 1, 1)
        return _least_in_windows(squared, mine, offsets, windows, with_index)

    blocks = rows, cut_query(query), cut_query(query_norm)
    result = jax.lax.map(lambda block: jax.vmap(one_row)(*block), blocks)

    def whole(x):
        x = x.reshape(rows.size, len(windows), num_rows, num_strips * strip)
        return x[:height, ..., :width].transpose(0, 3, 1, 2)

    nearest, index = jax.tree.map(whole, result)
    nearest = nearest + _rest(query_norm)[..., None]
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


# ------------------------------------------------------------------------------------ background


def background_distance(
    foreground: Float[Array, "b h w rows *windows"], valid: Float[Array, "b rows"]
) -> Float[Array, "b h w rows *windows"]:
    """Background maps (eq. 3, 6 and 7): per row the minimum over the *other* valid rows' maps.

    A row alone in its video keeps its own map, as the released network does.
    """
    extra = foreground.ndim - 4
    shape = (valid.shape[0], 1, 1, valid.shape[1], *(1,) * extra)
    other = jnp.where(valid.reshape(shape) > 0, foreground, jnp.inf)
    nearest = jnp.min(other, axis=3, keepdims=True)
    rows = jnp.arange(foreground.shape[3]).reshape(1, 1, 1, -1, *(1,) * extra)
    is_nearest = rows == jnp.argmin(other, axis=3, keepdims=True)
    second = jnp.min(jnp.where(is_nearest, jnp.inf, other), axis=3, keepdims=True)
    result = jnp.where(is_nearest, second, nearest)
    return jnp.where(jnp.isinf(result), foreground, result)
