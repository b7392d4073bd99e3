"""A thread that fetches the next items while the present one is worked on."""

import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

DEPTH = 2  # items that wait; one more is in the thread's hands

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], patience: float = math.inf) -> Iterator[Item]:
    """Yields `items` in order while a thread, from the first `next` on, fetches those to come.

    An error of `items` is raised after the items before it. A consumer that stops early (closes or
    drops this generator) ends the thread, and `items` is closed if it is a generator; that waits
    for the item being fetched, at most `patience` seconds: the thread ends when it has come.
    """
    # Each entry is (item, None), or (None, error) at the end, StopIteration being the good one.
    ready: queue.Queue = queue.Queue(DEPTH)
    stopped = threading.Event()

    def produce() -> None:
        try:
            iterator = iter(items)
            while not stopped.is_set():
                ready.put((next(iterator), None))
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        except BaseException as error:  # handed to the consumer, whatever it is
            ready.put((None, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        # The thread may wait for room in the queue, for an item and then once more for an error.
        deadline = time.monotonic() + patience
        while thread.is_alive() and time.monotonic() < deadline:
            while not ready.empty():
                ready.get_nowait()
            thread.join(timeout=0.01)
