"""How much memory a run needs, known before it begins: from compiled programs, which say it.

    segmenter.plan((2160, 3840), num_objects=10, num_references=4)      # propagation
    training.step.plan_step(...)                                        # a step of training

Nothing is allocated but the weights. The numbers are those of the device that compiles.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cfbi_jax.compilation import on_cpu

MIB = 2**20
# Of a device's memory, what arrays may take by default; the rest is for the allocator's gaps.
DEVICE_SHARE = 0.8
CPU_BUDGET = 1024 * MIB
# float32 numbers that the head holds at once per pixel and row, in units of its input's channels:
# the largest of several networks and sizes, by `scripts/benchmark.py plan`.
HEAD_COPIES = 4.0
# Copies of the logits of a line at the video's own size: before and after softmax, their sum, and
# on CPUs the workspace of the library that computes the product with the interpolation matrix,
# which is in no analysis of the compiled program.
LINE_COPIES = 6
LIBRARY_COPIES = 2
# What the lines of the output may take at most.
LINES_ROOM = 256 * MIB
LEAST_LINES = 8  # fewer at a time would take longer and spare next to nothing


class Chunks(NamedTuple):
    """How much is computed at once: object rows of the head, lines of the output. None: all."""

    rows_at_once: int | None = None
    lines_at_once: int | None = None


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, all of which exist at the same time, and how they are bounded."""

    parts: Mapping[str, int]
    chunks: Chunks = Chunks()

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in self.parts.items())
        return f"{self.peak / MIB:.0f} MiB ({parts})"


@contextlib.contextmanager
def explained(what_helps: str) -> Iterator[None]:
    """Raises MemoryError, with what helps, where the device's memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"out of device memory; {what_helps}\n{error}") from error


def tree_bytes(tree: Any) -> int:
    """Size of all arrays of a tree (or of their shapes)."""
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def working_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program takes beside its arguments while it runs."""
    analysis = compiled.memory_analysis()
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + new_outputs


def default_budget(device: jax.Device) -> int:
    """Bytes that propagation may take: most of the device's memory, 1 GiB of a CPU's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(DEVICE_SHARE * stats["bytes_limit"])
    return CPU_BUDGET


def row_bytes(head_channels: int, pixels: int) -> float:
    """What the head takes for one row of so many pixels."""
    return 4 * HEAD_COPIES * head_channels * pixels


def choose_chunks(room: int, row: float, num_rows: int, size: tuple[int, int]) -> Chunks:
    """The largest chunks, of equal size, that fit into `room` bytes.

    Args:
      row: `row_bytes`.
      size: (height, width) of the video.
    """

    def equal_parts(room: int, count: int, bytes_of_one: int | float, least: int = 1) -> int | None:
        fit = max(least, int(room / bytes_of_one))
        return None if fit >= count else -(-count // -(-count // fit))

    lines_room = min(room, LINES_ROOM)
    return Chunks(
        equal_parts(room, num_rows, row),
        equal_parts(lines_room, size[0], 4 * LINE_COPIES * num_rows * size[1], LEAST_LINES),
    )


def library_bytes(num_rows: int, lines: int, width: int) -> int:
    """What interpolating `lines` of logits takes beside the program's own memory."""
    if not on_cpu():
        return 0
    return 4 * LIBRARY_COPIES * num_rows * lines * width
