"""What both halves of matching share (paper eq. 1 and section 3.1)."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cfbi_jax.models import matching


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
