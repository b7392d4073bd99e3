"""DAVIS 2016 and 2017 on disk, and any folder laid out like them.

JPEGImages/<resolution>/<sequence>/00000.jpg
Annotations/<resolution>/<sequence>/00000.png
ImageSets/<year>/<split>.txt                     one sequence per line
"""

from collections.abc import Sequence
from pathlib import Path

from cfbi_jax.data.image_files import list_frames
from cfbi_jax.data.videos import (
    EvaluationVideo,
    Reading,
    TrainingFiles,
    check_are_folders,
    check_names,
    skip_short,
)


def evaluation_videos(
    root: Path | str,
    year: int = 2017,
    split: str = "val",
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
) -> list[EvaluationVideo]:
    """The sequences of a list, each with its first mask given and its true masks if it has all.

    Args:
      root: the folder that holds `JPEGImages`, `Annotations` and `ImageSets`.
      year: 2016 (one object, any value but 0) or 2017 (ids).
      split: a list in `ImageSets/<year>`: train, val, test-dev, ...
      resolution: the folder's name: 480p, Full-Resolution, ...
      sequences: restricts the list to these, in the list's order.

    Errors: FileNotFoundError for a missing folder, list, frame or annotation; ValueError for
    another year, an unknown sequence, an empty list.
    """
    root = Path(root)
    names = _selected(root, year, split, sequences)
    return [_evaluation_video(root, year, resolution, name) for name in names]


def training_files(
    root: Path | str,
    year: int = 2017,
    split: str = "train",
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
    least: int = 2,
) -> list[TrainingFiles]:
    """The frames and masks of the sequences of a list.

    Args: those of `evaluation_videos`, and `least`: those of fewer frames are skipped.

    Errors: FileNotFoundError for a missing folder, list or frame, and for any frame without its
    mask; ValueError as for `evaluation_videos`.
    """
    root = Path(root)
    names = _selected(root, year, split, sequences)
    files = (_training_files(root, year, resolution, name) for name in names)
    return skip_short(files, least)


def finest_resolution(root: Path | str, names: Sequence[str]) -> str:
    """ "Full-Resolution" where all these sequences have such frames and masks, else "480p"."""
    full = [Path(root) / kind / "Full-Resolution" for kind in ("JPEGImages", "Annotations")]
    there = all((folder / name).is_dir() for folder in full for name in names)
    return "Full-Resolution" if there else "480p"


def sequence_names(root: Path | str, year: int, split: str) -> list[str]:
    """The names in `ImageSets/<year>/<split>.txt`.

    Errors: FileNotFoundError for a missing root or list, naming the lists there are; ValueError for
    an empty list, a name that is in it twice or is no folder's.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected the root of a DAVIS data set")
    path = _list_file(root, year, split)
    if not path.is_file():
        lists = sorted(str(p.relative_to(root)) for p in root.glob("ImageSets/*/*.txt"))
        raise FileNotFoundError(f"{path}: no such list; there are: {', '.join(lists) or 'none'}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}; expected a list in UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: an empty list; expected a sequence name per line")
    check_are_folders(names, path)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path}: more than once in the list: {', '.join(twice)}")
    return names


def _selected(root: Path, year: int, split: str, sequences: Sequence[str] | None) -> list[str]:
    """The names in a list that are also in `sequences`, unless that is None."""
    if year not in (2016, 2017):
        raise ValueError(f"{root}: DAVIS year {year!r}; expected 2016 or 2017")
    names = sequence_names(root, year, split)
    if sequences is None:
        return names
    check_names("sequence", sequences, names, _list_file(root, year, split))
    chosen = set(sequences)
    return [name for name in names if name in chosen]


def _reading(year: int) -> Reading:
    return "binary" if year == 2016 else "void_255"


def _list_file(root: Path, year: int, split: str) -> Path:
    return root / "ImageSets" / str(year) / f"{split}.txt"


def _evaluation_video(root: Path, year: int, resolution: str, name: str) -> EvaluationVideo:
    """Lists the files of one sequence; opens none."""
    frames, masks_folder, masks = _sequence_files(root, resolution, name)
    stems = [path.stem for path in frames]
    if stems[0] not in masks:
        raise FileNotFoundError(
            f"{masks_folder / stems[0]}.png: no such file; expected the mask of the first frame"
        )
    without_mask = [stem for stem in stems if stem not in masks]
    # The test splits publish first masks only. A part of the masks is a copy that went wrong.
    if without_mask and len(masks) > 1:
        raise FileNotFoundError(
            f"{masks_folder / without_mask[0]}.png: no such file; {len(masks)} of {len(stems)}"
            " annotations found; expected the first one only, or all"
        )
    truth = {} if without_mask else {i: masks[stem] for i, stem in enumerate(stems)}
    return EvaluationVideo(
        name=name,
        frames=tuple(frames),
        given={0: masks[stems[0]]},
        save=tuple(range(len(frames))),
        truth=truth,
        reading=_reading(year),
    )


def _training_files(root: Path, year: int, resolution: str, name: str) -> TrainingFiles:
    """Lists the files of one sequence; opens none."""
    frames, masks_folder, masks = _sequence_files(root, resolution, name)
    for frame in frames:
        if frame.stem not in masks:
            raise FileNotFoundError(
                f"{masks_folder / frame.stem}.png: no such file; {len(masks)} of {len(frames)}"
                " annotations found; training needs all"
            )
    in_order = tuple(masks[frame.stem] for frame in frames)
    return TrainingFiles(name, tuple(frames), in_order, _reading(year))


def _sequence_files(
    root: Path, resolution: str, name: str
) -> tuple[list[Path], Path, dict[str, Path]]:
    """The frames of a sequence in order, the folder of its masks, and the masks by stem.

    Errors: FileNotFoundError for a missing folder, a gap between frames, a mask without frame.
    """
    frames_folder = _sequence_folder(root, "JPEGImages", resolution, name)
    masks_folder = _sequence_folder(root, "Annotations", resolution, name)
    frames = list_frames(frames_folder)
    _check_no_gap(frames)
    masks = {path.stem: path for path in masks_folder.glob("[!.]*.png")}
    without_frame = sorted(masks.keys() - {path.stem for path in frames})
    if without_frame:
        raise FileNotFoundError(
            f"{frames_folder / without_frame[0]}.jpg: no such frame, but it has an annotation"
        )
    return frames, masks_folder, masks


def _sequence_folder(root: Path, kind: str, resolution: str, name: str) -> Path:
    """The folder of a sequence's frames or masks; FileNotFoundError says which part is missing."""
    folder = root
    for part in (kind, resolution, name):
        parent, folder = folder, folder / part
        if not folder.is_dir():
            there = sorted(p.name for p in parent.iterdir() if p.is_dir())
            shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
            raise FileNotFoundError(f"{folder}: no such folder; there are: {shown or 'none'}")
    return folder


def _check_no_gap(frames: Sequence[Path]) -> None:
    """Raises FileNotFoundError if a number is missing between the first frame and the last."""
    if not all(path.stem.isdecimal() for path in frames):
        return
    numbers = [int(path.stem) for path in frames]
    # A sequence may keep every n-th frame only: the smallest step is the rule.
    step = min((b - a for a, b in zip(numbers, numbers[1:], strict=False)), default=1)
    for path, a, b in zip(frames, numbers, numbers[1:], strict=False):
        if b - a != step:
            missing = str(a + step).zfill(len(path.stem))
            raise FileNotFoundError(
                f"{path.with_stem(missing)}: no such frame, but there are {a} and {b}"
            )
