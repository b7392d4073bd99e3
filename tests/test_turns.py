"""scripts/benchmarks/turns.py: while one benchmark measures, no other does anything."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "scripts" / "benchmarks" / "turns.py"
# Writes the time again and again, and the time at which it begins and ends to measure.
BENCHMARK = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("turns", sys.argv[1])
turns = importlib.util.module_from_spec(spec)
spec.loader.exec_module(turns)

def work(name, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        print(name, time.monotonic(), flush=True)
        time.sleep(0.001)

for _ in range(10**6 if sys.argv[2] == "endless" else 2):
    work("other", 0.1)
    with turns.alone(), turns.alone():  # functions that measure may call one another
        work("measures", 0.1)
        if sys.argv[2] == "fails":
            sys.exit(3)
work("other", 0.1)
"""


@pytest.fixture(scope="module")
def turns():
    spec = importlib.util.spec_from_file_location("turns", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["turns"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["turns"]


@pytest.fixture
def command(turns, tmp_path):
    def command(name, what="", share=0.3):
        program = [sys.executable, "-c", BENCHMARK, str(FILE), what]
        return turns.Command(name, program, share, tmp_path / f"{name}.txt")

    return command


def printed(command):
    """(what, seconds) in order."""
    lines = [line.split() for line in command.output.read_text().splitlines()]
    return [(what, float(at)) for what, at in lines]


def measurements(command):
    """Begin and end of each."""
    lines, found = printed(command), []
    for (before, _), (what, at) in zip([("", 0.0), *lines], lines, strict=False):
        if what == "measures" and before != "measures":
            found.append([at, at])
        elif what == "measures":
            found[-1][1] = at
    return found


def test_one_measures_and_the_others_stand_still(turns, command):
    commands = [command("a"), command("b"), command("c")]
    ended = list(turns.run(commands, jobs=3))
    assert sorted(each.name for each in ended) == ["a", "b", "c"]
    assert all(each.returncode == 0 and each.minutes > 0.005 for each in ended)
    assert all(len(measurements(each)) == 2 for each in commands)
    first, last = zip(*((printed(x)[0][1], printed(x)[-1][1]) for x in commands), strict=True)
    assert max(first) < min(last)  # they did run at the same time
    for each in commands:
        for begin, end in measurements(each):
            others = [at for x in commands if x is not each for _, at in printed(x)]
            assert not [at for at in others if begin + 0.02 < at < end]


def test_no_more_than_there_is_memory_for(turns, command):
    commands = [command("a", share=0.6), command("b", share=0.6), command("c", share=0.4)]
    a, b, c = commands
    for _ in turns.run(commands, jobs=3):
        pass
    assert printed(b)[0][1] > printed(a)[-1][1]
    assert printed(c)[0][1] < printed(a)[-1][1]


def test_one_that_fails_while_it_measures_does_not_hold_up_the_others(turns, command):
    found = {each.name: each.returncode for each in turns.run(
        [command("a", "fails"), command("b")], jobs=2)}  # fmt: skip
    assert found == {"a": 3, "b": 0}


def test_whoever_stops_waiting_leaves_nothing_behind(turns, command):
    commands = [command("a", "fails"), command("b", "endless"), command("c", "endless")]
    for each in turns.run(commands, jobs=3):
        assert each.name == "a"
        break  # closes the generator
    time.sleep(0.1)
    before = [len(printed(each)) for each in commands[1:]]
    time.sleep(0.2)
    assert [len(printed(each)) for each in commands[1:]] == before


RUN_ENDLESS = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import turns
commands = [
    turns.Command(x, [*sys.argv[3:], "endless"], 0.3, pathlib.Path(sys.argv[2]) / x) for x in "abc"
]
list(turns.run(commands, jobs=3))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_goes_on_when_the_program_is_killed(tmp_path, number):
    command = [sys.executable, "-c", RUN_ENDLESS, FILE.parent, tmp_path]
    program = subprocess.Popen([*command, sys.executable, "-c", BENCHMARK, FILE])
    files = [tmp_path / name for name in "abc"]
    while not all(file.exists() and "measures" in file.read_text() for file in files):
        time.sleep(0.01)
    program.send_signal(number)
    program.wait()
    processes = []
    end = time.monotonic() + 20
    while time.monotonic() < end:
        processes = subprocess.run(["pgrep", "-f", f"{FILE} endless"], capture_output=True).stdout
        if not processes:
            break
        time.sleep(0.05)
    assert not processes


def test_a_benchmark_that_was_started_alone_does_not_wait(turns, monkeypatch):
    monkeypatch.delenv(turns.VARIABLE, raising=False)
    with turns.alone():
        pass
