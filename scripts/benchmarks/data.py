"""What the host does around the network: scoring masks, and making training clips."""

import argparse
import os
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks.measure import Times, time_runs
from benchmarks.report import Row, make_row
from benchmarks.turns import alone
from cfbi_jax.config import source
from cfbi_jax.data import loader
from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.data.image_files import write_mask
from cfbi_jax.data.loader import Clips
from cfbi_jax.data.sources import clip_source
from cfbi_jax.data.synthetic import SyntheticVideos, synthetic_video
from cfbi_jax.evaluation import metrics, predictions
from cfbi_jax.training.step import pack_rows

SHIFT = 3  # pixels that a predicted mask is off: within the tolerance of F for some, not for all
WARM_UP_BATCHES = 2


# --------------------------------------------------------------------------------------- scoring


def score(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """J and F of shifted masks, with one thread and with all, from memory and from files."""
    size, objects, runs = arguments.size, arguments.objects, arguments.runs
    _, truth = synthetic_video(0, arguments.frames, size, objects)
    predicted = np.roll(truth, SHIFT, axis=2)
    ids = tuple(range(1, objects + 1))
    of_frame = partial(metrics.score_objects, object_ids=ids)
    rows = []
    for threads in thread_counts():

        def in_memory(threads=threads):
            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(of_frame, predicted, truth))

        times = time_runs(in_memory, runs)
        rows.append(_score_row("J and F in memory", threads, times, len(truth) * objects))
    with tempfile.TemporaryDirectory() as folder:
        pairs = _write_pairs(Path(folder), predicted, truth, ids)
        for threads in thread_counts():

            def from_files(threads=threads):
                return predictions.score_frames(pairs, threads)

            times = time_runs(from_files, runs)
            rows.append(_score_row("J and F of files", threads, times, len(truth) * objects))
    for one, several in (rows[:2], rows[2:]) if len(rows) == 4 else ():
        several["times_one_thread"] = one["seconds"]["median"] / several["seconds"]["median"]
    return rows, None


def thread_counts() -> list[int]:
    """One, and one per core."""
    return list(dict.fromkeys((1, os.cpu_count() or 1)))


def _score_row(name: str, threads: int, times: Times, scored: int) -> Row:
    rate = scored / times.median
    return make_row(
        "scoring", name, times, None, None, threads=threads, frames_x_objects_per_second=rate
    )


def _write_pairs(
    folder: Path, predicted: np.ndarray, truth: np.ndarray, ids: tuple[int, ...]
) -> list[predictions.FramePair]:
    pairs = []
    for i, labels in enumerate(zip(predicted, truth, strict=True)):
        paths = [folder / kind / f"{i:05d}.png" for kind in ("predicted", "truth")]
        for path, label in zip(paths, labels, strict=True):
            write_mask(path, label)
        pairs.append(predictions.FramePair(*paths, object_ids=ids, allowed_ids=frozenset(ids)))
    return pairs


# --------------------------------------------------------------------------------------- loading


def load(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """Clips per second of the training stream, as fast as it can be emptied, and how many rows of
    the head its batches take."""
    options = ClipOptions(
        crop_size=arguments.crop,
        short_edge=max(arguments.crop, round(480 / 465 * arguments.crop)),
        max_objects=arguments.objects,
    )
    with tempfile.TemporaryDirectory() as records:
        clips = Clips([(_videos(arguments, records), 1)], options, seed=0)
        with alone():
            seconds, cpu, num_objects = _empty(clips, arguments)
    taken = arguments.batch * arguments.batches
    made = np.stack(num_objects)
    times = Times.of(seconds)
    row = make_row(
        "loading",
        f"{arguments.batches} batches of {arguments.batch} clips, {arguments.workers} workers",
        times,
        clips_per_second=taken / times.median,
        # Of all clips, those to warm up, too; the workers' start and end count.
        clips_per_cpu_second=made.size / cpu,
        cpu_seconds=cpu,
    )
    return [row, rows_row(made, arguments.objects)], None


def rows_row(num_objects: np.ndarray, max_objects: int) -> Row:
    """The rows of the head (background and objects) that batches `[batches, clips]` need, and how
    many more are computed: packed, as training does on one device, or padded to the largest clip
    of a batch, or to `max_objects`."""
    clips = num_objects.shape[1]
    rows = num_objects.size + int(num_objects.sum())
    packed = sum(pack_rows(batch, 1, max_objects).row.size for batch in num_objects)
    largest = int((clips * (1 + num_objects.max(axis=1))).sum())
    return make_row(
        "rows of the head",
        f"{num_objects.size} clips, up to {max_objects} objects",
        objects_per_clip=float(num_objects.mean()),
        rows=rows,
        percent_more_packed=100 * (packed / rows - 1),
        percent_more_by_largest_clip=100 * (largest / rows - 1),
        percent_more_by_max_objects=100 * (num_objects.size * (1 + max_objects) / rows - 1),
    )


def _videos(arguments: argparse.Namespace, records: str):
    if arguments.root is None:
        return SyntheticVideos(0, size=arguments.size, max_objects=arguments.objects)
    davis = source(dataset="davis", root=str(arguments.root), resolution=arguments.resolution)
    davis.split = arguments.split
    return clip_source("davis", davis, records, arguments.objects, seed=0)


def _empty(
    clips: Clips, arguments: argparse.Namespace
) -> tuple[list[float], float, list[np.ndarray]]:
    """Seconds of each run, CPU seconds of this process and its workers for everything, and how
    many objects the clips of each batch have."""
    stop = WARM_UP_BATCHES + arguments.runs * arguments.batches
    if not flags.FLAGS.is_parsed():  # Grain asks absl when it starts workers
        flags.FLAGS.mark_as_parsed()
    started, seconds, num_objects = _cpu_seconds(), [], []
    with loader.batches(clips, arguments.batch, 0, stop, workers=arguments.workers) as stream:
        for _ in range(WARM_UP_BATCHES):
            num_objects.append(next(stream)["num_objects"])
        for _ in range(arguments.runs):
            begun = time.perf_counter()
            for _ in range(arguments.batches):
                num_objects.append(next(stream)["num_objects"])
            seconds.append(time.perf_counter() - begun)
        next(stream, None)  # at its end, workers give their shared memory back
    return seconds, _cpu_seconds() - started, num_objects


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
