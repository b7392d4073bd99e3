"""What an evaluation or a training needs to know of a video, and what can be checked before it."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from cfbi_jax.data import image_files

LOGGER = logging.getLogger(__name__)

THREADS = 8  # that read files

# What the values of mask files mean: "ids" of objects; "binary", one object wherever they are not 0
# (DAVIS 2016); "void_255", ids, with 255 where nobody knows (DAVIS 2017).
Reading = Literal["ids", "binary", "void_255"]


@dataclass(frozen=True)
class EvaluationVideo:
    """One video to segment. Frames are known by their position in `frames`, counted from 0.

    Attributes:
      name: the folder's name, also that of its results.
      frames: the picture files in order; a result is called `<frame's stem>.png`.
      given: the mask files that the system is shown, by frame.
      save: the frames whose results are written, ascending.
      truth: the true masks, by frame: one for every frame in `save`, or none at all.
      reading: what the values of the mask files mean; 255 for void is read as background.
      starts: the frame at which each object is given (YouTube-VOS): a given mask shows only the
        objects that start with it. Empty: a given mask shows all its objects.
    """

    name: str
    frames: tuple[Path, ...]
    given: Mapping[int, Path]
    save: tuple[int, ...]
    truth: Mapping[int, Path] = field(default_factory=dict)
    reading: Reading = "ids"
    starts: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingFiles:
    """The annotated frames of a video to train on.

    Attributes:
      name: the folder's name.
      frames: the picture files in order.
      masks: the mask file of each frame.
      reading: what the values of the mask files mean; 255 for void is left, for the loss to ignore.

    Errors: ValueError unless there are as many masks as frames.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    reading: Reading

    def __post_init__(self):
        if len(self.frames) != len(self.masks):
            raise ValueError(
                f"{self.name}: {len(self.frames)} frames and {len(self.masks)} masks; expected one"
                " mask per frame"
            )


def skip_short(files: Iterable[TrainingFiles], least: int) -> list[TrainingFiles]:
    """Leaves out, with a warning, videos with fewer than `least` annotated frames."""
    kept = []
    for video in files:
        if len(video.frames) >= least:
            kept.append(video)
        else:
            LOGGER.warning(
                "%s: annotated frames: %d; skipped, as training needs %d",
                *(video.name, len(video.frames), least),
            )
    return kept


def read_label(
    video: EvaluationVideo, path: Path, refuse_shades: bool = True
) -> UInt8[np.ndarray, "height width"]:
    """Reads a given or true mask file as this video's data set means it.

    `refuse_shades` and errors: those of `image_files.read_mask`.
    """
    label = image_files.read_mask(path, refuse_shades)
    if video.reading == "binary":
        return (label > 0).astype(np.uint8)
    if video.reading == "void_255":
        label[label == 255] = 0
    return label


def read_given(video: EvaluationVideo, index: int) -> UInt8[np.ndarray, "height width"]:
    """The mask given at frame `index`, with only the objects that are given there.

    Errors: KeyError if no mask is given at that frame; those of `image_files.read_mask`.
    """
    label = read_label(video, video.given[index])
    if video.starts:
        shown = [object_id for object_id, start in video.starts.items() if start == index]
        label[~np.isin(label, shown)] = 0
    return label


