"""Memory known before a run, and with --measure beside what the run then takes."""

import argparse
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.measure import MIB, Limits
from benchmarks.networks import block_label, make_model, random_frames, random_variables
from benchmarks.report import Row, make_row
from benchmarks.train import FRAMES, check_batch, make_optimizer, random_batch, step_options
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.segmenter import VideoSegmenter
from cfbi_jax.memory import MemoryPlan
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training.step import (
    create_state,
    make_train_step,
    plan_step,
    replicate,
)

MEASURED_FRAMES = 4  # after those with masks
SAMPLE_SECONDS = 0.002


def plan(arguments: argparse.Namespace) -> tuple[list[Row], Limits | None]:
    """Rows of what exists at the same time, the sum, and with --measure the peak."""
    name, planned, run = (plan_training if arguments.train else plan_inference)(arguments)
    rows = [make_row(name, part, mib=size / MIB) for part, size in planned.parts.items()]
    chunks = {k: v for k, v in planned.chunks._asdict().items() if v is not None}
    rows.append(make_row(name, "planned peak", mib=planned.peak / MIB, **chunks))
    if arguments.measure:
        measured = run()
        rows.append(
            make_row(
                name,
                "measured peak",
                mib=measured / MIB,
                planned_share=planned.peak / measured,
            )
        )
    return rows, None


Measured = tuple[str, MemoryPlan, Callable[[], float]]


def plan_inference(arguments: argparse.Namespace) -> Measured:
    """A video of the size; its first frames have masks of all objects."""
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    options = Options(
        scales=tuple(arguments.scales),
        flip=arguments.flip,
        compute_dtype=arguments.dtype,
        matching_dtype=arguments.matching_dtype,
        memory_mib=arguments.budget_mib,
    )
    segmenter = VideoSegmenter(model, random_variables(model), IMAGENET_FORMAT, options)
    planned = segmenter.plan(arguments.size, arguments.objects, arguments.references)

    def run() -> float:
        frames = random_frames(arguments.references + MEASURED_FRAMES, arguments.size)
        label = block_label(arguments.size, arguments.objects)
        masks = dict.fromkeys(range(arguments.references), label)

        def segment() -> None:
            for _ in segmenter.segment(frames, masks):
                pass

        segment()  # compiles
        with Peak(planned.parts["weights"]) as peak:
            segment()
        return peak.bytes

    return "a video", planned, run


def plan_training(arguments: argparse.Namespace) -> Measured:
    """A step on clips that all have the objects."""
    check_batch(arguments, 1)
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    options, tx = step_options(arguments), make_optimizer()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    num_objects = np.full(arguments.batch, arguments.objects, np.int32)
    shape = (FRAMES, arguments.crop, arguments.crop)
    planned = plan_step(model, IMAGENET_FORMAT, tx, options, mesh, num_objects, shape)

    def run() -> float:
        state = replicate(create_state(random_variables(model), tx, seed=0), mesh)
        batch = random_batch(arguments, mesh)
        step = make_train_step(model, IMAGENET_FORMAT, tx, options, mesh)
        compiled = step.lower(state, batch).compile()
        taken = planned.parts["weights and optimiser"] + planned.parts["clips"]

        def one_step(state):
            state, metrics, prediction = compiled(state, batch)
            jax.block_until_ready((state.step, metrics, prediction))
            return state

        state = one_step(state)  # the program's own code comes into memory, which is no array
        with Peak(taken) as peak:
            one_step(state)
        return peak.bytes

    return "a step", planned, run


class Peak:
    """The largest memory while a block runs: the device's own count, or on a CPU the process'
    growth, sampled, plus `taken`, the bytes of what was there before."""

    def __init__(self, taken: int):
        self._taken = taken
        self.bytes = 0.0

    def __enter__(self) -> "Peak":
        self._on_cpu = jax.default_backend() == "cpu"
        if self._on_cpu:
            gc.collect()
            _return_freed_memory()
            self._before = self._largest = resident_bytes()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._largest = max(self._largest, resident_bytes())
            time.sleep(SAMPLE_SECONDS)

    def __exit__(self, *_: Any) -> None:
        if not self._on_cpu:
            self.bytes = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
            return
        self._stop.set()
        self._thread.join()
        self.bytes = self._largest - self._before + self._taken


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _return_freed_memory() -> None:
    """What compiling has freed would otherwise be used again, unseen."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
