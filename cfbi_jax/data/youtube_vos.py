"""YouTube-VOS 2018 and 2019 on disk.

<split>/JPEGImages/<video>/00000.jpg                 every fifth frame (6 per second)
<split>/Annotations/<video>/00000.png                where an object first appears; train: all
<split>/meta.json                                    the objects and the frames of each
<split>_all_frames/JPEGImages/<video>/00000.jpg      every frame (30 per second)
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfbi_jax.data.videos import (
    EvaluationVideo,
    TrainingFiles,
    check_are_folders,
    check_names,
    is_folder_name,
    skip_short,
)


@dataclass(frozen=True)
class ObjectEntry:
    """An object in `meta.json`: its category ("" if unknown) and its frames' stems, sorted."""

    category: str
    frames: tuple[str, ...]


def evaluation_videos(
    root: Path | str,
    split: str = "valid",
    all_frames: bool = False,
    videos: Sequence[str] | None = None,
) -> list[EvaluationVideo]:
    """The videos of a split, sorted by name; each object is given at the first of its frames.

    The frames of a video are those that `meta.json` lists for its objects. With `all_frames` they
    are all the pictures of `<split>_all_frames` from the first of these to the last, of which only
    those in `meta.json` are saved. In `train`, whose annotations are complete, they are the truth.

    Args:
      root: the folder that holds the folders of the splits.
      split: `valid`, `test`, or `train` (for held-out videos: see `videos`).
      all_frames: see above.
      videos: restricts to these names.

    Errors: FileNotFoundError for a missing folder, `meta.json`, frame or annotation; ValueError for
    a damaged `meta.json`, ids outside 1..255, an unknown video.
    """
    root = Path(root)
    meta = read_meta(root, split, videos)
    frames_folder = _existing(root / (f"{split}_all_frames" if all_frames else split), "JPEGImages")
    masks_folder = _existing(root / split, "Annotations")
    return [
        _evaluation_video(
            frames_folder / name, masks_folder / name, objects, all_frames, split == "train"
        )
        for name, objects in meta.items()
    ]


def training_files(
    root: Path | str,
    split: str = "train",
    videos: Sequence[str] | None = None,
    least: int = 2,
) -> list[TrainingFiles]:
    """The annotated frames of the videos in `meta.json`, sorted by name.

    These are all the PNGs of a video with their JPEGs. A JPEG without a PNG is legal and is left
    out.

    Args:
      root: the folder that holds the folders of the splits.
      split: a folder in it; `train` is the one whose annotations are complete.
      videos: restricts to these names.
      least: videos with fewer annotated frames are skipped.

    Errors: FileNotFoundError for a missing folder or `meta.json`, and for an annotation without its
    frame; ValueError for a damaged `meta.json`, an unknown video.
    """
    root = Path(root)
    names = read_meta(root, split, videos)
    frames_folder = _existing(root / split, "JPEGImages")
    masks_folder = _existing(root / split, "Annotations")
    files = (_training_files(frames_folder / n, masks_folder / n) for n in names)
    return skip_short(files, least)