def check_videos(
    videos: Sequence[EvaluationVideo], max_objects: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Checks all that can be known before long work: every file, its size, every given mask.

    Given masks are read; of frames and true masks the header and the end of the file are. Returns
    the ids of the objects that each video's given masks show, ascending, by the video's name.

    Errors: FileNotFoundError for a missing file; ValueError for a file that is cut short or no
    picture, a frame or mask of another size than the video, a mask that is none, a first mask
    without objects, more than `max_objects` objects in a video.
    """
    ids = in_threads(lambda video: _check_video(video, max_objects), videos)
    return {video.name: found for video, found in zip(videos, ids, strict=True)}


def check_training_files(files: Sequence[TrainingFiles]) -> dict[str, int]:
    """Checks header, size and end of every frame and reads every mask, and every frame that is a
    PNG, so that long work does not stop halfway. Damage within a JPEG is not found.

    Returns the largest object id of each video, 0 for none, by its name.

    Errors: FileNotFoundError for a missing file; ValueError for no videos, a name that is there
    twice, a file that is cut short or no picture, a mask that `read_mask` refuses, a frame or mask
    of another size than the video.
    """
    names = [video.name for video in files]
    if not names:
        raise ValueError("no videos to train on; expected one at least")
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{name}: more than one video of this name; expected one")
    return dict(zip(names, in_threads(_check_training_video, files), strict=True))


def split_names(listed: str) -> list[str]:
    """Names as written on a command line: "blackswan,dog"."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def is_folder_name(name: str) -> bool:
    """Whether it names a folder in another one: no path, neither empty nor `..`."""
    return Path(name).name == name and name not in ("", "..")


def check_are_folders(names: Iterable[str], where: Path) -> None:
    """Raises ValueError for a name that leads anywhere but to a folder in another one."""
    for name in names:
        if not is_folder_name(name):
            raise ValueError(f"{where}: {name!r} in the list; expected the name of a folder")


def check_names(kind: str, wanted: Iterable[str], known: Iterable[str], where: Path) -> None:
    """Raises ValueError, with the nearest known names, for a wanted name that is not known."""
    known = list(known)
    as_set = set(known)
    for name in wanted:
        if name not in as_set:
            near = get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
            raise ValueError(
                f"{where}: no {kind} {name!r} among {len(known)}; near names: {', '.join(near)}"
            )


def in_threads(look: Callable, items: Sequence) -> list:
    """`look` of each item, as data sets often lie on a network file system. Of several errors the
    first in the order of `items` is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        results = [pool.submit(look, item) for item in items]
        try:
            return [result.result() for result in results]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_training_video(video: TrainingFiles) -> int:
    """Checks one video; see `check_training_files`."""
    size = _check_frame_sizes(video.frames, video.masks)
    largest = 0
    for path in video.masks:
        label = image_files.read_mask(path)
        _check_size(path, label.shape, size, video.frames[0])
        if video.reading == "binary":
            largest = max(largest, int(label.any()))
        else:
            largest = max(largest, int(label[label != 255].max(initial=0)))
    for path in video.frames:
        if path.suffix.lower() == ".png":
            image_files.read_frame(path)
    return largest


def _check_frame_sizes(frames: Sequence[Path], masks: Iterable[Path]) -> tuple[int, int]:
    """(height, width) of a video, after checking that all its frames and these masks have it."""
    size = image_files.image_size(frames[0])
    for path in frames[1:]:
        _check_size(path, image_files.image_size(path), size, frames[0])
    for path in masks:
        _check_size(path, image_files.mask_size(path), size, frames[0])
    return size


def _check_video(video: EvaluationVideo, max_objects: int | None) -> tuple[int, ...]:
    """Checks one video; see `check_videos`."""
    if not video.frames:
        raise ValueError(f"{video.name}: no frames; expected one at least")
    if not video.given:
        raise ValueError(f"{video.name}: no mask is given; expected one at the first frame")
    first = video.frames[0]
    size = _check_frame_sizes(video.frames, video.truth.values())

    given: dict[int, set[int]] = {}
    seen: set[int] = set()
    for index in sorted(video.given):
        label = read_given(video, index)
        _check_size(video.given[index], label.shape, size, first)
        given[index] = set(np.flatnonzero(np.bincount(label.ravel())).tolist()) - {0}
        seen |= given[index]
        if max_objects is not None and len(seen) > max_objects:
            ids = ", ".join(str(object_id) for object_id in sorted(seen))
            raise ValueError(
                f"{video.given[index]}: with it {video.name} has {len(seen)} objects (ids {ids});"
                f" expected at most max_objects = {max_objects}"
            )
    _check_starts(video, given)
    return tuple(sorted(seen))


def empty_first_mask(video: EvaluationVideo) -> ValueError:
    """What to say where the first mask shows no object."""
    path = video.given[min(video.given)]
    message = f"{path}: an empty first mask; expected an object in it"
    if video.reading == "void_255" and 255 in image_files.read_mask(path):
        message += " (255 is void in DAVIS 2017; for masks of 0 and 255 set year=2016)"
    return ValueError(message)


def _check_size(
    path: Path, size: tuple[int, int], expected: tuple[int, int], first_frame: Path
) -> None:
    if tuple(size) != tuple(expected):
        raise ValueError(
            f"{path}: {size[0]} x {size[1]} pixels (height x width); expected"
            f" {expected[0]} x {expected[1]} as in {first_frame}"
        )


def _check_starts(video: EvaluationVideo, given: Mapping[int, set[int]]) -> None:
    """Raises ValueError unless the first mask has an object, or may be empty and a later one has.

    `given`: the ids in each given mask, by frame.
    """
    first = min(given)
    if first != 0:
        raise ValueError(
            f"{video.name}: the first mask is given at frame {first}"
            f" ({video.frames[first].name}); expected one at {video.frames[0]}"
        )
    if not given[first] and not video.starts:
        raise empty_first_mask(video)
    if not any(given.values()):
        raise ValueError(
            f"{video.given[first]}: an empty first mask, and no object in a later mask given for"
            f" {video.name}; expected one at least"
        )
    for object_id, start in video.starts.items():
        if object_id not in given.get(start, ()):
            # Such an object is never seen by the network; the rest of the video is still good.
            LOGGER.warning(
                "%s: object %d starts at %s but has no pixel in %s",
                *(video.name, object_id, video.frames[start].stem, video.given.get(start)),
            )
