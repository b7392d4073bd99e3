"""Seconds, memory and the machine's own limits."""

import dataclasses
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.turns import alone
from cfbi_jax.compilation import compiler_options

MIB = 2**20
# Side of the square matrices whose product is timed, and size of the array that is copied:
# enough work that starting it does not count.
PRODUCT_SIDE = {"cpu": 2048, "other": 8192}
COPY_MIB = {"cpu": 128, "other": 256}
# Shorter calls are timed several at a time on accelerators, where starting one takes a while.
SHORT_SECONDS = 5e-3


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of several runs."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function: its compile time (tracing included) and its memory on one device."""

    call: Callable
    compile_seconds: float
    memory_mib: dict[str, float]
    text: str

    @property
    def moved(self) -> float:
        """Bytes of the inputs that it uses and of its outputs."""
        return MIB * (self.memory_mib.get("arguments", 0) + self.memory_mib.get("outputs", 0))


@dataclasses.dataclass(frozen=True)
class Limits:
    """products: floating point operations per second of a square matrix product, by type.
    copies: bytes read and written per second while copying."""

    products: dict[str, float]
    copies: float

    def seconds(self, flops: float, dtype: str, moved: float) -> tuple[float, str]:
        """The least time for this much work, and which of the two limits sets it."""
        by_products, by_copies = flops / self.products[dtype], moved / self.copies
        return max((by_products, "products"), (by_copies, "copies"))


def precise(function: Callable) -> Callable:
    """`function` with the products that the network uses: float32 ones are never TF32."""

    def wrapped(*arguments):
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return wrapped


def compile_program(function: Callable, *arguments: Any) -> Program:
    """Compiles `function` with the package's options, or a function that is jitted already."""
    if not hasattr(function, "lower"):
        function = jax.jit(precise(function), compiler_options=compiler_options())
    started = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - started
    return Program(compiled, seconds, _memory(compiled), compiled.as_text())


def _memory(compiled) -> dict[str, float]:
    analysis = compiled.memory_analysis()
    if analysis is None:  # not every backend has one
        return {}
    return {
        "temporary": analysis.temp_size_in_bytes / MIB,
        "arguments": analysis.argument_size_in_bytes / MIB,
        "outputs": analysis.output_size_in_bytes / MIB,
    }


def time_runs(function: Callable[[], Any], runs: int) -> Times:
    """Times `function`, which waits for its own end, after one run to warm up."""
    seconds = []
    with alone():
        for _ in range(1 + runs):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return Times.of(seconds[1:])


def time_call(function: Callable, *arguments: Any, runs: int) -> Times:
    """Times a computation of JAX, after one run to warm up."""
    return time_in_turns([partial(function, *arguments)], runs)[0]


def time_in_turns(functions: Sequence[Callable[[], Any]], runs: int) -> list[Times]:
    """Times computations of JAX, one run of each after the other, so that a slow minute of the
    machine falls on all of them; after one run each to warm up."""

    def call(function: Callable, repeats: int = 1) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            result = function()
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / repeats

    with alone():
        repeats = []
        for function in functions:
            call(function)
            if jax.default_backend() == "cpu":  # it would run calls that wait side by side
                repeats.append(1)
            else:
                repeats.append(max(1, round(SHORT_SECONDS / call(function))))
        seconds = [list(map(call, functions, repeats)) for _ in range(runs)]
    return [Times.of(of_function) for of_function in zip(*seconds, strict=True)]


def measure_limits(dtypes: Sequence[str], runs: int) -> Limits:
    """The best of several runs each: a limit is what the machine can do when nothing disturbs."""
    kind = "cpu" if jax.default_backend() == "cpu" else "other"
    products = {}
    for dtype in dict.fromkeys(dtypes):
        side = PRODUCT_SIDE[kind]
        if kind == "cpu" and dtype != "float32":  # some CPUs only emulate the others
            side //= 4
        matrix = jnp.ones((side, side), dtype)
        product = compile_program(lambda a, b: a @ b, matrix, matrix)
        products[dtype] = 2 * side**3 / time_call(product.call, matrix, matrix, runs=runs).min
    array = jnp.zeros(COPY_MIB[kind] * MIB // 4, jnp.float32)
    copy = compile_program(lambda x: x + 1, array)
    moved = 2 * array.size * array.dtype.itemsize
    return Limits(products, moved / time_call(copy.call, array, runs=runs).min)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    devices = jax.devices()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],  # before the measurement: others' work
        "platform": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> dict[str, float]:
    """Largest memory so far, in MiB: the process' on the host, and the first device's own."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"host_mib": kib / 1024, **device_memory()}


def device_memory() -> dict[str, float]:
    """The largest so far of the first device's own memory, in MiB; empty for a CPU."""
    found = jax.devices()[0].memory_stats() or {}
    peak = found.get("peak_bytes_in_use")
    return {} if peak is None else {"device_mib": peak / MIB}
