"""Scores a folder of predicted masks as the official DAVIS 2017 tool does (semi-supervised).

The first and the last frame of a sequence are left out, and means run over the objects of all
sequences. DAVIS 2016 follows the same rules with one object per sequence: both masks are binarised
(`> 0`), so that its 0 / 255 files hold no void. In DAVIS 2017, void (255) in the truth belongs to
no object and is not otherwise ignored.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from cfbi_jax.data.davis import evaluation_videos
from cfbi_jax.data.image_files import ids_in
from cfbi_jax.data.videos import EvaluationVideo, empty_first_mask, read_label
from cfbi_jax.evaluation import metrics, predictions

LOGGER = logging.getLogger(__name__)

MIN_FRAMES = 3  # of which the first and the last are not scored


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a DAVIS split: `objects` in the order of its list, and the means over objects."""

    year: int
    objects: tuple[metrics.ObjectScores, ...]
    region: metrics.Statistics
    boundary: metrics.Statistics

    @property
    def j_and_f(self) -> float:
        return (self.region.mean + self.boundary.mean) / 2


def score_davis(
    root: str | Path,
    results: str | Path,
    year: int = 2017,
    split: str = "val",
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
    num_threads: int | None = None,
) -> Scores:
    """Scores `results/<sequence>/<frame>.png` against the truth of a DAVIS folder.

    Every file is looked for, and its header read, before the first frame is scored. Nothing is
    cached: a second call reads everything again.

    Args:
      root: the DAVIS folder.
      results: folder of the predicted masks. Only scored frames are needed and read.
      year: 2016 or 2017.
      split: name of the list in `ImageSets/<year>`.
      resolution: name of the folder under `Annotations` and `JPEGImages`.
      sequences: scores only these of the list; None scores all.
      num_threads: None takes one per core.

    Raises:
      FileNotFoundError: for a missing list, folder, frame, true mask (as in test-dev) or
        prediction.
      ValueError: for an unknown year or sequence, a prediction of another kind or size, or one that
        holds an id above the number of objects.
    """
    results = Path(results)
    if not results.is_dir():
        raise FileNotFoundError(f"{results}: no such folder of predicted masks")
    videos = evaluation_videos(root, year, split, resolution, sequences)
    pairs = {video.name: _frame_pairs(video, results) for video in videos}
    if not pairs:
        raise ValueError(f"{root}: asked for no sequence, expected some of split {split!r}")
    objects = predictions.score(pairs, num_threads)
    return Scores(
        year=year,
        objects=tuple(objects),
        region=metrics.mean_statistics([o.region_statistics for o in objects]),
        boundary=metrics.mean_statistics([o.boundary_statistics for o in objects]),
    )


def _frame_pairs(video: EvaluationVideo, results: Path) -> list[predictions.FramePair]:
    """Returns a sequence's frames without the first and the last, each with all its objects."""
    if not video.truth:
        raise FileNotFoundError(
            f"{video.given[0].parent}: only the first mask is there; a split whose truth is not "
            "public, such as test-dev, can only be scored by its server"
        )
    if len(video.frames) < MIN_FRAMES:
        raise ValueError(
            f"{video.frames[0].parent}: has {len(video.frames)} frames, expected at least "
            f"{MIN_FRAMES}, since the first and the last are not scored"
        )
    first_mask = read_label(video, video.truth[0], refuse_shades=False)
    if not first_mask.any():
        raise empty_first_mask(video)
    object_ids = tuple(range(1, int(first_mask.max()) + 1))
    missing = sorted(set(object_ids) - set(ids_in(first_mask).tolist()))
    if missing:
        LOGGER.warning(
            "%s: %d of %d objects (%s) are not in the first mask; each scores 1 by DAVIS' rule "
            "unless it is predicted; expected ids without gaps",
            *(video.name, len(missing), len(object_ids), ", ".join(map(str, missing[:5]))),
        )
    return [
        predictions.FramePair(
            prediction=results / video.name / f"{frame.stem}.png",
            truth=video.truth[i],
            object_ids=object_ids,
            allowed_ids=frozenset(object_ids),
            binary=video.reading == "binary",
        )
        for i, frame in enumerate(video.frames[:-1])
        if i > 0
    ]
