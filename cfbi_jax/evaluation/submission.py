"""Zip files for the evaluation servers, and what a server would reject in one.

DAVIS         <sequence>/00000.png            at the root of the archive
YouTube-VOS   Annotations/<video>/00000.png
"""

import dataclasses
import io
import logging
import lzma
import os
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from cfbi_jax.data.davis import evaluation_videos
from cfbi_jax.data.image_files import decode_picture, ids_in, image_size
from cfbi_jax.data.videos import read_label
from cfbi_jax.data.youtube_vos import read_meta
from cfbi_jax.files import replacing

LOGGER = logging.getLogger(__name__)

ARCHIVE_FOLDERS = {"davis": "", "youtube_vos": "Annotations/"}
"""Folder of the archive that holds the sequences, by layout."""

DATASETS = {"davis2016": "davis", "davis2017": "davis", "youtube_vos": "youtube_vos"}
"""Layout of each data set."""

SUBMITTED_MODES = ("P", "L")
"""Pillow's names of 8-bit palette and grey pixels."""

# What unpacking damaged bytes raises beside OSError.
_UNPACKING = (zlib.error, lzma.LZMAError)

# The first date that a zip file can hold: the bytes then depend on the masks alone.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class ExpectedSequence:
    """What a server expects of a sequence; `ids` None stands for a single object of any id."""

    frames: tuple[str, ...]
    size: tuple[int, int]
    ids: frozenset[int] | None


def write_zip(
    results_folder: str | Path,
    zip_path: str | Path,
    layout: str = "davis",
    sequences: Sequence[str] | None = None,
) -> None:
    """Packs `results_folder/<sequence>/<frame>.png` into the zip that a server expects.

    The same masks give the same bytes. Files beside the sequences (score tables, logs) and hidden
    files are left out. The zip appears under its name only when complete.

    Args:
      results_folder: folder with one folder of masks per sequence.
      zip_path: the zip to write; replaced where it exists.
      layout: "davis" or "youtube_vos".
      sequences: packs only these; None packs all.

    Raises:
      FileNotFoundError: when the folder, or one of `sequences`, is missing or has no masks.
      ValueError: for an unknown layout. Other files than masks, such as a file manager's, are left
        out with a warning.
    """
    if layout not in ARCHIVE_FOLDERS:
        raise ValueError(f"layout is {layout!r}, expected one of {sorted(ARCHIVE_FOLDERS)}")
    files = _files_to_pack(Path(results_folder))
    if sequences is not None:
        files = {name: path for name, path in files.items() if name.split("/")[0] in sequences}
    for name in [n for n in files if n.count("/") != 1 or not n.endswith(".png")]:
        LOGGER.warning("%s: not packed; expected <sequence>/<frame>.png", files.pop(name))
    packed = {name.split("/")[0] for name in files}
    missing = sorted(set(sequences or ()) - packed)
    if missing or not files:
        raise FileNotFoundError(f"{results_folder}: no masks of {missing or 'any sequence'}")

    with replacing(zip_path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(ARCHIVE_FOLDERS[layout] + name, ZIP_DATE)
            info.create_system = 3  # Unix, on any machine; the permissions are Unix's
            info.external_attr = 0o644 << 16
            # PNGs do not shrink further, and stored bytes depend on no version of zlib.
            archive.writestr(info, files[name].read_bytes(), zipfile.ZIP_STORED)


def check_submission(
    submission: str | Path,
    root: str | Path,
    dataset: str = "davis2017",
    split: str = "test-dev",
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
) -> list[str]:
    """Says what a server would reject in a submission.

    Checked: the folder inside the archive; missing and extra sequences and frames; files that are
    not PNGs, damaged, not 8-bit palette or grey, of another size than the frames; ids that are not
    in the first mask (DAVIS) or in `meta.json` (YouTube-VOS).

    Args:
      submission: a zip, or a folder that `write_zip` would pack; what it leaves out is not looked
        at.
      root: folder of the data set: lists, frames and first masks, or `meta.json` and frames.
      dataset: "davis2016", "davis2017" or "youtube_vos".
      split: list of `ImageSets/<year>`, or folder of YouTube-VOS.
      resolution: DAVIS only, name of the folder under `JPEGImages` and `Annotations`.
      sequences: expects only these; None expects all of the split.

    Returns:
      One line per problem; empty when the submission would be accepted.

    Raises:
      FileNotFoundError: when the submission, or a part of the data set, is missing.
      ValueError: for an unknown data set or sequence.
    """
    submission = Path(submission)
    expected = expected_sequences(root, dataset, split, resolution, sequences)
    folder = ARCHIVE_FOLDERS[DATASETS[dataset]]
    if submission.is_dir():
        files = {name: path.read_bytes for name, path in _files_to_pack(submission).items()}
        return _problems(files, "", expected)
    if not submission.is_file():
        raise FileNotFoundError(f"{submission}: no such zip or folder")
    try:
        with zipfile.ZipFile(submission) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            if any(info.flag_bits & 1 for info in members):
                return [f"{submission.name} is encrypted"]
            repeats = Counter(info.filename for info in members)
            repeated = [
                f"{name} is in the archive {n} times" for name, n in repeats.items() if n > 1
            ]
            files = {info.filename: partial(archive.read, info) for info in members}
            return repeated + _problems(files, folder, expected)
    except (zipfile.BadZipFile, NotImplementedError) as error:  # the latter: of a future version
        return [f"{submission.name} is not a zip file, or is damaged: {error}"]


def expected_sequences(
    root: str | Path,
    dataset: str,
    split: str,
    resolution: str = "480p",
    sequences: Sequence[str] | None = None,
) -> dict[str, ExpectedSequence]:
    """Returns what a submission must hold, by sequence; see `check_submission`."""
    root = Path(root)
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}, expected one of {sorted(DATASETS)}")
    if DATASETS[dataset] == "youtube_vos":
        return _expected_youtube_vos(root, split, sequences)
    year = int(dataset.removeprefix("davis"))
    expected = {}
    for video in evaluation_videos(root, year, split, resolution, sequences):
        ids = ids_in(read_label(video, video.given[0], refuse_shades=False)).tolist()
        expected[video.name] = ExpectedSequence(
            frames=tuple(path.stem for path in video.frames),
            size=image_size(video.frames[0]),
            ids=None if video.reading == "binary" else frozenset(ids) - {0},
        )
    return expected


