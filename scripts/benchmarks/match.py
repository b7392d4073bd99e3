"""Matching alone: ours, the bare products, and plain versions of the same in JAX and torch."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import straightforward
from benchmarks.measure import (
    Limits,
    Times,
    compile_program,
    measure_limits,
    time_call,
    time_in_turns,
    time_runs,
)
from benchmarks.networks import block_label, embedding_size, make_model
from benchmarks.report import Row, make_row
from cfbi_jax.models import matching_global, matching_local
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import network_size

TOLERANCE = 1e-3  # of biased distances, which lie between -1 and 1
SWEPT_OBJECTS = (1, 2, 5, 10)
SWEPT_REFERENCES = (1, 2, 4, 8)
# The bare product runs over tiles, so that it never needs the memory of the whole matrix.
PRODUCT_CHUNK, PRODUCT_TILE = 32768, 256


class Inputs(NamedTuple):
    """One video: embeddings as a ReLU leaves them, labels of blocks, the biases of all rows."""

    query: np.ndarray  # [h, w, c]
    reference: np.ndarray  # [r, h, w, c]
    reference_label: np.ndarray  # [r, h, w]
    previous: np.ndarray  # [h, w, c]
    previous_label: np.ndarray  # [h, w]
    bias: np.ndarray  # [rows]


def make_inputs(size: tuple[int, int], channels: int, objects: int, references: int) -> Inputs:
    rng = np.random.default_rng(0)

    def embedding(*shape):  # distances around 0.7, where the sigmoid is not flat
        scale = 1 / np.sqrt(channels)
        return np.maximum(scale * rng.standard_normal((*shape, channels)), 0).astype(np.float32)

    label = block_label(size, objects)
    return Inputs(
        embedding(*size),
        embedding(references, *size),
        np.stack([np.roll(label, i, axis=0) for i in range(references)]),
        embedding(*size),
        label,
        np.linspace(-0.1, 0.1, 1 + objects, dtype=np.float32),
    )


# ------------------------------------------------------------------------- the functions compared


def our_global(inputs: Inputs, dtype: str):
    x = inputs
    args = x.query[None], x.reference[None], x.reference_label[None], x.bias
    return matching_global.global_matching(*args, dtype=dtype)[0]


def our_local(inputs: Inputs, dtype: str, model: CFBI):
    x = inputs
    args = x.query[None], x.previous[None], x.previous_label[None], x.bias, model.windows
    return matching_local.local_matching(*args, downsample=model.local_downsample, dtype=dtype)[0]


def plain_global(inputs: Inputs, dtype: str):
    x = inputs
    query, reference = x.query.astype(dtype), x.reference.astype(dtype)
    return straightforward.global_matching(query, reference, x.reference_label, x.bias)


def plain_local(inputs: Inputs, dtype: str, model: CFBI):
    x = inputs
    args = x.query, x.previous, x.previous_label, x.bias, model.windows, model.local_downsample
    return straightforward.local_matching(*args, dtype)


def torch_global(inputs, dtype: str):
    torch, x = straightforward.import_torch(), inputs
    query, reference = (a.to(getattr(torch, dtype)) for a in (x.query, x.reference))
    return straightforward.torch_global_matching(query, reference, x.reference_label, x.bias)


def torch_local(inputs, dtype: str, model: CFBI):
    x = inputs
    args = x.query, x.previous, x.previous_label, x.bias, model.windows, model.local_downsample
    return straightforward.torch_local_matching(*args, dtype)


def check_same(name: str, ours, other) -> None:
    """Raises AssertionError where another version's numbers differ from ours."""
    np.testing.assert_allclose(
        np.asarray(other),
        np.asarray(ours),
        rtol=0,
        atol=TOLERANCE,
        err_msg=f"{name} and cfbi_jax.models.matching give different distances",
    )


# ------------------------------------------------------------------------------------------ rows


def match(arguments: argparse.Namespace) -> tuple[list[Row], Limits]:
    """Rows of global and local matching at a network's embedding size."""
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    if arguments.torch:
        straightforward.torch_device()
    limits = measure_limits(["float32", arguments.matching_dtype], arguments.runs)
    rows = [
        *global_rows(arguments, model, limits, arguments.objects, arguments.references),
        *local_rows(arguments, model, limits, arguments.objects),
    ]
    if matching_global.blocks_here(arguments.matching_dtype, model.embedding_dim):
        rows.insert(1, without_kernel_row(arguments, model, limits, rows[0]))
    if arguments.sweep:
        rows += sweep(arguments, model, limits)
    return rows, limits


