"""Foreground-background matching of pixel embeddings (paper section 3.1): what both halves share.

    matching_global     the nearest pixel of the reference frames; `matching_kernel` does it on GPUs
    matching_local      the nearest pixel of the previous frame, in windows around the query

Every per-object tensor has `1 + K` *rows*: row 0 is the background, rows 1..K are the objects; the
number of rows is that of `bias`. A batch pads K, and `valid` keeps padding out of the other rows'
minima (`background_distance`). A label map holds the row of every pixel; a value that is no row
(255) belongs to nobody.

Distances: `d = |p - q|^2`, and `D = 2 * (sigmoid(d + bias) - 1/2)` is eq. 1. D grows with d, so all
minima are taken over d and the bias and the sigmoid are applied to the minimum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FAR = 5e4  # squared distance that stands for "no such pixel"; below float16's largest number
NOBODY = 255  # label of pixels that match nothing


def biased_distance(
    squared: Float[Array, "*batch rows"], bias: Float[Array, " rows"]
) -> Float[Array, "*batch rows"]:
    """Eq. 1: squared embedding distance -> [-1, 1]; `bias` holds b_B for row 0, b_F elsewhere.

    Always in float32: in half precision it is the distances alone that are half, as released.
    """
    return 2 * (jax.nn.sigmoid(squared.astype(jnp.float32) + bias) - 0.5)


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


def map_batch(fn: Callable, *arrays: Array) -> Array:
    """`vmap` over the first axis; a batch of one skips it, because XLA's CPU backend computes a
    batched product more slowly than a plain one."""
    if arrays[0].shape[0] == 1:
        return fn(*(a[0] for a in arrays))[None]
    return jax.vmap(fn)(*arrays)


def rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` rounded to its own type: XLA otherwise keeps half-precision intermediates in float32,
    and a distance is a difference of large numbers, so labels would depend on the compiler."""
    if x.dtype == jnp.float32:
        return x
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def squared_norm(x: Float[Array, "*batch c"]) -> Float[Array, "*batch"]:
    return rounded(jnp.sum(rounded(jnp.square(x)), axis=-1))


def distances_but_for_rest(
    product: Float[Array, "*shape"], query_norm: Float[Array, "..."], norm: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """Squared distances from products of queries with doubled pixels, but for `rest_of_distances`.

    That is the same for all pixels and is added to the least of them: the query's norm in float32.
    Half precision has the released network's sums in their order.
    """
    product = rounded(product)
    if product.dtype == jnp.float32:
        return norm + product
    return rounded(query_norm + norm) + product


def rest_of_distances(query_norm: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return query_norm if query_norm.dtype == jnp.float32 else jnp.zeros_like(query_norm)


def pull_together(
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
