"""A local scorer for YouTube-VOS-like videos with full truth, such as held-out training videos.

The truth of the official validation and test sets is not public, and neither is the server's code.
This scorer assumes:

- An object is scored in every annotated frame of its video after its own first frame, which is the
  first entry of its `frames` in `meta.json`. The last frame counts. Frames in which the object is
  absent count: predicting nothing there gives J = F = 1, predicting something 0. Ids that
  `meta.json` does not list belong to no object, in the truth; in a prediction they are an error.
- J and F are those of DAVIS (`metrics`), at the size of the true masks; 255 in the truth is void,
  which belongs to no object.
- An object's score is the mean over its frames; a group's score is the mean over its objects.
- The groups are the objects of categories seen and unseen in training. Overall is the mean of the
  four numbers, J and F of both groups, or of the two that exist where a group is empty. Where it is
  not known which categories were seen, or an object has no category, all objects form one group.
- A frame that is annotated but listed for no object, and an object with a single frame, are not
  scored.

Numbers from it compare runs with each other, not with published tables.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cfbi_jax.data.youtube_vos import ObjectEntry, read_meta
from cfbi_jax.evaluation import metrics, predictions

LOGGER = logging.getLogger(__name__)

SEEN, UNSEEN, ALL = "seen", "unseen", "all"

ASSUMPTIONS = (
    "Assumed, since the server's code is not public: every annotated frame after an object's first "
    "one counts, absent or not; mean over frames, then over objects; DAVIS's J and F at the size "
    "of the true masks; overall = mean of J and F of the groups shown. Not comparable to published "
    "tables."
)


@dataclasses.dataclass(frozen=True)
class GroupScores:
    """Means over the objects of a group; `name` is "seen", "unseen" or "all"."""

    name: str
    num_objects: int
    region: float
    boundary: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a folder in YouTube-VOS layout.

    Attributes:
      objects: by video and id.
      categories: category of each object.
      groups: seen, then unseen; or all, where it is not known which categories were seen. Groups
        without objects are left out.
      overall: mean of J and F of the groups.
    """

    objects: tuple[metrics.ObjectScores, ...]
    categories: tuple[str, ...]
    groups: tuple[GroupScores, ...]
    overall: float


class NothingToScore(ValueError):
    """No object of any video has a frame after its first one."""


def score_youtube_vos(
    root: str | Path,
    results: str | Path,
    split: str = "train",
    videos: Sequence[str] | None = None,
    seen_categories: Collection[str] | None = None,
    num_threads: int | None = None,
) -> Scores:
    """Scores `results/<video>/<frame>.png` against `root/<split>/Annotations`; see the module.

    Args:
      root: the YouTube-VOS folder.
      results: folder of the predicted masks. Only scored frames are needed and read.
      split: folder under `root`, with `meta.json` and a true mask for every frame.
      videos: scores only these; None scores all of `meta.json`.
      seen_categories: categories of the training set; None takes all of `root/train/meta.json` (65
        in the official set; held-out videos of `train` are then all seen) or, where that file is
        absent, does without groups.
      num_threads: None takes one per core.

    Raises:
      FileNotFoundError: for a missing `meta.json`, true mask or prediction.
      ValueError: for an unknown video, a malformed `meta.json`, a prediction of another kind or
        size, or one that holds an id that is not in `meta.json`; `seen_categories` that no object
        has, or objects without a category beside them; `NothingToScore`.
    """
    root, results = Path(root), Path(results)
    if not results.is_dir():
        raise FileNotFoundError(f"{results}: no such folder of predicted masks")
    meta = read_meta(root, split, videos)
    seen = _seen_categories(root, seen_categories)
    if seen_categories is not None:
        _check_categories(seen, meta, root / split / "meta.json")

    pairs = {
        video: _frame_pairs(root / split / "Annotations" / video, results / video, objects)
        for video, objects in meta.items()
    }
    if not any(pairs.values()):
        raise NothingToScore(f"{root / split}: no object has a frame after its first one to score")
    objects = predictions.score(pairs, num_threads)
    categories = [meta[o.sequence][o.object_id].category for o in objects]
    groups = _group_scores(objects, categories, seen)
    return Scores(
        objects=tuple(objects),
        categories=tuple(categories),
        groups=groups,
        overall=sum(g.region + g.boundary for g in groups) / (2 * len(groups)),
    )


def _seen_categories(root: Path, given: Collection[str] | None) -> frozenset[str] | None:
    if given is not None:
        return frozenset(given)
    if not (root / "train" / "meta.json").is_file():
        return None
    meta = read_meta(root, "train")
    return frozenset(o.category for objects in meta.values() for o in objects.values())


def _check_categories(
    seen: frozenset[str], meta: Mapping[str, Mapping[int, ObjectEntry]], path: Path
) -> None:
    found = {o.category for objects in meta.values() for o in objects.values()}
    if "" in found:
        raise ValueError(f"{path}: an object has no category; expected one, to tell the seen ones")
    if not seen & found:
        raise ValueError(
            f"seen categories {sorted(seen)}: no object of {path} has one of them; it has "
            f"{sorted(found)}"
        )
    if seen - found:  # no harm, or misspelt
        LOGGER.warning("no object of %s has the category %s", path, ", ".join(sorted(seen - found)))


def _frame_pairs(
    truth: Path, results: Path, objects: Mapping[int, ObjectEntry]
) -> list[predictions.FramePair]:
    """Returns the frames of a video in which at least one object is past its first frame."""
    pairs = []
    for frame in sorted({frame for o in objects.values() for frame in o.frames}, key=int):
        started = tuple(i for i, o in objects.items() if int(o.frames[0]) < int(frame))
        if started:
            pairs.append(
                predictions.FramePair(
                    prediction=results / f"{frame}.png",
                    truth=truth / f"{frame}.png",
                    object_ids=started,
                    allowed_ids=frozenset(objects),
                )
            )
    return pairs


def _group_scores(
    objects: list[metrics.ObjectScores], categories: list[str], seen: frozenset[str] | None
) -> tuple[GroupScores, ...]:
    if seen is None or "" in categories:
        names = [ALL] * len(objects)
    else:
        names = [SEEN if category in seen else UNSEEN for category in categories]
    groups = []
    for name in (SEEN, UNSEEN, ALL):
        members = [o for o, own in zip(objects, names, strict=True) if own == name]
        if members:
            groups.append(
                GroupScores(
                    name=name,
                    num_objects=len(members),
                    region=sum(o.region_statistics.mean for o in members) / len(members),
                    boundary=sum(o.boundary_statistics.mean for o in members) / len(members),
                )
            )
    return tuple(groups)
