"""Inference: every stage of a frame alone, and whole videos."""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import convolutions
from benchmarks.convolutions import Convolution
from benchmarks.match import global_flops, global_rows, local_flops, local_rows
from benchmarks.measure import (
    Limits,
    Times,
    compile_program,
    device_memory,
    measure_limits,
    peak_memory,
    time_call,
    time_runs,
)
from benchmarks.networks import block_label, make_model, random_frames, random_variables
from benchmarks.report import Row, make_row
from benchmarks.straightforward import torch_device
from benchmarks.torch_backbone import torch_backbone
from benchmarks.turns import alone
from cfbi_jax.data import image_files
from cfbi_jax.inference import test_time
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.segmenter import VideoSegmenter
from cfbi_jax.inference.state import padded_references, padded_rows
from cfbi_jax.inference.video import MaskWriter, read_frames
from cfbi_jax.models import matching, matching_global, matching_local
from cfbi_jax.models.attention import instance_vector
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.models.resizing import resize_labels


def infer(arguments: argparse.Namespace) -> tuple[list[Row], Limits]:
    """Rows of the stages, of their convolutions alone, and of whole videos."""
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    label = block_label(arguments.size, arguments.objects)
    if arguments.torch:
        torch_device()
    variables = jax.device_put(random_variables(model))
    # First, as a device only tells the largest memory that it has ever used.
    whole = video_rows(arguments, model, variables, label)
    limits = measure_limits(["float32", arguments.dtype, arguments.matching_dtype], arguments.runs)
    stages = Stages(arguments.runs, limits)
    rows = stages.rows
    if arguments.stages:
        time_stages(stages, model, variables, label, arguments.references)
    if arguments.convolutions:  # of the stages that there are
        rows += stages.convolution_rows()
    if arguments.torch and model.backbone == "resnet101" and arguments.dtype == "float32":
        rows.append(torch_backbone_row(arguments, model, variables, rows))
    if arguments.straightforward or arguments.torch:
        rows += global_rows(arguments, model, limits, arguments.objects, arguments.references)
        rows += local_rows(arguments, model, limits, arguments.objects)
    return rows + whole, limits


# ---------------------------------------------------------------------------------------- stages


class Stages:
    """Compiles and times one stage after the other; `rows` has a line for each."""

    def __init__(self, runs: int, limits: Limits):
        self.rows: list[Row] = []
        self._runs, self._limits = runs, limits
        self._convolutions: list[tuple[str, Counter[Convolution], float]] = []

    def time(
        self,
        name: str,
        dtype: str,
        function: Callable,
        *arguments: Any,
        matching_flops: float = 0.0,
        whole: bool = False,
    ) -> Any:
        """Returns the stage's result. Operations are those of its convolutions, and
        `matching_flops`; `whole`: it consists of other stages."""
        found, _ = convolutions.record(function, *arguments)
        program = compile_program(function, *arguments)
        times = time_call(program.call, *arguments, runs=self._runs)
        result = program.call(*arguments)
        flops = convolutions.total_flops(found) + matching_flops
        if found and not whole:
            self._convolutions.append((name, found, times.median))
        limit = self._limits.seconds(flops, dtype, program.moved)
        self.rows.append(make_row("stages", name, times, program, limit, gflop=flops / 1e9))
        return result

    def time_host(self, name: str, function: Callable[[], Any]) -> None:
        self.rows.append(make_row("stages", name, time_runs(function, self._runs)))

    def convolution_rows(self) -> Iterator[Row]:
        """The sum of a stage's convolutions, each timed alone, as a share of the stage."""
        for name, found, seconds in self._convolutions:
            alone, details = convolutions.seconds_alone(found, min(self._runs, 3))
            yield make_row(
                "convolutions alone",
                name,
                convolutions=sum(found.values()),
                distinct=len(found),
                milliseconds_alone=1e3 * alone,
                milliseconds_of_stage=1e3 * seconds,
                share_of_stage=alone / seconds,
                details=details,
            )


