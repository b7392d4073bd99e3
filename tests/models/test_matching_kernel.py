"""The GPUs' kernel, interpreted where there is no GPU, against the definition and the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_matching import FAR, SHAPES, f32, random_case, slow_global

from cfbi_jax.models import matching_global, matching_kernel
from cfbi_jax.models.matching_global import nearest_squared_distance
from cfbi_jax.models.matching_kernel import Blocks

# On GPUs, as in the network: no TF32.
pytestmark = pytest.mark.usefixtures("exact_products")

by_the_kernel = jax.jit(lambda *arrays: matching_global.global_matching(*arrays))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_the_kernel(seed, shape):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching_global, "blocks_here", lambda *_: Blocks(16, 16, 2))
        query, reference, label, bias = random_case(seed, *shape)
        arrays = *f32(query, reference, label), jnp.asarray(bias, jnp.float32)
        found = by_the_kernel(*arrays)
    np.testing.assert_allclose(found[0], slow_global(query, reference, label, bias), atol=2e-6)


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
