"""Matching against the definitions (paper eq. 1-7), written with loops over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfbi_jax.models import matching, matching_global, matching_kernel, matching_local
from cfbi_jax.models.matching_global import nearest_squared_distance
from cfbi_jax.models.matching_kernel import Blocks
from cfbi_jax.models.matching_local import windowed_squared_distance

FAR = 5e4

# On GPUs, as in the network: no TF32.
pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(params=["chunks", "kernel"])
def small_parts(request, monkeypatch):
    """Tiles of 7 or 8 and chunks of 13 or 16 pixels; `kernel`: the GPUs' kernel, interpreted where
    there is no GPU; there with its own blocks, which are larger."""
    if request.param == "chunks":
        monkeypatch.setattr(matching_global, "blocks_here", lambda *_: None)
        monkeypatch.setattr(matching_global, "_chunk_sizes", lambda: (13, 7))
    elif jax.default_backend() == "cpu":
        monkeypatch.setattr(matching_global, "blocks_here", lambda *_: Blocks(16, 8, 2))


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


# (height, width, channels, rows, references): every new shape is compiled, so they are few
SHAPES = [(1, 1, 1, 1, 1), (1, 7, 2, 3, 1), (9, 1, 3, 2, 2), (5, 6, 4, 5, 3), (8, 11, 3, 4, 2)]
LOCAL_SHAPES = [
    # (height, width, rows, windows, rate)
    (1, 1, 1, (2,), 1),
    (1, 9, 3, (3, 1, 2), 1),
    (7, 2, 2, (6, 1), 2),
    (6, 8, 4, (4, 2), 1),
    (5, 9, 3, (4, 2), 2),
]
global_matching = jax.jit(matching_global.global_matching)
by_the_kernel = jax.jit(lambda *arrays: matching_global.global_matching(*arrays))
local_matching = jax.jit(
    matching_local.local_matching, static_argnames=("windows", "downsample", "atrous_rate")
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_global_matching(seed, shape):
    query, reference, label, bias = random_case(seed, *shape)
    found = global_matching(*f32(query, reference, label), jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(found[0], slow_global(query, reference, label, bias), atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_the_kernel(seed, shape):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching_global, "blocks_here", lambda *_: Blocks(16, 16, 2))
        query, reference, label, bias = random_case(seed, *shape)
        arrays = *f32(query, reference, label), jnp.asarray(bias, jnp.float32)
        found = by_the_kernel(*arrays)
    np.testing.assert_allclose(found[0], slow_global(query, reference, label, bias), atol=2e-6)


def test_global_matching_over_several_tiles_and_chunks(small_parts):
    """Sizes that divide nothing."""
    query, reference, label, bias = random_case(0, 9, 11, 4, 4, references=2)
    label[label == 2] = 0  # an absent object between present ones
    found = matching_global.global_matching(
        *f32(query, reference, label), jnp.asarray(bias, jnp.float32)
    )
    np.testing.assert_allclose(found[0], slow_global(query, reference, label, bias), atol=2e-6)
    np.testing.assert_array_equal(found[0, ..., 2], 1)


def test_as_many_rows_as_labels_can_name():
    rng = np.random.default_rng(0)
    query, reference = rng.random((2, 6, 3))
    label = np.array([0, 1, 253, 254, 254, 255], np.uint8)
    pixels = [jnp.asarray(x, jnp.float32) for x in (query, reference)]
    found = np.asarray(nearest_squared_distance(*pixels, jnp.asarray(label), 255))
    exact = np.square(query[:, None] - reference).sum(axis=-1)
    for row in (0, 1, 253, 254):
        expected = exact[:, label == row].min(axis=1)
        np.testing.assert_allclose(found[:, row], expected, atol=2e-6)
    assert (found[:, 2:253] == matching.FAR).all()


def test_global_matching_of_ties_and_of_a_batch(small_parts):
    query, reference, label, bias = random_case(1, 5, 6, 3, 3)
    reference[:] = reference[0, 0, 0]  # every reference pixel is the same
    twice = [jnp.concatenate([a, a[:, :, ::-1]]) for a in f32(query)]
    both = [jnp.concatenate([a, a]) for a in f32(reference, label)]
    found = matching_global.global_matching(*twice, *both, jnp.asarray(bias, jnp.float32))
    expected = slow_global(query, reference, label, bias)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)
    np.testing.assert_allclose(found[1], expected[:, ::-1], atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_kernel_rounds_half_precision_as_the_chunks_do(monkeypatch, dtype):
    """Eighths, the sums of whose products are exact in any order: what differs from the exact
    distances are norms, products and distances in half precision."""
    rng = np.random.default_rng(0)
    query, reference = jnp.asarray(rng.integers(0, 9, (2, 70, 60)) / 8, dtype)
    label = jnp.asarray(rng.integers(0, 3, 70), jnp.uint8)
    found = {}
    for name, blocks in (("chunks", None), ("kernel", Blocks(16, 16, 2))):
        monkeypatch.setattr(matching_global, "blocks_here", lambda *_, blocks=blocks: blocks)
        found[name] = nearest_squared_distance(query, reference, label, 3)
        assert found[name].dtype == dtype
    np.testing.assert_array_equal(found["kernel"], found["chunks"])
    exact = np.square(np.float64(query)[:, None] - np.float64(reference)).sum(axis=-1)
    exact = np.stack([exact[:, label == row].min(axis=1) for row in range(3)], axis=1)
    assert (np.float64(found["kernel"]) != exact).any()


def test_the_kernel_is_as_exact_as_float32():
    """Its products are made of bfloat16 numbers; their sum over 100 channels is rounded about as
    often as one in float32."""
    rng = np.random.default_rng(0)
    query, reference = np.maximum(rng.standard_normal((2, 200, 100)), 0).astype(np.float32)
    exact = np.square(query[:, None].astype(float) - reference).sum(axis=-1).min(axis=1)
    size = np.square(query).sum(axis=-1).max() + np.square(reference).sum(axis=-1).max()
    arrays = *map(jnp.asarray, (query, reference)), jnp.zeros(200, jnp.uint8)
    found = {}
    for name, blocks in (("chunks", None), ("kernel", Blocks(16, 16, 2))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matching_global, "blocks_here", lambda *_, blocks=blocks: blocks)
            nearest = nearest_squared_distance(*arrays, 1)[:, 0]
        found[name] = np.abs(nearest - exact).max() / size / np.finfo(np.float32).eps
    assert found["kernel"] < 2 and found["chunks"] < 2


def test_pixels_that_are_not_finite_are_seen(small_parts):
    """NaN in a query or a reference pixel, in a row with other pixels; an empty row stays empty."""
    rng = np.random.default_rng(0)
    query, reference = (jnp.asarray(x, jnp.float32) for x in rng.random((2, 30, 4)))
    label = jnp.asarray(np.arange(30) % 2, jnp.uint8)
    for bad in (jnp.nan, jnp.inf):
        nearest = nearest_squared_distance(query.at[3, 1].set(bad), reference, label, 3)
        np.testing.assert_array_equal(np.isnan(nearest[:, :2]).any(axis=1), np.arange(30) == 3)
        assert np.isnan(nearest[3, :2]).all() and (nearest[np.arange(30) != 3, 2] == FAR).all()
    nearest = nearest_squared_distance(query, reference.at[7, 2].set(jnp.nan), label, 3)
    assert np.isnan(nearest[:, 1]).all() and np.isfinite(nearest[:, [0, 2]]).all()


def test_the_kernel_knows_its_switch_and_the_device(monkeypatch):
    class Device:
        compute_capability = "9.0"

    if jax.default_backend() == "cpu":
        assert matching_kernel.blocks_here("float32", 100) is None
    monkeypatch.setattr(matching_kernel, "default_device", Device)
    assert matching_kernel.blocks_here("float32", 100) == Blocks(128, 64, 2)
    monkeypatch.setenv("CFBI_JAX_KERNEL", "off")
    assert matching_kernel.blocks_here("float32", 100) is None


def test_tiles_of_another_size_than_the_kernels_are_refused():
    pixels = jnp.zeros((3, 8, 4))
    arrays = jnp.zeros((5, 4)), jnp.zeros(5), pixels, pixels[..., 0], jnp.array([0, 3])
    with pytest.raises(ValueError, match="tiles have 8 pixels; expected 16"):
        matching_kernel.nearest_in_tiles(*arrays, FAR, Blocks(16, 16, 2))


@pytest.mark.parametrize("shared_kib", sorted(set(matching_kernel.SHARED_KIB.values())))
@pytest.mark.parametrize("dtype, pieces", [("float32", 3), ("bfloat16", 1)])
def test_blocks_fit_into_shared_memory(shared_kib, dtype, pieces):
    for channels, depth in ((1, 16), (64, 64), (100, 128), (256, 256)):
        queries, pixels, stages = matching_kernel.blocks_for(dtype, channels, shared_kib)
        taken = pieces * depth * 2 * (queries + stages * pixels)
        assert taken <= (shared_kib - 2) * 1024
    blocks = matching_kernel.blocks_for(dtype, 100, 227)
    assert blocks[:2] == (128, 64)
    # What the compiler says that these take on an H100.
    taken = pieces * 128 * 2 * (blocks.queries + blocks.stages * blocks.pixels)
    assert taken == {"float32": 196_608, "bfloat16": 81_920}[dtype]
    assert matching_kernel.blocks_for(dtype, 2048, shared_kib) is None


# Numbers of a row of 11 pixels with 3 channels in three strips of 4: windows of 3 and 1, 3 rows.
ROW_OF_11 = 3 * (4 + 2 * 3) * ((2 * 3 + 1) * (4 + 3) + 4 * 3 * 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(LOCAL_SHAPES))
def test_local_matching(seed, shape):
    height, width, rows, windows, rate = shape
    query, reference, label, bias = random_case(seed, height, width, 3, rows)
    found = local_matching(
        *f32(query, reference[0], label[0]),
        jnp.asarray(bias, jnp.float32),
        windows,
        downsample=False,
        atrous_rate=rate,
    )
    expected = slow_local(query, reference[0], label[0], bias, windows, rate)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


@pytest.mark.parametrize(
    "sizes, size, rows, windows, rate",
    [
        ((4, 1), (6, 11), 3, (3, 1), 1),  # the last strip is shorter; row by row
        ((3, 1), (4, 9), 1, (2, 1), 2),
        ((5, 1), (2, 5), 3, (4, 2), 2),  # one strip, narrower than the windows
        ((2, 1), (1, 7), 4, (5,), 1),  # windows over several strips
        ((1, 1), (3, 4), 2, (1,), 1),
        ((4, 2 * ROW_OF_11), (7, 11), 3, (3, 1), 1),  # blocks of two rows, the last has one
        ((4, 5 * ROW_OF_11), (7, 11), 3, (3, 1), 1),  # two blocks of four rows instead of 5 and 2
    ],
)
def test_local_matching_over_several_strips(monkeypatch, sizes, size, rows, windows, rate):
    monkeypatch.setattr(matching_local, "_strip_sizes", lambda: sizes)
    query, reference, label, bias = random_case(2, *size, 3, rows)
    found = matching_local.local_matching(  # not the jitted one: strips are read at tracing
        *f32(query, reference[0], label[0]),
        jnp.asarray(bias, jnp.float32),
        windows,
        downsample=False,
        atrous_rate=rate,
    )
    expected = slow_local(query, reference[0], label[0], bias, windows, rate)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), padding=st.sampled_from([0, 2]))
def test_background_is_the_nearest_other_row(seed, rows, padding):
    rng = np.random.default_rng(seed)
    foreground = rng.integers(0, 4, (1, 3, 4, rows + padding, 2)) / 4  # with ties
    valid = np.arange(rows + padding)[None] < rows
    found = matching.background_distance(
        jnp.asarray(foreground, jnp.float32), jnp.asarray(valid, jnp.float32)
    )
    for row in range(rows):
        others = [j for j in range(rows) if j != row]
        expected = foreground[..., others, :].min(axis=3) if others else foreground[..., row, :]
        np.testing.assert_array_equal(found[..., row, :], expected)


@pytest.mark.parametrize("which", ["query", "reference", "bias"])
def test_gradients_are_those_of_finite_differences(which):
    query, reference, label, bias = random_case(3, 4, 5, 3, 3)
    arrays = {"query": query[None], "reference": reference[None], "bias": bias}
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    weights = jnp.asarray(np.random.default_rng(0).random((1, 4, 5, 3)), jnp.float32)

    def loss(value):
        inputs = {**arrays, which: value}
        found = matching_global.global_matching(
            inputs["query"], inputs["reference"], jnp.asarray(label)[None], inputs["bias"]
        )
        return jnp.sum(found * weights)

    value = arrays[which]
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(value.shape), jnp.float32)
    step = 1e-3
    slope = (loss(value + step * direction) - loss(value - step * direction)) / (2 * step)
    found = jnp.sum(jax.grad(loss)(value) * direction)
    np.testing.assert_allclose(found, slope, rtol=2e-2, atol=2e-3)


# (queries, pixels, channels, rows); sizes that divide neither a tile nor a chunk
NEAREST_SHAPES = [(1, 1, 1, 1), (1, 5, 2, 3), (7, 1, 3, 2), (13, 29, 4, 5), (31, 17, 3, 4)]
FEW = 1e-4  # distances that differ by less are left out: either pixel may be the nearest


def full_matrix(query, reference, label, num_rows):
    """[q, rows] by every distance there is, for JAX to differentiate."""
    squared = jnp.sum(jnp.square(query[:, None] - reference), axis=-1)
    mine = label == jnp.arange(num_rows)[:, None]
    return jnp.min(jnp.where(mine, squared[:, None], FAR), axis=-1)


def value_and_gradients(fn):
    def run(query, reference, label, weights):
        def total(query, reference):
            nearest = fn(query, reference, label, weights.shape[1])
            return jnp.sum(nearest * weights), nearest

        return jax.value_and_grad(total, (0, 1), has_aux=True)(query, reference)

    return run


nearest_and_gradients = jax.jit(value_and_gradients(nearest_squared_distance))
slow_nearest_and_gradients = jax.jit(value_and_gradients(full_matrix))


def check_nearest(found, seed, shape, empty_row):
    queries, pixels, channels, rows = shape
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((queries, channels)).astype(np.float32)
    reference = rng.standard_normal((pixels, channels)).astype(np.float32)
    label = rng.integers(0, rows + 1, pixels)
    label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
    if empty_row:
        label[label == rows // 2] = matching.NOBODY
    weights = rng.standard_normal((queries, rows)).astype(np.float32)
    squared = np.square(query[:, None] - reference).sum(axis=-1)
    for row in range(rows):
        two = np.sort(squared[:, label == row], axis=1)[:, :2]
        if two.shape[1] == 2:
            weights[two[:, 1] - two[:, 0] < FEW, row] = 0

    (_, nearest), gradients = found(query, reference, label, weights)
    (_, expected), slow = slow_nearest_and_gradients(query, reference, label, weights)
    # Squared distances of up to about 50 from differences of products: 50 x 1e-7, a few times.
    np.testing.assert_allclose(nearest, expected, atol=5e-5)
    for gradient, of_slow in zip(gradients, slow, strict=True):
        # Sums of at most 31 x 5 terms of order 1, in another order.
        np.testing.assert_allclose(gradient, of_slow, atol=1e-4)
    present = np.isin(np.arange(rows), label)
    assert (np.asarray(nearest)[:, ~present] == FAR).all()
    assert present.any() or not any(np.asarray(gradient).any() for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(NEAREST_SHAPES),
    empty_row=st.booleans(),
)
def test_gradient_of_the_nearest_pixel(seed, shape, empty_row):
    check_nearest(nearest_and_gradients, seed, shape, empty_row)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_nearest_pixel_over_several_tiles_and_chunks(small_parts, seed):
    # A new function, as what is traced depends on the parts.
    found = jax.jit(value_and_gradients(lambda *x: nearest_squared_distance(*x)))
    check_nearest(found, seed, (24, 45, 3, 4), empty_row=seed > 0)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (30, 60, 3, 5))),
    seed=st.integers(0, 10**6),
    kernel=st.booleans(),
)
def test_small_integers_of_any_size_have_exact_distances(sizes, seed, kernel):
    """Many ties, rows without a pixel, sizes that divide neither tiles nor chunks."""
    queries, pixels, channels, rows = sizes
    rng = np.random.default_rng(seed)
    query = rng.integers(0, 4, (queries, channels)).astype(np.float32)
    reference = rng.integers(0, 4, (pixels, channels)).astype(np.float32)
    label = rng.integers(0, rows + 1, pixels)
    label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
    blocks = Blocks(16, 8, 2) if kernel and jax.default_backend() == "cpu" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching_global, "blocks_here", lambda *_: blocks)
        patch.setattr(matching_global, "_chunk_sizes", lambda: (13, 7))
        arrays = map(jnp.asarray, (query, reference, label))
        found = nearest_squared_distance(*arrays, rows)
    squared = np.square(query[:, None] - reference).sum(axis=-1)
    for row in range(rows):
        expected = squared[:, label == row].min(axis=1, initial=FAR)
        np.testing.assert_array_equal(found[:, row], expected)


@pytest.mark.parametrize("blocks", [None, Blocks(16, 16, 2), Blocks(16, 2, 2)])
@pytest.mark.parametrize("tile", [512, 2])
def test_of_pixels_at_the_same_distance_the_first_gets_the_gradient(monkeypatch, tile, blocks):
    """Integers, so that distances are exact. JAX's own `min` would share it out."""
    if blocks and jax.default_backend() != "cpu":
        blocks = blocks._replace(pixels=16)  # the least that GPUs take
    monkeypatch.setattr(matching_global, "_chunk_sizes", lambda: (2048, tile))
    monkeypatch.setattr(matching_global, "blocks_here", lambda *_: blocks)
    query = jnp.array([[0.0, 0.0], [4.0, 0.0]])
    #                        row 1, far   row 0      row 1      row 1       row 1      row 0
    reference = jnp.array([[-3.0, 0], [0.0, 5.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    label = jnp.array([1, 0, 1, 1, 1, 0], jnp.uint8)
    weights = jnp.array([[1.0, 10.0], [100.0, 1000.0]])
    run = value_and_gradients(lambda *arguments: nearest_squared_distance(*arguments))
    (_, nearest), (query_gradient, gradient) = run(query, reference, label, weights)
    np.testing.assert_array_equal(nearest, [[25, 4], [41, 4]])
    # Sum over the queries of 2 x weight x (pixel - query).
    expected = np.zeros((6, 2))
    expected[1] = 2 * 1 * np.array([0, 5]) + 2 * 100 * np.array([-4, 5])
    expected[2] = 2 * 10 * np.array([2, 0]) + 2 * 1000 * np.array([-2, 0])
    np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(
        query_gradient, [[-40, -10], [2 * 100 * 4 + 2 * 1000 * 2, -2 * 100 * 5]]
    )


def test_what_is_beyond_far_pulls_at_nothing(small_parts):
    query, reference = jnp.zeros((2, 2)), jnp.array([[0.0, 300.0], [1.0, 2.0], [400.0, 0.0]])
    run = value_and_gradients(lambda *arguments: nearest_squared_distance(*arguments))
    label = jnp.array([1, 0, 1], jnp.uint8)
    (_, nearest), (query_gradient, gradient) = run(query, reference, label, jnp.ones((2, 2)))
    np.testing.assert_array_equal(nearest, [[5, FAR], [5, FAR]])
    np.testing.assert_array_equal(gradient, [[0, 0], [4, 8], [0, 0]])
    np.testing.assert_array_equal(query_gradient, [[-2, -4], [-2, -4]])


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


@pytest.mark.parametrize("shape", LOCAL_SHAPES[1:])
@pytest.mark.parametrize("sizes", [(3, 1), (3, 1000), (36, 2**22)])
def test_gradient_of_the_nearest_pixel_in_windows(monkeypatch, shape, sizes):
    height, width, rows, windows, rate = shape
    monkeypatch.setattr(matching_local, "_strip_sizes", lambda: sizes)

    @jax.jit
    def gradients(query, previous, label, weights):
        def total(query, previous):
            arguments = query, previous, label, rows, windows, rate
            return jnp.sum(windowed_squared_distance(*arguments) * weights)

        return jax.grad(total, (0, 1))(query, previous)

    @jax.jit
    def slow_gradients(query, previous, label, weights):
        def total(query, previous):
            nearest, farther = full_windows(query, previous, label, rows, windows, rate)
            weighted = jnp.where(farther > FEW, weights, 0)
            return jnp.sum(nearest * weighted), weighted

        return jax.grad(total, (0, 1), has_aux=True)(query, previous)

    for seed in range(4):
        rng = np.random.default_rng(seed)
        query, previous = rng.standard_normal((2, height, width, 3)).astype(np.float32)
        label = rng.integers(0, rows + (seed > 0), (height, width))
        label = np.where(label == rows, matching.NOBODY, label).astype(np.uint8)
        weights = rng.standard_normal((height, width, len(windows), rows)).astype(np.float32)
        expected, weights = slow_gradients(query, previous, label, weights)
        found = gradients(query, previous, label, weights)
        for gradient, slow in zip(found, expected, strict=True):
            # Sums of at most 9 x 9 x 2 x 4 terms of order 1, in another order.
            np.testing.assert_allclose(gradient, slow, atol=1e-4)


@pytest.mark.parametrize("sizes", [(36, 2**22), (1, 1)])
def test_of_pixels_at_the_same_distance_in_a_window_one_gets_the_gradient(monkeypatch, sizes):
    """All of a flat frame are; pixels of nobody and outside the window are not among them."""
    monkeypatch.setattr(matching_local, "_strip_sizes", lambda: sizes)
    query, previous = jnp.ones((1, 7, 2)), jnp.zeros((1, 7, 2))
    label = jnp.array([[1, 0, 0, matching.NOBODY, 0, 0, 1]], jnp.uint8)
    weights = jnp.zeros((1, 7, 2, 2)).at[0, 3].set(jnp.array([[1.0, 10.0], [100.0, 1000.0]]))
    run = jax.value_and_grad(
        lambda *x: jnp.sum(windowed_squared_distance(*x, label, 2, (1, 3)) * weights),
        (0, 1),
    )
    total, (query_gradient, gradient) = run(query, previous)
    assert total == 1 * 2 + 10 * FAR + 100 * 2 + 1000 * 2  # the inner window has no row 1
    np.testing.assert_array_equal(query_gradient[0, 3], 2 * np.array([1101, 1101]))
    assert not np.delete(query_gradient[0], 3, axis=0).any()
    given_to = np.asarray(gradient[0, :, 0])
    np.testing.assert_array_equal(given_to, gradient[0, :, 1])
    assert sorted(given_to[[2, 4]] + given_to[[1, 5]]) in ([-202, 0], [-200, -2])
    assert sorted(given_to[[0, 6]]) == [-2000, 0]
    assert given_to[3] == 0


def test_half_precision_adds_up_many_gradients():
    """All of 4,000 query pixels pull at one reference pixel; each adds about 1 to the sum."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.uniform(0, 1, (4000, 4)), jnp.bfloat16)
    reference, label = jnp.ones((1, 4), jnp.bfloat16), jnp.zeros(1, jnp.uint8)

    def total(reference):
        nearest = nearest_squared_distance(query, reference, label, 1)
        return jnp.sum(nearest.astype(jnp.float32))

    found = np.asarray(jax.grad(total)(reference), np.float64)
    expected = 2 * (1 - np.asarray(query, np.float64)).sum(axis=0, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1 / 256)  # rounded once