def time_stages(
    stages: Stages, model: CFBI, variables: Any, label: np.ndarray, references: int
) -> None:
    """A frame's way through the network, with the shapes that `VideoSegmenter` compiles for, but
    all object rows and lines at once, of which it takes fewer where memory is short."""
    dtype, matching_dtype = (jnp.dtype(x).name for x in (model.compute_dtype, model.matching_dtype))
    video_size, objects = label.shape, int(label.max())
    num_rows, num_objects = padded_rows(objects), jnp.full(1, objects, jnp.int32)
    (view,) = test_time.views_of(video_size, (1.0,), False, None)
    frame = random_frames(1, video_size)[0]

    # ---- What depends on the frame alone ----
    prepare = partial(test_time.view_frame, view=view, image_format=IMAGENET_FORMAT)
    images = stages.time("prepare", "float32", prepare, jnp.asarray(frame))
    backbone = partial(model.apply, method=lambda model, x: model.deeplab(x))
    features, low_level = stages.time("backbone", dtype, backbone, variables, images)
    embed = partial(model.apply, method=lambda model, x: model.pixel_embedding(x))
    embedding = stages.time("embedding", dtype, embed, variables, features)
    embedding, low_level = embedding.astype(jnp.float32), low_level.astype(jnp.float32)

    # ---- Matching; mirror images stand for other frames, whose distances are not all zero ----
    size, channels = embedding.shape[1:3], embedding.shape[3]
    used = padded_references(references)
    reference = jnp.broadcast_to(embedding[:, None, :, ::-1], (1, used, *embedding.shape[1:]))
    small = resize_labels(jnp.asarray(label)[None], size)
    reference_label = jnp.broadcast_to(small[:, None], (1, used, *size))
    reference_label = reference_label.at[:, references:].set(matching.NOBODY)
    previous, bias = embedding[:, ::-1], jnp.zeros(num_rows)
    of_global = global_flops(size, references, channels)
    stages.time(
        "global matching",
        matching_dtype,
        partial(matching_global.global_matching, dtype=model.matching_dtype),
        *(embedding, reference, reference_label, bias),
        matching_flops=of_global,
    )
    of_local = local_flops(size, model)
    match_locally = partial(
        matching_local.local_matching,
        windows=model.windows,
        downsample=model.local_downsample,
        dtype=model.matching_dtype,
    )
    arrays = embedding, previous, small, bias
    stages.time("local matching", matching_dtype, match_locally, *arrays, matching_flops=of_local)

    # ---- The head ----
    vectors = partial(instance_vector, num_rows=num_rows, background=model.instance_background)
    arrays = reference, reference_label, jnp.ones((1, used)), previous, small
    vector = stages.time("instance vector", "float32", vectors, *arrays)[0]
    depth = channels * (2 + model.pixel_background) + model.matching_dim
    stacked = jax.random.normal(jax.random.key(0), (num_rows, *size, depth), model.compute_dtype)
    stages.time(
        "ensembler",
        dtype,
        partial(model.apply, method=lambda model, *x: model.ensembler(*x)),
        *(variables, stacked, jnp.repeat(low_level, num_rows, axis=0)),
        vector if model.instance_attention else None,
    )
    count = jnp.full(1, references, jnp.int32)
    logits = stages.time(
        "from matching to ensembler",
        dtype,
        partial(model.apply, num_rows=num_rows, method=CFBI.segment),
        *(variables, reference, reference_label, count, previous, small, embedding, low_level),
        num_objects,
        matching_flops=of_global + of_local,
        whole=True,
    )

    def output(logits, num_objects):
        lines = video_size[0]
        return test_time.most_likely_rows([logits[0]], [view], video_size, num_objects, lines)

    stages.time("resize, softmax, arg-max", "float32", output, logits, num_objects[0])

    # ---- Files ----
    with tempfile.TemporaryDirectory() as folder:
        picture, mask = Path(folder) / "00000.jpg", Path(folder) / "00000.png"
        image_files.write_image(picture, frame)
        stages.time_host("decode a JPEG", partial(image_files.read_frame, picture))
        stages.time_host("write a mask", partial(image_files.write_mask, mask, label))


