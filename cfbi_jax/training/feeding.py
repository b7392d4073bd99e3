"""Batches of clips, from the loader to the devices ahead of their use."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cfbi_jax.data.loader import ClipBatch
from cfbi_jax.training.step import Batch, StepOptions, pack_rows

AHEAD = 2  # batches that wait on the devices


@contextlib.contextmanager
def on_devices(
    stream: Iterator[ClipBatch], options: StepOptions, mesh: Mesh
) -> Iterator[Iterator[tuple[ClipBatch, Batch]]]:
    """A thread moves batches to the devices ahead of their use."""
    ready: queue.Queue = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for clips in stream:
                if not put((clips, device_batch(clips, options, mesh))):
                    return
            put(RuntimeError("the stream of clips ended"))
        except BaseException as error:  # raised where the batch is asked for
            put(error)

    def take() -> Iterator[tuple[ClipBatch, Batch]]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()


def device_batch(clips: ClipBatch, options: StepOptions, mesh: Mesh) -> Batch:
    """This host's clips as its part of the batch that is spread over the mesh."""
    several = jax.process_count() > 1
    parts = len(mesh.local_devices) * options.accumulate
    # Hosts cannot know how many rows the others need, and all need the same shapes.
    packing = pack_rows(clips["num_objects"], parts, options.max_objects, full=several)
    local = Batch(**clips, packing=packing)
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), local)