def sweep(arguments: argparse.Namespace, model: CFBI, limits: Limits) -> Iterator[Row]:
    """Our forward passes for other numbers of objects, and of references, each sweep in turns and
    compared with its first case. (The straightforward versions take a time for each of both:
    minutes at a time on a CPU.)"""
    size, dtype = embedding_size(network_size(arguments.size)), arguments.matching_dtype
    of_local = local_flops(size, model)

    def of_global(references):
        return global_flops(size, references, model.embedding_dim)

    by_objects = [(objects, arguments.references) for objects in SWEPT_OBJECTS]
    by_references = [(arguments.objects, references) for references in SWEPT_REFERENCES]
    for name, ours, flops, cases in (
        ("global matching", our_global, of_global, by_objects),
        ("local matching", partial(our_local, model=model), lambda _: of_local, by_objects),
        ("global matching", our_global, of_global, by_references),
    ):
        inputs = [jax.device_put(make_inputs(size, model.embedding_dim, *case)) for case in cases]
        programs = [compile_program(partial(ours, dtype=dtype), x) for x in inputs]
        calls = [partial(program.call, x) for program, x in zip(programs, inputs, strict=True)]
        times = time_in_turns(calls, arguments.runs)
        for case, program, of_case in zip(cases, programs, times, strict=True):
            figures = dict(zip(("objects", "references"), case, strict=True))
            figures["gflop"] = flops(case[1]) / 1e9
            figures["times_first"] = of_case.median / times[0].median
            limit = limits.seconds(flops(case[1]), dtype, program.moved)
            yield make_row("sweep", name, of_case, program, limit, **figures)


def global_rows(
    arguments: argparse.Namespace, model: CFBI, limits: Limits, objects: int, references: int
) -> list[Row]:
    size = embedding_size(network_size(arguments.size))
    inputs = make_inputs(size, model.embedding_dim, objects, references)
    flops = global_flops(size, references, model.embedding_dim)
    figures = dict(objects=objects, references=references)
    row = partial(_stage_row, arguments, limits, "global matching", flops, figures, inputs)
    rows = row(our_global, plain_global, torch_global)
    if arguments.straightforward:
        rows.insert(1, _product_row(arguments, limits, inputs, flops, rows[0], figures))
    return rows


def local_rows(
    arguments: argparse.Namespace, model: CFBI, limits: Limits, objects: int
) -> list[Row]:
    size = embedding_size(network_size(arguments.size))
    inputs = make_inputs(size, model.embedding_dim, objects, 1)
    flops = local_flops(size, model)
    row = partial(_stage_row, arguments, limits, "local matching", flops, dict(objects=objects))
    functions = (partial(f, model=model) for f in (our_local, plain_local, torch_local))
    return row(inputs, *functions)


def global_flops(size: tuple[int, int], references: int, channels: int) -> float:
    """Of the products of all queries with all reference pixels."""
    pixels = size[0] * size[1]
    return 2.0 * pixels * pixels * references * channels