def read_meta(
    root: Path | str, split: str, videos: Sequence[str] | None = None
) -> dict[str, dict[int, ObjectEntry]]:
    """The objects of each video in `<split>/meta.json`: video -> id -> `ObjectEntry`.

    Sorted by name; `videos` restricts to these names.

    Errors: FileNotFoundError; ValueError for a file that is no JSON or not built as it should be, a
    video without objects, an object without frames, ids outside 1..255, a name of a video or split
    that is no folder's, an unknown video.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected the root of YouTube-VOS")
    if not is_folder_name(split):
        raise ValueError(f"{root}: split is {split!r}; expected the name of a folder in it")
    path = root / split / "meta.json"
    if not path.is_file():
        splits = sorted(p.parent.name for p in root.glob("*/meta.json"))
        raise FileNotFoundError(
            f"{path}: no such file; splits with one: {', '.join(splits) or 'none'}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, no JSON ({error})") from error
    listed = _mapping(content, "videos", f"{path}")
    check_are_folders(listed, path)
    objects = {name: _read_objects(listed, name, path) for name in sorted(listed)}
    if videos is None:
        return objects
    check_names("video", videos, objects, path)
    return {name: objects[name] for name in sorted(set(videos))}


def _existing(split_folder: Path, kind: str) -> Path:
    folder = split_folder / kind
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one folder per video")
    return folder


def _training_files(frames_folder: Path, masks_folder: Path) -> TrainingFiles:
    """Lists the files of one video; opens none."""
    pictures = _stems(frames_folder, ".jpg")
    annotated = (stem for stem in _stems(masks_folder, ".png") if stem.isdecimal())
    stems = sorted(annotated, key=int)
    for stem in stems:
        if stem not in pictures:
            raise FileNotFoundError(
                f"{frames_folder / stem}.jpg: no such frame, but it has an annotation"
            )
    return TrainingFiles(
        name=frames_folder.name,
        frames=tuple(frames_folder / f"{stem}.jpg" for stem in stems),
        masks=tuple(masks_folder / f"{stem}.png" for stem in stems),
        reading="ids",
    )


def _read_objects(videos: Mapping[str, Any], name: str, path: Path) -> dict[int, ObjectEntry]:
    """The objects of one video of `meta.json`."""
    where = f"{path}: video {name!r}"
    objects = _mapping(_mapping(videos, name, where), "objects", where)
    entries = {}
    for key in objects:
        if not (key.isdecimal() and 1 <= int(key) <= 255):
            raise ValueError(f"{where}: object id {key!r}; expected 1 to 255")
        entry = _mapping(objects, key, where)
        frames = entry.get("frames")
        if not isinstance(frames, list) or not frames:
            raise ValueError(f"{where}: object {key}: no frames; expected a list of frame names")
        for stem in frames:
            if not (isinstance(stem, str) and stem.isdecimal()):
                raise ValueError(f"{where}: object {key}: frame {stem!r}; expected e.g. '00000'")
        category = entry.get("category") or ""
        if not isinstance(category, str):
            raise ValueError(f"{where}: object {key}: category {category!r}; expected a name")
        if int(key) in entries:
            raise ValueError(f"{where}: object {key} is there twice; expected one entry for an id")
        entries[int(key)] = ObjectEntry(category, tuple(sorted(frames, key=int)))
    return dict(sorted(entries.items()))


def _mapping(parent: Any, key: str, where: str) -> Mapping[str, Any]:
    """`parent[key]`, where both must be JSON objects and the second must not be empty."""
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where}: no {key!r} in it; expected a JSON object with entries")
    return value


def _evaluation_video(
    frames_folder: Path,
    masks_folder: Path,
    objects: Mapping[int, ObjectEntry],
    all_frames: bool,
    complete: bool,
) -> EvaluationVideo:
    """Lists the files of one video; opens none. `complete`: every frame is annotated."""
    name = frames_folder.name
    listed = sorted({stem for entry in objects.values() for stem in entry.frames}, key=int)
    pictures = _stems(frames_folder, ".jpg")
    for stem in listed:
        if stem not in pictures:
            raise FileNotFoundError(
                f"{frames_folder / stem}.jpg: no such frame, but meta.json lists it"
            )
    first, last = int(listed[0]), int(listed[-1])
    stems = listed
    if all_frames:
        numbered = (stem for stem in pictures if stem.isdecimal())
        stems = sorted((s for s in numbered if first <= int(s) <= last), key=int)
    index = {stem: i for i, stem in enumerate(stems)}

    masks = _stems(masks_folder, ".png")
    starts = {object_id: index[entry.frames[0]] for object_id, entry in objects.items()}
    for object_id, start in starts.items():
        if stems[start] not in masks:
            raise FileNotFoundError(
                f"{masks_folder / stems[start]}.png: no such file; object {object_id} starts there"
            )
    truth = {}
    if complete:
        for stem in listed:
            if stem not in masks:
                raise FileNotFoundError(
                    f"{masks_folder / stem}.png: no such file; expected one for every frame"
                )
            truth[index[stem]] = masks_folder / f"{stem}.png"
    return EvaluationVideo(
        name=name,
        frames=tuple(frames_folder / f"{stem}.jpg" for stem in stems),
        given={start: masks_folder / f"{stems[start]}.png" for start in sorted({*starts.values()})},
        save=tuple(index[stem] for stem in listed),
        truth=truth,
        reading="ids",
        starts=starts,
    )


def _stems(folder: Path, suffix: str) -> set[str]:
    """The names without suffix of a folder's files of one kind; FileNotFoundError without it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, but meta.json lists the video")
    return {n.removesuffix(suffix) for n in os.listdir(folder) if n.endswith(suffix)}
