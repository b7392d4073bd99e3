"""Global matching on GPUs: one kernel, in which the distances never leave the chip.

    blocks = blocks_here(query.dtype, channels)      # None: not here, see `matching`
    nearest, slot = nearest_in_tiles(query, ..., blocks=blocks)

A program of the kernel has a block of query pixels and goes through the tiles of reference pixels,
row after row: a product of matrices, then the minimum over a tile's pixels. XLA does not join the
two and writes the matrix of distances to memory in between.

Tensor cores multiply 16-bit numbers. A float32 number is the sum of three bfloat16 ones; of the
nine products of two such sums the six largest are taken and added up in float32, the smallest
first. What is left out is 2**-24 of the whole, as much as float32 rounds.

The environment variable `CFBI_JAX_KERNEL=off` leaves the work to XLA. Pallas' Triton back end is
deprecated since JAX 0.11 (it works up to the versions that `pyproject.toml` allows); without it,
`blocks_here` has to say None.
"""

import os
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cfbi_jax.compilation import default_device, on_cpu

# (piece of the query, piece of the reference), the smallest products first.
PRODUCTS = {1: [(0, 0)], 3: [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]}
# 16-bit numbers that make up one number of a type.
PIECES = {"float32": 3, "float16": 1, "bfloat16": 1}
# KiB of shared memory that a program may use, by the GPU's compute capability, and those that the
# compiler may want beside the blocks (1 was seen).
SHARED_KIB = {
    **{"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "9.0": 227},
    **{"10.0": 227, "10.3": 227, "12.0": 99, "12.1": 99},
}
RESERVED_KIB = 2

# Query pixels of a program and reference pixels of a tile: powers of two, of those tried on an H200
# the fastest first (docs/performance.md).
SIZES = [(128, 64), (64, 64), (64, 32), (32, 16)]
WARPS = 4
SWITCH = "CFBI_JAX_KERNEL"


class Blocks(NamedTuple):
    """How the work is divided. stages: tiles that are on their way or at work at the same time."""

    queries: int
    pixels: int
    stages: int


def blocks_for(dtype: DTypeLike, channels: int, shared_kib: int) -> Blocks | None:
    """The first sizes that fit into `shared_kib`; None: none does."""
    pieces = PIECES[jnp.dtype(dtype).name]
    stages = 2 if pieces == 3 else 3
    bytes_per_pixel = 2 * pieces * _depth(channels)
    for queries, pixels in SIZES:
        if bytes_per_pixel * (queries + stages * pixels) <= 1024 * (shared_kib - RESERVED_KIB):
            return Blocks(queries, pixels, stages)
    return None


def blocks_here(dtype: DTypeLike, channels: int) -> Blocks | None:
    """For JAX's default device; None where it is no GPU, or one that the kernel is not for."""
    if os.environ.get(SWITCH) == "off":
        return None
    shared_kib = SHARED_KIB.get(getattr(default_device(), "compute_capability", None))
    return shared_kib and blocks_for(dtype, channels, shared_kib)


def _depth(channels: int) -> int:
    """Channels as they are padded: a power of two that tensor cores take."""
    return max(16, pl.next_power_of_2(channels))


def nearest_in_tiles(
    query: Float[Array, "q c"],
    query_norm: Float[Array, " q"],
    pixels: Float[Array, "t n c"],
    norms: Float[Array, "t n"],
    bounds: Int[Array, " bounds"],
    far: float,
    blocks: Blocks,
    with_slot: bool = False,
) -> tuple[Float[Array, "rows q"], Int[Array, "rows q"] | None]:
    """Per row and query pixel the least squared distance to the row's reference pixels, or `far`;
    and, `with_slot`, which of the `t n` pixels has it (the first of several; -1: none).

    Row i owns tiles `bounds[i]` to `bounds[i + 1] - 1`. `query_norm` and `norms` are squared
    norms, the latter infinite where a tile is not full. A pixel that is not finite has NaN for its
    distances, so that a row with one has no other. Without a GPU the kernel is interpreted, to test
    it.

    Raises ValueError where n is not `blocks.pixels`.
    """
    dtype = query.dtype
    num_queries, channels = query.shape
    num_rows = bounds.shape[0] - 1
    if pixels.shape[1] != blocks.pixels:
        raise ValueError(f"tiles have {pixels.shape[1]} pixels; expected {blocks.pixels}")
    depth = _depth(channels)

    def padded(x, rows):
        return jnp.pad(x, ((0, rows - x.shape[0]), (0, depth - channels)))

    num_padded = pl.cdiv(num_queries, blocks.queries) * blocks.queries
    queries = _pieces(padded(query, num_padded))
    references = _pieces(padded(pixels.reshape(-1, channels), norms.size))
    query_norm = jnp.pad(query_norm, (0, num_padded - num_queries))
    by_block = pl.BlockSpec((blocks.queries, depth), lambda i: (i, 0))
    whole = pl.BlockSpec(references[0].shape, lambda i: (0, 0))
    out_spec = pl.BlockSpec((num_rows, blocks.queries), lambda i: (0, i))
    out_shape = [jax.ShapeDtypeStruct((num_rows, num_padded), dtype)]
    if with_slot:
        out_shape.append(jax.ShapeDtypeStruct((num_rows, num_padded), jnp.int32))
    outputs = pl.pallas_call(
        partial(_kernel, num_rows=num_rows, blocks=blocks, far=far, num_pieces=len(queries)),
        grid=(num_padded // blocks.queries,),
        in_specs=[
            pl.BlockSpec(bounds.shape, lambda i: (0,)),
            pl.BlockSpec((blocks.queries,), lambda i: (i,)),
            pl.BlockSpec((norms.size,), lambda i: (0,)),
            *[by_block] * len(queries),
            *[whole] * len(references),
        ],
        out_specs=[out_spec] * len(out_shape),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=blocks.stages),
        interpret=on_cpu(),
        name="global_matching",
    )(bounds.astype(jnp.int32), query_norm, norms.reshape(-1), *queries, *references)
    nearest, *slot = (x[:, :num_queries] for x in outputs)
    # A minimum on a GPU passes over NaN, which has to be seen where a training diverges.
    bad_tiles = jnp.append(0, jnp.cumsum(~jnp.isfinite(pixels).all(axis=(1, 2))))[bounds]
    bad = (bad_tiles[1:] > bad_tiles[:-1])[:, None] | ~jnp.isfinite(query).all(axis=1)
    return jnp.where(bad, jnp.nan, nearest), slot[0] if slot else None


def _pieces(x: Float[Array, "n c"]) -> list[Float[Array, "n c"]]:
    """Half-precision numbers as they are; float32 ones as three bfloat16 that add up to them."""
    if x.dtype != jnp.float32:
        return [x]
    pieces = []
    for _ in range(3):
        piece = jax.lax.reduce_precision(x, 8, 7)  # no compiler may leave this rounding out
        pieces.append(piece.astype(jnp.bfloat16))
        x = x - piece
    return pieces


def _kernel(bounds, query_norm, norms, *refs, num_rows, blocks, far, num_pieces):
    queries = [ref[...] for ref in refs[:num_pieces]]
    references, outputs = refs[num_pieces : 2 * num_pieces], refs[2 * num_pieces :]
    query_norm = query_norm[...]
    dtype = query_norm.dtype

    def of_tile(t, carry):
        slots = pl.ds(t * blocks.pixels, blocks.pixels)
        tile = [ref[slots, :] for ref in references]
        product = None
        for i, j in PRODUCTS[num_pieces]:
            term = jax.lax.dot_general(
                queries[i], tile[j], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            product = term if product is None else product + term
        squared = (query_norm[:, None] + norms[slots][None, :]) - 2 * product.astype(dtype)
        nearest = carry[0]
        least = jnp.min(squared, axis=1)
        if len(carry) == 1:
            return (jnp.minimum(nearest, least),)
        slot = t * blocks.pixels + jnp.argmin(squared, axis=1).astype(jnp.int32)
        return jnp.minimum(nearest, least), jnp.where(least < nearest, slot, carry[1])

    start = [jnp.full(blocks.queries, far, dtype)]
    if len(outputs) == 2:
        start.append(jnp.full(blocks.queries, -1, jnp.int32))

    def of_row(row, carry):  # a loop, as rows may be many and are not to be compiled one by one
        found = jax.lax.fori_loop(bounds[row], bounds[row + 1], of_tile, tuple(start))
        for output, x in zip(outputs, found, strict=True):
            output[row, :] = x
        return carry

    jax.lax.fori_loop(0, num_rows, of_row, 0)
