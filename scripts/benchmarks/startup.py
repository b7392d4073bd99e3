"""Start-up: the import, and the first predicted frame of a new process, compiling and not."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Times
from benchmarks.networks import block_label, make_model, random_variables
from benchmarks.report import Row, make_row
from benchmarks.turns import alone
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.weights.checkpoint import save_checkpoint

_NOW = "now"  # stands for the time at which a process is started
IMPORT = "import cfbi_jax; cfbi_jax.VideoSegmenter"
# Run by a new process, which gets the seconds since the epoch at which it was started.
FIRST_FRAME = """
import json, sys, time
started, checkpoint, cache, *size, objects = sys.argv[1:]
import cfbi_jax
sys.path.insert(0, {scripts!r})
from benchmarks.networks import block_label, random_frames
segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(checkpoint, compilation_cache=cache)
loaded = time.time()
size = tuple(map(int, size))
frames = random_frames(2, size)
segmenter.start(frames[0], block_label(size, int(objects)))
segmenter.step(frames[1])
print(json.dumps([loaded - float(started), time.time() - float(started)]))
"""


def startup(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """Rows of the import, of new processes that compile everything (each into a folder of its own),
    and of ones that find all in the first one's folder."""
    block_label(arguments.size, arguments.objects)  # raises what the processes would
    imports = Times.of([_seconds([IMPORT])[0] for _ in range(arguments.runs)])
    rows = [make_row("start-up", "import of VideoSegmenter", imports)]
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/checkpoint"
        save_checkpoint(checkpoint, model, random_variables(model), IMAGENET_FORMAT)
        code = FIRST_FRAME.format(scripts=str(Path(__file__).parents[1]))
        sizes = [str(number) for number in (*arguments.size, arguments.objects)]
        own = [f"{folder}/cache{i}" for i in range(arguments.runs)]
        for name, caches in (
            ("nothing is compiled yet", own),
            ("all is compiled", own[:1] * arguments.runs),
        ):
            loaded, first, compiled = [], [], []
            for cache in caches:
                before = len(os.listdir(cache)) if os.path.isdir(cache) else 0
                _, printed = _seconds([code, _NOW, checkpoint, cache, *sizes])
                seconds = json.loads(printed.splitlines()[-1])
                loaded.append(seconds[0])
                first.append(seconds[1])
                compiled.append(len(os.listdir(cache)) - before)
            rows.append(
                make_row(
                    "start-up",
                    f"first predicted frame, {name}",
                    Times.of(first),
                    weights_loaded_seconds=statistics.median(loaded),
                    programs_compiled=max(compiled),
                )
            )
    return rows, None


def _seconds(command: list[str]) -> tuple[float, str]:
    with alone():
        started = time.time()
        command = [repr(started) if part == _NOW else part for part in command]
        done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"the new process failed: {said[-1]}")
        return time.time() - started, done.stdout
