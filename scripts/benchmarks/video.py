"""A long video: memory after a few frames, and at its end."""

import argparse
import itertools

import jax

from benchmarks.measure import MIB, Times
from benchmarks.networks import block_label, make_model, random_frames, random_variables
from benchmarks.planning import resident_bytes
from benchmarks.report import Row, make_row
from benchmarks.turns import alone
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.segmenter import VideoSegmenter
from cfbi_jax.models.images import IMAGENET_FORMAT

EARLY_FRAME = 20  # all that a video needs is there
DIFFERENT_FRAMES = 8


def video(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """Rows of the memory in use from frame 20 to the end, and of the time per frame.

    Errors: ValueError for a video that ends before.
    """
    least = EARLY_FRAME + 2
    if arguments.frames < least:
        raise ValueError(f"--frames is {arguments.frames}; expected {least} or more")
    model = make_model(arguments.model, arguments.dtype, arguments.matching_dtype)
    options = Options(compute_dtype=arguments.dtype, matching_dtype=arguments.matching_dtype)
    segmenter = VideoSegmenter(model, random_variables(model), IMAGENET_FORMAT, options)
    pool = random_frames(DIFFERENT_FRAMES, arguments.size)
    frames = itertools.islice(itertools.cycle(pool), arguments.frames)
    masks = {0: block_label(arguments.size, arguments.objects)}
    seconds: list[float] = []
    with alone():
        used = [in_use() for _ in segmenter.segment(frames, masks, times=seconds)]
    early, later = used[EARLY_FRAME], used[EARLY_FRAME + 1 :]
    name = f"{arguments.frames} frames"
    rows = [
        make_row(name, f"memory after frame {EARLY_FRAME}", mib=early / MIB),
        *(
            make_row(name, f"memory after frame {frame}", mib=used[frame] / MIB)
            for frame in (arguments.frames // 4, arguments.frames // 2)
            if frame > EARLY_FRAME
        ),
        make_row(name, "memory at the end", mib=later[-1] / MIB),
        make_row(name, "largest after that frame", mib=max(later) / MIB),
        make_row(name, "a frame", Times.of(seconds[EARLY_FRAME:])),
    ]
    return rows, None


def in_use() -> int:
    """Bytes of the device's memory, or of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use") or resident_bytes()
