"""Predicted masks on disk next to their truth: checked before scoring, then scored on all cores."""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float64

from cfbi_jax.data.image_files import ids_in, mask_size, read_mask
from cfbi_jax.evaluation import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")
# J and F of a frame's objects; the number of objects differs from frame to frame, hence no name.
FrameScores = tuple[Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]]


@dataclasses.dataclass(frozen=True)
class FramePair:
    """One frame to score: a predicted mask, the true one, and which objects count.

    Attributes:
      prediction: path of the predicted PNG.
      truth: path of the true PNG.
      object_ids: objects scored in this frame.
      allowed_ids: ids the prediction may hold besides 0; any other is an error.
      binary: both masks are object 1 wherever they are not 0 (DAVIS 2016).
    """

    prediction: Path
    truth: Path
    object_ids: tuple[int, ...]
    allowed_ids: frozenset[int]
    binary: bool = False


def score(
    pairs: Mapping[str, Sequence[FramePair]], num_threads: int | None = None
) -> list[metrics.ObjectScores]:
    """Scores the objects of each sequence's frames, by sequence, then by ascending id.

    Every file is looked for, and its header read, before the first frame is scored.

    Args:
      pairs: the scored frames of each sequence, in order.
      num_threads: None takes one per core.

    Raises:
      FileNotFoundError: when a mask is missing; counts the missing ones and names the first.
      ValueError: when a prediction is not a PNG of ids, of another size than its truth, or holds an
        id that is not allowed.
    """
    all_pairs = [pair for own in pairs.values() for pair in own]
    _check_files(all_pairs, num_threads)
    scores = iter(score_frames(all_pairs, num_threads))
    objects = []
    for sequence, own in pairs.items():
        objects += _by_object(sequence, own, [next(scores) for _ in own])
    return objects


def score_frames(pairs: Sequence[FramePair], num_threads: int | None = None) -> list[FrameScores]:
    """Reads and scores every pair; see `metrics.score_objects` for the values.

    Threads, not processes: decoding and nearly all array work release the interpreter lock, and
    threads need neither start-up time (on two cores they were faster for it) nor a guarded
    `__main__`.

    Args:
      pairs: the frames.
      num_threads: None takes one per core.

    Raises:
      ValueError: when a prediction holds an id that is not allowed, or a file is not a mask.
    """
    return _thread_map(_score_pair, pairs, num_threads)


def _check_files(pairs: Sequence[FramePair], num_threads: int | None) -> None:
    for name, paths in (
        ("true masks of scored frames", [pair.truth for pair in pairs]),
        ("predictions", [pair.prediction for pair in pairs]),
    ):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} {name} are missing, first: {missing[0]}"
            )
    _thread_map(_check_header, pairs, num_threads)


def _check_header(pair: FramePair) -> None:
    expected, found = mask_size(pair.truth), mask_size(pair.prediction)
    if found != expected:
        raise ValueError(
            f"{pair.prediction}: size is {found} (height, width), its truth has {expected}"
        )


def _by_object(
    sequence: str, pairs: Sequence[FramePair], scores: Sequence[FrameScores]
) -> list[metrics.ObjectScores]:
    """Turns one sequence's scores per frame into scores per object, by ascending id."""
    frames, region, boundary = defaultdict(list), defaultdict(list), defaultdict(list)
    for pair, (frame_region, frame_boundary) in zip(pairs, scores, strict=True):
        for i, object_id in enumerate(pair.object_ids):
            frames[object_id].append(pair.truth.stem)
            region[object_id].append(frame_region[i])
            boundary[object_id].append(frame_boundary[i])
    return [
        metrics.ObjectScores(
            sequence=sequence,
            object_id=object_id,
            frames=tuple(frames[object_id]),
            region=np.array(region[object_id]),
            boundary=np.array(boundary[object_id]),
        )
        for object_id in sorted(frames)
    ]


def _score_pair(pair: FramePair) -> FrameScores:
    # Other systems' palettes may be of any colours: DAVIS' tool reads the indices alone.
    prediction = read_mask(pair.prediction, refuse_shades=False, refuse_palettes=False)
    truth = read_mask(pair.truth, refuse_shades=False)
    if pair.binary:
        prediction, truth = (prediction > 0).view(np.uint8), (truth > 0).view(np.uint8)
    wrong = set(ids_in(prediction).tolist()) - pair.allowed_ids - {0}
    if wrong:
        hint = ""
        if wrong == {255}:
            hint = " (0 and 255 are masks as DAVIS 2016 has them)"
        raise ValueError(
            f"{pair.prediction}: holds object id {min(wrong)}, but the objects of this video are "
            f"{sorted(pair.allowed_ids)}{hint}"
        )
    return metrics.score_objects(prediction, truth, pair.object_ids)


def _thread_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int | None
) -> list[Result]:
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        return list(pool.map(function, items))
