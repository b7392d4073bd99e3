"""One process at a time, by a lock on an open file that ends with the process.

    with open(path, "a") as file:
        if locks.take(file):
            ...

Some network file systems know no locks: there everybody gets it, after a warning.
"""

import fcntl
import logging
from typing import IO

LOGGER = logging.getLogger(__name__)


def take(file: IO, wait: bool = False) -> bool:
    """Takes the lock until the file is closed; without `wait` False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        LOGGER.warning(
            "%s: %s; start one process at a time here", file.name, error.strerror or error
        )
    return True
