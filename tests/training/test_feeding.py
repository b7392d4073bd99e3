"""How a batch comes to the devices."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import random_clips

from cfbi_jax.training.feeding import device_batch, on_devices
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


def test_the_next_batch_comes_while_one_is_used():
    second = threading.Event()

    def stream():
        yield random_clips([1], 3)
        second.set()
        yield random_clips([2], 3)

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    with on_devices(stream(), StepOptions(max_objects=3), mesh) as batches:
        clips, batch = next(batches)
        assert second.wait(30)
        np.testing.assert_array_equal(batch.num_objects, clips["num_objects"])
        assert clips["num_objects"].tolist() == [1]
        assert next(batches)[0]["num_objects"].tolist() == [2]