def _expected_youtube_vos(
    root: Path, split: str, videos: Sequence[str] | None
) -> dict[str, ExpectedSequence]:
    expected = {}
    for video, objects in read_meta(root, split, videos).items():
        frames = sorted({frame for o in objects.values() for frame in o.frames}, key=int)
        expected[video] = ExpectedSequence(
            frames=tuple(frames),
            size=image_size(root / split / "JPEGImages" / video / f"{frames[0]}.jpg"),
            ids=frozenset(objects),
        )
    return expected


def _files_to_pack(results_folder: Path) -> dict[str, Path]:
    """Returns the files in sub-folders by their name relative to the folder, hidden ones aside."""
    if not results_folder.is_dir():
        raise FileNotFoundError(f"{results_folder}: no such folder of masks")

    def refuse(error: OSError) -> None:
        raise error

    files = {}
    for folder in sorted(results_folder.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        for parent, _, names in os.walk(folder, onerror=refuse):
            for path in sorted(Path(parent) / name for name in names):
                relative = path.relative_to(results_folder)
                if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                    files[relative.as_posix()] = path
    return files


def _problems(
    files: Mapping[str, Callable[[], bytes]],
    folder: str,
    expected: Mapping[str, ExpectedSequence],
) -> list[str]:
    """Returns the problems of a set of files, given by their names in the archive."""
    wanted = {
        f"{folder}{name}/{frame}.png": (name, frame)
        for name, sequence in expected.items()
        for frame in sequence.frames
    }
    present = [name for name in wanted if name in files]
    if not present:
        # One wrong folder would otherwise be reported as every file missing and every file extra.
        return [_wrong_root(files, folder, expected)]

    problems = _extra_files(sorted(set(files) - set(wanted)), folder, expected)
    missing = defaultdict(list)
    for name, (sequence, frame) in wanted.items():
        if name not in files:
            missing[sequence].append(frame)
    for sequence, frames in missing.items():
        whole = len(frames) == len(expected[sequence].frames)
        problems.append(
            f"{sequence}: " + ("missing" if whole else f"missing {_count_frames(frames)}")
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(
            lambda name: _content_problem(files[name], expected[wanted[name][0]]), present
        )
        by_problem = defaultdict(list)
        for name, problem in zip(present, found, strict=True):
            if problem:
                sequence, frame = wanted[name]
                by_problem[sequence, problem].append(frame)
    for (sequence, problem), frames in by_problem.items():
        problems.append(f"{sequence}: {problem} ({_count_frames(frames)})")
    return problems


def _wrong_root(files: Iterable[str], folder: str, expected: Mapping[str, ExpectedSequence]) -> str:
    """Describes a submission of which no file is where it belongs."""
    shape = f"{folder}<sequence>/<frame>.png"
    for name in files:
        path = PurePosixPath(name)
        sequence = expected.get(path.parent.name)
        if sequence and path.suffix == ".png" and path.stem in sequence.frames:
            return f"wrong folder: expected {shape}, found {name}"
    first = min(files, default="no file")
    return f"no mask of this split: expected {shape} of {len(expected)} sequences, found {first}"


def _extra_files(
    names: Iterable[str], folder: str, expected: Mapping[str, ExpectedSequence]
) -> list[str]:
    """Describes files that a server does not expect, counted by their folder, sequence or kind."""
    problems, sequences, frames, elsewhere = [], Counter(), defaultdict(list), defaultdict(list)
    for name in names:
        inside = PurePosixPath(name.removeprefix(folder))
        if not name.startswith(folder) or len(inside.parts) != 2:
            elsewhere[name.split("/")[0]].append(name)
        elif inside.parts[0] not in expected:
            sequences[inside.parts[0]] += 1
        elif inside.suffix != ".png":
            problems.append(f"{name}: expected only .png files")
        else:
            frames[inside.parts[0]].append(inside.stem)
    for top, found in elsewhere.items():
        what = found[0] if len(found) == 1 else f"{top}: {len(found)} files, first {found[0]}"
        problems.append(f"{what}: expected only {folder}<sequence>/<frame>.png")
    problems += [
        f"{name}: not a sequence of this split ({n} files)" for name, n in sequences.items()
    ]
    problems += [f"{name}: extra {_count_frames(extra)}" for name, extra in frames.items()]
    return problems


def _content_problem(read: Callable[[], bytes], expected: ExpectedSequence) -> str | None:
    """Returns what is wrong with a mask, in words that are the same for the same problem."""
    try:
        data = read()
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "PNG":
                return f"a {image.format} file, expected PNG"
            if image.mode not in SUBMITTED_MODES:
                return f"pixels of type {image.mode}, expected an 8-bit palette or grey PNG of ids"
            if (image.height, image.width) != expected.size:
                return (
                    f"size {image.height} x {image.width}, expected "
                    f"{expected.size[0]} x {expected.size[1]}"
                )
        ids = set(ids_in(np.array(decode_picture(data, ""))).tolist()) - {0}
    except PermissionError:  # of this machine, not of the submission
        raise
    except NotImplementedError:
        return "packed by a method that Python cannot read, expected a zip stored or deflated"
    except (OSError, EOFError, SyntaxError, ValueError, zipfile.BadZipFile, *_UNPACKING):
        return "not a picture, or damaged"
    except Image.DecompressionBombError:
        return "a picture far too large"
    if expected.ids is None:
        return f"{len(ids)} different ids, expected a single object" if len(ids) > 1 else None
    if not ids <= expected.ids:
        return f"ids {sorted(ids - expected.ids)}, expected only {sorted(expected.ids)}"
    return None


def _count_frames(frames: list[str]) -> str:
    return f"frame {frames[0]}" if len(frames) == 1 else f"{len(frames)} frames, first {frames[0]}"
