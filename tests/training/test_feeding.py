"""How a batch comes to the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import random_clips

from cfbi_jax.training.feeding import device_batch
from cfbi_jax.training.step import StepOptions, pack_rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_are_packed_for_every_part(accumulate):
    clips = random_clips([0, 1, 2, 3], 3)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    batch = device_batch(clips, StepOptions(max_objects=3, accumulate=accumulate), mesh)
    expected = pack_rows(clips["num_objects"], accumulate, 3)
    jax.tree.map(np.testing.assert_array_equal, batch.packing, expected)
    for name, array in clips.items():
        np.testing.assert_array_equal(getattr(batch, name), array)
