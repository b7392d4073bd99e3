"""A run over several hosts: one process on each, which all do the same."""

import itertools
import logging
import signal
from typing import Any

import jax

LOGGER = logging.getLogger(__name__)

_LONGEST_SECONDS = 24 * 60 * 60  # of an evaluation, which the other processes wait for
_calls = itertools.count()


def join(address: str) -> None:
    """Joins the other processes: `auto` (Slurm, TPU, ...) or `HOST:PORT,NUMBER,COUNT`.

    With an address the process has all devices of its host. With `auto` under Slurm it has one GPU,
    as JAX expects a task for each.

    JAX catches SIGTERM from here on and only remembers it, for the trainings that save on it
    together (`Checkpoints.reached_preemption`); `end_at_sigterm` undoes that.

    Errors: ValueError for another address; ConnectionError where the others do not come.
    """
    try:
        _initialize(address)
    except RuntimeError as error:
        raise ConnectionError(f"--distributed={address}: {error}") from error
    if jax.process_count() == 1:
        end_at_sigterm()
    LOGGER.info(
        "process %d of %d, with %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def end_at_sigterm() -> None:
    """SIGTERM ends the process, as it does without `join`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _initialize(address: str) -> None:
    if address == "auto":
        jax.distributed.initialize()
    else:
        try:
            coordinator, number, count = address.split(",")
            numbers = int(number), int(count)
        except ValueError as error:
            raise ValueError(
                f'--distributed is "{address}"; expected auto or HOST:PORT,NUMBER,COUNT'
            ) from error
        jax.distributed.initialize(
            coordinator,
            num_processes=numbers[1],
            process_id=numbers[0],
            # Or JAX takes one device of eight where it finds itself in a Slurm job.
            cluster_detection_method="deactivate",
        )


def from_primary(tree: Any) -> Any:
    """The first process' arrays or numbers, in all processes; they wait for it, for a day at most.

    They do not wait in the exchange itself, which has limits of its own (half a minute on CPUs).
    """
    if jax.process_count() == 1:
        return tree
    import orbax.checkpoint as ocp
    from jax.experimental import multihost_utils

    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"cfbi_jax.from_primary.{next(_calls)}", timeout_ms=_LONGEST_SECONDS * 1000)
    return multihost_utils.broadcast_one_to_all(tree)
