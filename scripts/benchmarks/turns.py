"""Several benchmarks at a time: most of their time is compiling, which may go on side by side, but
while one of them measures, all others stand still.

    with alone():                # in a benchmark, around what is timed
        ...
    run(commands, jobs=8)        # in the program that starts them
"""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Two file descriptors of a benchmark that has neighbours: to read from, to write to.
VARIABLE = "CFBI_JAX_BENCHMARK_TURNS"
_ASK, _GO, _DONE = b"?", b"!", b"."
_POLL_SECONDS = 0.1
_inside = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits for this benchmark's turn to measure; nothing to wait for if it was started alone."""
    global _inside
    if VARIABLE not in os.environ or _inside:
        yield
        return
    reads, writes = map(int, os.environ[VARIABLE].split(","))
    os.write(writes, _ASK)
    os.read(reads, 1)
    _inside = True
    try:
        yield
    finally:
        _inside = False
        os.write(writes, _DONE)


@dataclass
class Command:
    """A benchmark to run.

    Attributes:
      name: of it.
      arguments: program and arguments.
      share: of the accelerator's memory, which its process gets.
      output: file for what it prints.
      returncode, minutes: set when it has ended.
    """

    name: str
    arguments: Sequence[str]
    share: float
    output: Path
    returncode: int | None = None
    minutes: float = 0.0


@dataclass
class _Running:
    command: Command
    process: subprocess.Popen
    asks: int  # file descriptors: what it writes, what it reads
    answers: int
    started: float = field(default_factory=time.perf_counter)
    stands_still: bool = False

    def stand_still(self, still: bool) -> None:
        if still != self.stands_still:
            self.send(signal.SIGSTOP if still else signal.SIGCONT)
            self.stands_still = still

    def send(self, number: signal.Signals) -> None:
        """To the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run(commands: Sequence[Command], jobs: int) -> Iterator[Command]:
    """Runs up to `jobs` commands at a time, as far as their shares of the memory allow, and yields
    each when it has ended. If it is closed before, it kills those that run."""
    waiting, running, queue = list(commands), [], deque()
    measuring: _Running | None = None
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while measuring is None and (command := _next(waiting, running, jobs)):
                    waiting.remove(command)
                    running.append(_start(command, selector, shared=jobs > 1))
                for key, _ in selector.select(_POLL_SECONDS):
                    for byte in os.read(key.fd, 64):
                        if bytes([byte]) == _ASK:
                            queue.append(key.data)
                        elif measuring is key.data:
                            measuring = None
                for each in [each for each in running if each.process.poll() is not None]:
                    each.send(signal.SIGKILL)  # what it may have left behind
                    running.remove(each)
                    selector.unregister(each.asks)
                    os.close(each.asks)
                    os.close(each.answers)
                    queue = deque(other for other in queue if other is not each)
                    measuring = None if measuring is each else measuring
                    each.command.returncode = each.process.returncode
                    each.command.minutes = (time.perf_counter() - each.started) / 60
                    yield each.command
                asked = measuring is None and bool(queue)
                if asked:
                    measuring = queue.popleft()
                for each in running:
                    each.stand_still(measuring not in (None, each))
                if asked:
                    with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile
                        os.write(measuring.answers, _GO)
        finally:
            for each in running:
                each.send(signal.SIGKILL)
                each.process.wait()


def _next(waiting: list[Command], running: list[_Running], jobs: int) -> Command | None:
    """The first command that there is room for."""
    room = 1.0 - sum(each.command.share for each in running)
    fitting = (command for command in waiting if command.share <= room + 1e-6)
    return next(fitting, None) if len(running) < jobs else None


def _start(command: Command, selector: selectors.BaseSelector, shared: bool) -> _Running:
    answers_read, answers_write = os.pipe()
    asks_read, asks_write = os.pipe()
    environment = os.environ | {VARIABLE: f"{answers_read},{asks_write}"}
    if shared:  # else it gets what JAX takes by default
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{command.share:.3f}"
    command.output.parent.mkdir(parents=True, exist_ok=True)
    with command.output.open("wb") as output:
        process = subprocess.Popen(
            command.arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(answers_read, asks_write),
            # A group of its own, of this session: if we are killed, the kernel wakes and ends those
            # of its groups that stand still; the others end when they ask for their turn.
            process_group=0,
        )
    os.close(answers_read)
    os.close(asks_write)
    running = _Running(command, process, asks_read, answers_write)
    selector.register(asks_read, selectors.EVENT_READ, running)
    return running
