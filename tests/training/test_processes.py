"""What several processes say to each other, with the others replaced."""

import jax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from cfbi_jax.training import processes


def test_others_wait_for_the_first_one_for_a_day(monkeypatch):
    """Each time at another barrier."""
    waits = []

    def wait(key, timeout_ms):
        waits.append((key, timeout_ms))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: wait)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda tree: tree)
    assert processes.from_primary(3) == processes.from_primary(3) == 3
    (first, day), (second, _) = waits
    assert first != second and day == 24 * 3600 * 1000


@pytest.mark.parametrize("address", ["host:1234", "host:1234,0", "host:1234,first,2"])
def test_no_address(address):
    with pytest.raises(ValueError, match=f'"{address}"; expected auto or HOST:PORT,NUMBER,COUNT'):
        processes.join(address)


def test_others_that_do_not_come(monkeypatch):
    def initialize(*_, **options):
        assert (options["num_processes"], options["process_id"]) == (4, 1)
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConnectionError, match="--distributed=host:1,1,4: deadline exceeded"):
        processes.join("host:1,1,4")