def torch_backbone_row(
    arguments: argparse.Namespace, model: CFBI, variables: Any, rows: list[Row]
) -> Row:
    """The same written plainly in torch, after a look at its numbers."""
    (view,) = test_time.views_of(arguments.size, (1.0,), False, None)
    images = np.random.default_rng(0).standard_normal((1, *view.size, 3)).astype(np.float32)
    backbone = partial(model.apply, method=lambda model, x: model.deeplab(x))
    ours = compile_program(backbone, variables, images).call(variables, images)
    plain = torch_backbone(model, jax.device_get(variables), images, torch_device())
    for expected, found in zip(ours, plain(), strict=True):
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found.cpu(), expected, rtol=0, atol=1e-3 * scale)
    times = time_runs(plain, arguments.runs)
    ratio = times.median / stage_row(rows, "backbone")["seconds"]["median"]
    return make_row("stages", "backbone in torch", times, times_ours=ratio)


def stage_row(rows: list[Row], name: str) -> Row:
    """The stage of that name; its convolutions alone have a row of the same name."""
    (found,) = (row for row in rows if (row["section"], row["name"]) == ("stages", name))
    return found


# ---------------------------------------------------------------------------------- whole videos


def video_rows(
    arguments: argparse.Namespace, model: CFBI, variables: Any, label: np.ndarray
) -> list[Row]:
    """`VideoSegmenter` on frames in memory, and from JPEG files to mask files. The device's memory
    is the largest so far, tuning included."""
    references, runs = arguments.references, arguments.runs
    warm = references + 1  # frames until the program for all references is there
    frames = random_frames(warm + runs, arguments.size)
    masks = {i: label for i in range(references)}
    options = Options(compute_dtype=arguments.dtype, matching_dtype=arguments.matching_dtype)
    segmenter = VideoSegmenter(model, variables, IMAGENET_FORMAT, options)

    def segment(times: list[float]) -> tuple[float, float]:
        """Seconds in all, and for the frames after the warm ones."""
        started = time.perf_counter()
        labels = segmenter.segment(frames, masks, times=times)
        at_work = _after(warm, labels, lambda i, found: None)
        ended = time.perf_counter()
        return ended - started, ended - at_work

    times: list[float] = []
    compile_seconds, _ = segment([])
    with alone():
        seconds, steady = segment(times)
    compile_seconds -= seconds
    per_frame = Times.of(times[warm:])
    in_memory = make_row(
        "whole videos",
        "a frame, in memory",
        per_frame,
        compile_seconds=compile_seconds,
        compilations=segmenter.programs.num_compilations,
        frames_per_second=runs / steady,
        process_mib=peak_memory()["host_mib"],
        **device_memory(),
    )
    with tempfile.TemporaryDirectory() as folder:
        source, results = Path(folder) / "frames", Path(folder) / "masks"
        for i, frame in enumerate(frames):
            image_files.write_image(source / f"{i:05d}.jpg", frame)

        def from_files() -> float:
            with MaskWriter() as writer:
                labels = segmenter.segment(read_frames(source), masks)
                at_work = _after(
                    warm, labels, lambda i, found: writer.write(results / f"{i:05d}.png", found)
                )
            return time.perf_counter() - at_work

        with alone():
            seconds = Times.of([from_files() for _ in range(min(runs, 3))])
    name = f"{runs} frames, JPEG files to mask files"
    row = make_row("whole videos", name, seconds, frames_per_second=runs / seconds.median)
    return [in_memory, row]


def _after(warm: int, labels: Iterable[np.ndarray], use: Callable) -> float:
    """Uses all labels, of more than `warm` frames. Returns when that of the last warm one came,
    which is when the device began with the next frame."""
    for i, found in enumerate(labels):
        if i == warm - 1:
            at_work = time.perf_counter()
        use(i, found)
    return at_work
