"""Batches of clips, from the loader to the devices ahead of their use."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cfbi_jax.data.loader import ClipBatch
from cfbi_jax.data.prefetch import prefetch
from cfbi_jax.training.step import Batch, StepOptions, pack_rows


def on_devices(
    stream: Iterator[ClipBatch], options: StepOptions, mesh: Mesh
) -> closing[Iterator[tuple[ClipBatch, Batch]]]:
    """A context of the batches, which a thread moves to the devices ahead of their use."""
    return closing(prefetch((clips, device_batch(clips, options, mesh)) for clips in stream))


def device_batch(clips: ClipBatch, options: StepOptions, mesh: Mesh) -> Batch:
    """This host's clips as its part of the batch that is spread over the mesh."""
    several = jax.process_count() > 1
    parts = len(mesh.local_devices) * options.accumulate
    # Hosts cannot know how many rows the others need, and all need the same shapes.
    packing = pack_rows(clips["num_objects"], parts, options.max_objects, full=several)
    local = Batch(**clips, packing=packing)
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), local)
