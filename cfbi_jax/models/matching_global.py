"""Global matching: the nearest pixel of the reference frames (paper eq. 2).

    nearest = global_matching(query, reference, reference_label, bias)

Called alone, it multiplies with JAX's default precision where `matching_kernel` is not at work, on
GPUs TF32 for float32; the network asks for the highest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from cfbi_jax.compilation import on_cpu
from cfbi_jax.models.matching import (
    FAR,
    biased_distance,
    distances_but_for_rest,
    map_batch,
    pull_together,
    rest_of_distances,
    squared_norm,
)
from cfbi_jax.models.matching_kernel import blocks_here, nearest_in_tiles

# Chunks of the global distance matrix: at most so many queries and pixels. One chunk is all of it
# that ever exists, so they bound the memory. On CPUs these sizes were the fastest of those tried,
# on 2 cores; there XLA takes a float32 tile's minima as it multiplies, and no chunk exists at all.
# Elsewhere every chunk costs several launches, so there are few and large ones (128 MiB in
# float32). On most NVIDIA GPUs `matching_kernel` takes their place.
QUERY_CHUNK, REFERENCE_TILE = 32_768, 256
LARGE_QUERY_CHUNK, LARGE_REFERENCE_TILE = 16_384, 2048


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

    squared = map_batch(
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
    gradients = pull_together(query, reference, index, gradient)
    return *gradients, np.zeros(label.shape, jax.dtypes.float0)


nearest_squared_distance.defvjp(_nearest_forward, _nearest_backward)


def _by_kernel(query, reference, label, num_rows, blocks, with_index):
    """Both of them in one kernel: `[q, rows]` distances, and indices or None."""
    tiles, bounds = _tiles_by_row(reference, label, num_rows, blocks.pixels)
    arrays = query, squared_norm(query), tiles.pixels, tiles.norms, bounds
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
    but for `rest_of_distances`; and that, to be added to the least of them."""
    query_norm = squared_norm(query)

    def distances(tile: "_Tiles"):
        product = jnp.einsum("qc,pc->qp", query, tile.pixels)
        return distances_but_for_rest(product, query_norm[:, None], tile.norms)

    return distances, rest_of_distances(query_norm)


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
    norms = jnp.where(source < num_pixels, squared_norm(pixels), jnp.inf)
    last_tile = jnp.cumsum(tiles_of_row)
    tile_row = jnp.searchsorted(last_tile, jnp.arange(num_tiles), side="right")
    bounds = jnp.append(0, last_tile)
    tiled = (x.reshape(num_tiles, tile, *x.shape[1:]) for x in (pixels, norms, source))
    return _Tiles(*tiled, tile_row), bounds