def local_flops(size: tuple[int, int], model: CFBI) -> float:
    """Of the products of every pixel with all of its largest window."""
    height, width = (side // 2 + 1 for side in size) if model.local_downsample else size
    return 2.0 * height * width * (2 * max(model.windows) + 1) ** 2 * model.embedding_dim


def _stage_row(
    arguments: argparse.Namespace,
    limits: Limits,
    section: str,
    flops: float,
    figures: dict,
    inputs: Inputs,
    ours: Callable,
    plain: Callable,
    in_torch: Callable,
) -> list[Row]:
    """Ours, forward and backward, and what it has to beat, whose numbers are compared first."""
    dtype, runs = arguments.matching_dtype, arguments.runs
    on_device = jax.device_put(inputs)
    program = compile_program(partial(ours, dtype=dtype), on_device)
    times = time_call(program.call, on_device, runs=runs)
    limit = limits.seconds(flops, dtype, program.moved)
    figures = figures | {"gflop": flops / 1e9}
    rows = [make_row(section, "ours", times, program, limit, **figures)]
    if arguments.backward:
        rows.append(_backward_row(section, ours, on_device, dtype, runs, times, figures))
    if not arguments.straightforward and not arguments.torch:
        return rows
    # Half-precision distances differ by rounding, so the versions are compared in float32.
    exact = compile_program(partial(ours, dtype="float32"), on_device).call(on_device)
    if arguments.straightforward:
        in_float32 = compile_program(partial(plain, dtype="float32"), on_device)
        check_same(f"straightforward {section}", exact, in_float32.call(on_device))
        program = in_float32
        if dtype != "float32":
            program = compile_program(partial(plain, dtype=dtype), on_device)
        other = time_call(program.call, on_device, runs=runs)
        figures["times_ours"] = other.median / times.median
        rows.append(make_row(section, "straightforward in JAX", other, program, limit, **figures))
    if arguments.torch:
        other = _torch_times(section, in_torch, inputs, dtype, exact, runs)
        figures["times_ours"] = other.median / times.median
        rows.append(make_row(section, "straightforward in torch", other, None, limit, **figures))
    return rows


def _backward_row(section, ours, inputs, dtype, runs, forward: Times, figures) -> Row:
    """Forward and backward, with respect to all embeddings and the biases."""

    def loss(embeddings, inputs):
        return jnp.sum(ours(inputs._replace(**embeddings), dtype=dtype))

    names = ("query", "reference", "previous", "bias")
    embeddings = {name: getattr(inputs, name) for name in names}
    program = compile_program(jax.grad(loss), embeddings, inputs)
    times = time_call(program.call, embeddings, inputs, runs=runs)
    figures = figures | {"times_ours": times.median / forward.median}
    return make_row(section, "ours, forward and backward", times, program, **figures)


def _torch_times(section, in_torch, inputs: Inputs, dtype, exact, runs: int) -> Times:
    torch = straightforward.import_torch()
    device = straightforward.torch_device()
    tensors = Inputs(*(torch.from_numpy(x).to(device) for x in inputs))

    def call(dtype):
        with torch.no_grad():
            result = in_torch(tensors, dtype=dtype)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    check_same(f"{section} in torch", exact, call("float32").cpu())
    return time_runs(lambda: call(dtype), runs)


def without_kernel_row(
    arguments: argparse.Namespace, model: CFBI, limits: Limits, ours: Row
) -> Row:
    """Global matching as on GPUs that the kernel is not for."""
    size = embedding_size(network_size(arguments.size))
    inputs = make_inputs(size, model.embedding_dim, arguments.objects, arguments.references)
    on_device, dtype = jax.device_put(inputs), arguments.matching_dtype
    with_kernel = compile_program(partial(our_global, dtype="float32"), on_device)
    with mock.patch.object(matching_global, "blocks_here", lambda *_: None):
        program = in_float32 = compile_program(partial(our_global, dtype="float32"), on_device)
        if dtype != "float32":
            program = compile_program(partial(our_global, dtype=dtype), on_device)
    name, exact = "global matching", with_kernel.call(on_device)
    check_same(f"{name} without the kernel", exact, in_float32.call(on_device))
    times = time_call(program.call, on_device, runs=arguments.runs)
    flops = global_flops(size, arguments.references, model.embedding_dim)
    limit = limits.seconds(flops, dtype, program.moved)
    ratio = times.median / ours["seconds"]["median"]
    figures = dict(objects=arguments.objects, references=arguments.references, times_ours=ratio)
    return make_row(name, "ours without the kernel", times, program, limit, **figures)


def _product_row(
    arguments: argparse.Namespace,
    limits: Limits,
    inputs: Inputs,
    flops: float,
    ours: Row,
    figures: dict,
) -> Row:
    """The products of all queries with all reference pixels, and nothing done with them."""
    dtype, channels = arguments.matching_dtype, inputs.query.shape[-1]

    def pieces(x, length):
        x = jnp.asarray(x, dtype).reshape(-1, channels)
        length = min(length, len(x))
        return jnp.pad(x, ((0, -len(x) % length), (0, 0))).reshape(-1, length, channels)

    queries = pieces(inputs.query, PRODUCT_CHUNK)
    tiles = pieces(inputs.reference, PRODUCT_TILE)

    def products(queries, tiles):
        def one_tile(carry, pair):
            last, query = carry
            return (query @ pair.T, query), None

        def one_chunk(last, query):
            (last, _), _ = jax.lax.scan(one_tile, (last, query), tiles)
            return last, None

        start = jnp.zeros((queries.shape[1], tiles.shape[1]), dtype)
        return jax.lax.scan(one_chunk, start, queries)[0]

    program = compile_program(products, queries, tiles)
    times = time_call(program.call, queries, tiles, runs=arguments.runs)
    limit = limits.seconds(flops, dtype, program.moved)
    figures = figures | {
        "gflop": flops / 1e9,
        "times_ours": times.median / ours["seconds"]["median"],
    }
    return make_row("global matching", "the products alone", times, program, limit, **figures)
