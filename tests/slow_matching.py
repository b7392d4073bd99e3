"""Matching by its definitions (paper eq. 1-7): loops over pixels, and all distances at once."""

import jax.numpy as jnp
import numpy as np

from cfbi_jax.models import matching

FAR = 5e4
FEW = 1e-4  # distances that differ by less are left out: either pixel may be the nearest
# (height, width, channels, rows, references): every new shape is compiled, so they are few
SHAPES = [(1, 1, 1, 1, 1), (1, 7, 2, 3, 1), (9, 1, 3, 2, 2), (5, 6, 4, 5, 3), (8, 11, 3, 4, 2)]


def distance(squared, bias):
    return 1 - 2 / (1 + np.exp(np.minimum(squared + bias, 500.0)))


def slow_global(query, reference, label, bias):
    """Eq. 2. query [h, w, c], reference [r, h, w, c], label [r, h, w] -> [h, w, rows]."""
    out = np.ones((*query.shape[:2], len(bias)))
    for y, x in np.ndindex(*query.shape[:2]):
        for row in range(len(bias)):
            pixels = reference[label == row]
            if len(pixels):
                out[y, x, row] = distance(
                    np.square(pixels - query[y, x]).sum(axis=-1).min(), bias[row]
                )
    return out


def slow_local(query, previous, label, bias, windows, rate=1):
    """Eq. 4 and 5 -> [h, w, rows, windows]."""
    height, width = query.shape[:2]
    out = np.ones((height, width, len(bias), len(windows)))
    for y, x, row in np.ndindex(height, width, len(bias)):
        for i, k in enumerate(windows):
            nearest = FAR
            reach = k // rate * rate
            for v in range(y - reach, y + reach + 1, rate):
                for u in range(x - reach, x + reach + 1, rate):
                    if 0 <= v < height and 0 <= u < width and label[v, u] == row:
                        squared = np.square(previous[v, u] - query[y, x]).sum()
                        nearest = min(nearest, squared)
            out[y, x, row, i] = distance(nearest, bias[row])
    return out


def full_matrix(query, reference, label, num_rows):
    """[q, rows] by every distance there is, for JAX to differentiate."""
    squared = jnp.sum(jnp.square(query[:, None] - reference), axis=-1)
    mine = label == jnp.arange(num_rows)[:, None]
    return jnp.min(jnp.where(mine, squared[:, None], FAR), axis=-1)


def full_windows(query, previous, label, num_rows, windows, rate=1):
    """[h, w, windows, rows] by every distance there is, for JAX to differentiate; and by how much
    the second nearest is farther."""
    y, x = np.indices(label.shape)
    dy, dx = (np.abs(v[:, :, None, None] - v) for v in (y, x))
    inside = (np.maximum(dy, dx) <= np.reshape(windows, (-1, 1, 1, 1, 1))) & (dy % rate == 0)
    inside &= dx % rate == 0
    mine = label == np.arange(num_rows)[:, None, None]
    taken = (inside[:, None] & mine[:, None, None]).transpose(2, 3, 0, 1, 4, 5)
    squared = jnp.sum(jnp.square(query[:, :, None, None] - previous), axis=-1)
    distances = jnp.where(taken, squared[:, :, None, None], FAR)
    least = jnp.sort(distances.reshape(*distances.shape[:4], -1), axis=-1)
    return least[..., 0], least[..., 1] - least[..., 0]


def random_case(seed, height, width, channels, rows, references=1, nobody=True):
    """Float64 arrays and labels; with `nobody`, about a row's share of pixels has no row."""
    rng = np.random.default_rng(seed)
    query = rng.random((height, width, channels))
    reference = rng.random((references, height, width, channels))
    label = rng.integers(0, rows + nobody, (references, height, width))
    label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
    bias = rng.normal(size=rows)
    return query, reference, label, bias


def f32(*arrays):
    return [jnp.asarray(a, a.dtype if a.dtype == np.uint8 else jnp.float32)[None] for a in arrays]
