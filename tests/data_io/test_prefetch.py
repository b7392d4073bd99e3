import threading
import time

import pytest

from cfbi_jax.data.prefetch import prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_the_order_and_runs_ahead():
    fetched = []

    def items():
        for i in range(20):
            fetched.append(i)
            yield i

    stream = prefetch(items())
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(fetched) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(fetched) == 4  # one taken, two in the queue, one in the thread's hands
    assert list(stream) == list(range(1, 20))
    assert not prefetch_threads()


def test_prefetch_raises_errors_after_the_items_before_them():
    def items():
        yield 1
        yield 2
        raise OSError("disk gone")

    taken = []
    with pytest.raises(OSError, match="disk gone"):
        for item in prefetch(items()):
            taken.append(item)
    assert taken == [1, 2]
    assert not prefetch_threads()


def test_a_consumer_that_stops_waits_for_an_item_so_long_and_no_longer():
    more, closed = threading.Event(), threading.Event()

    def items():
        try:
            yield 0
            more.wait(60)
            yield 1
        finally:
            closed.set()

    stream = prefetch(items(), patience=0.1)
    assert next(stream) == 0
    stream.close()
    assert prefetch_threads() and not closed.is_set()
    more.set()
    assert closed.wait(30)  # the thread does what was left to it


def test_prefetch_ends_with_its_consumer_and_closes_its_source():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    source = endless()  # kept here, so that it is not closed by being forgotten
    stream = prefetch(source)
    assert next(stream) == 0
    assert len(prefetch_threads()) == 1
    stream.close()
    assert closed.is_set()
    assert not prefetch_threads()
