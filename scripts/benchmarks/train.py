"""One training step on random clips: seconds, memory, collectives, share of the products' rate."""

import argparse
import re
import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.convolutions import record, total_flops
from benchmarks.match import global_flops, local_flops
from benchmarks.measure import Limits, Times, compile_program, measure_limits
from benchmarks.networks import (
    block_label,
    embedding_size,
    make_model,
    random_frames,
    random_variables,
)
from benchmarks.report import Row, make_row
from benchmarks.turns import alone
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training import schedule
from cfbi_jax.training.step import (
    FIRST_CURRENT,
    Batch,
    StepOptions,
    create_state,
    make_train_step,
    pack_rows,
    replicate,
)

FRAMES = 5  # of a clip
COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


def step_options(arguments: argparse.Namespace) -> StepOptions:
    return StepOptions(
        max_objects=arguments.objects, accumulate=arguments.accumulate, remat=arguments.remat
    )


def make_optimizer() -> optax.GradientTransformation:
    """The paper's."""
    rate = schedule.learning_rate(0.01, 1000, 100, 1e-5)
    return schedule.optimizer(rate, 15e-5, 0.9, 5.0)


def train(arguments: argparse.Namespace) -> tuple[list[Row], Limits]:
    """A row of the step, and one per kind of collective operation in the compiled step."""
    devices = jax.devices()[: arguments.devices]
    check_batch(arguments, len(devices))
    mesh = Mesh(np.array(devices), ("data",))
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    limits = measure_limits(["float32", arguments.dtype, arguments.matching_dtype], arguments.runs)
    options, tx = step_options(arguments), make_optimizer()
    state = replicate(create_state(random_variables(model), tx, seed=0), mesh)
    batch = random_batch(arguments, mesh)
    step = make_train_step(model, IMAGENET_FORMAT, tx, options, mesh)
    program = compile_program(step, state, batch)
    times, metrics = time_steps(program.call, state, batch, arguments.runs)

    flops = model_flops(model, arguments)
    # Simulated devices share one machine's limit.
    machines = 1 if jax.default_backend() == "cpu" else len(devices)
    least = flops / limits.products[arguments.dtype] / machines
    row = make_row(
        "training step",
        f"{arguments.batch} clips, {len(devices)} devices",
        times,
        program,
        (least, "products"),
        gflop=flops / 1e9,
        clips_per_second=arguments.batch / times.median,
        loss=float(metrics["loss"]),
    )
    return [row, *collective_rows(program.text)], limits


def check_batch(arguments: argparse.Namespace, devices: int) -> None:
    if arguments.crop % 16 != 1:
        raise ValueError(f"--crop is {arguments.crop}; expected 16 k + 1, such as 465")
    wanted = getattr(arguments, "devices", None)
    if wanted and devices < wanted:
        raise ValueError(f"--devices is {wanted}; there are {devices}")
    parts = devices * arguments.accumulate
    if arguments.batch % parts:
        raise ValueError(
            f"--batch is {arguments.batch}; expected a multiple of {parts} "
            f"({devices} devices x --accumulate {arguments.accumulate})"
        )


def random_batch(arguments: argparse.Namespace, mesh: Mesh) -> Batch:
    """Clips of blocks with all objects in every frame, spread over the mesh."""
    count, size = arguments.batch, (arguments.crop, arguments.crop)
    frames = random_frames(count * FRAMES, size).reshape(count, FRAMES, *size, 3)
    label = block_label(size, arguments.objects)
    num_objects = np.full(count, arguments.objects, np.int32)
    batch = Batch(
        frames=frames,
        labels=np.broadcast_to(label, frames.shape[:-1]),
        num_objects=num_objects,
        index=np.arange(count, dtype=np.int32),
        packing=pack_rows(num_objects, mesh.size * arguments.accumulate, arguments.objects),
    )
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


def time_steps(step: Any, state: Any, batch: Batch, runs: int) -> tuple[Times, dict]:
    """Times steps that follow one another, after one to warm up; and the last one's metrics."""
    seconds = []
    with alone():
        for _ in range(1 + runs):
            started = time.perf_counter()
            state, metrics, _ = step(state, batch)  # the old state's memory is reused
            jax.block_until_ready((state.step, metrics))
            seconds.append(time.perf_counter() - started)
    return Times.of(seconds[1:]), metrics


def model_flops(model: CFBI, arguments: argparse.Namespace) -> float:
    """What a step needs, whatever it computes again to save memory: three times the forward
    convolutions (the gradients of input and kernel cost as much each), and matching once."""
    size = embedding_size((arguments.crop, arguments.crop))
    num_rows = 1 + arguments.objects
    shape = jax.ShapeDtypeStruct
    variables = random_variables(model)
    image = shape((1, arguments.crop, arguments.crop, 3), jnp.float32)

    def embed(variables, image):
        return model.apply(variables, image, method=CFBI.embed)

    of_frame, (embedding, low_level) = record(embed, variables, image)
    labels, one = shape((1, *size), jnp.uint8), shape((1,), jnp.int32)

    def segment(variables, embedding, labels, low_level, one):
        return model.apply(
            variables,
            *(embedding[:, None], labels[:, None], one, embedding, labels, embedding),
            *(low_level, one, num_rows),
            method=CFBI.segment,
        )

    of_current, _ = record(segment, variables, embedding, labels, low_level, one)
    currents = FRAMES - FIRST_CURRENT
    of_matching = global_flops(size, 1, model.embedding_dim) + local_flops(size, model)
    convolutions = FRAMES * total_flops(of_frame) + currents * total_flops(of_current)
    return arguments.batch * (3 * convolutions + currents * of_matching)


def collective_rows(text: str) -> list[Row]:
    """How often each kind of exchange between devices occurs in a compiled program, and bytes of
    its results. The gradient should be exchanged once: about as many bytes as it has."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for found in COLLECTIVE.finditer(text):
        counts[found["kind"]] += 1
        sizes[found["kind"]] += sum(_bytes(*shape) for shape in SHAPE.findall(found["shapes"]))
    return [
        make_row("collectives", kind, operations=counts[kind], mib=sizes[kind] / 2**20)
        for kind in sorted(counts)
    ]


def _bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return int(np.prod([int(n) for n in dimensions.split(",") if n])) * bits // 8
