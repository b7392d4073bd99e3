"""Segments the videos of a data set into a folder of PNGs; resumes, and shares the work.

    OUT/Annotations/<video>/00000.png   the results
    OUT/segmented/<video>.json          written last: the video is finished, and what made it
    OUT/segmented/<video>.lock          held (flock) by the process that works on the video

Several processes, on one host or on several that share the folder, can run the same command: each
takes the next video that nobody holds. A lock goes with its process, so nothing has to be cleaned
up after a crash, and a video without its JSON file is done again.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cfbi_jax import locks
from cfbi_jax.data.image_files import (
    VOC_PALETTE,
    read_frame,
    read_mask,
    read_palette,
    write_image,
)
from cfbi_jax.data.videos import EvaluationVideo, read_given
from cfbi_jax.files import BadFile, write_file
from cfbi_jax.inference.segmenter import VideoSegmenter
from cfbi_jax.inference.video import MaskWriter, overlay

LOGGER = logging.getLogger(__name__)

OVERLAY_FRAMES = 4


@dataclasses.dataclass(frozen=True)
class Segmented:
    """One finished video. compute_seconds: the sum of its frames' computations alone; seconds:
    with decoding and writing as well, from its first frame to its last file."""

    name: str
    frames: int
    seconds: float
    compute_seconds: float


def results_folder(output: Path) -> Path:
    return output / "Annotations"


def segment_videos(
    segmenter: VideoSegmenter,
    videos: Sequence[EvaluationVideo],
    output: Path,
    made_by: Mapping,
    overwrite: bool,
    overlays: bool,
) -> list[Segmented]:
    """Segments all videos that are not finished and that no other process holds.

    Args:
      made_by: what the results depend on beside the video itself, JSON values; stored with every
        finished video.
      overwrite: do videos again that were finished before this call. Their records go first: an
        interrupted call goes on without it.
      overlays: also write OUT/overlays/<video>.png, a strip of a few frames.

    Returns the videos that this process did. Raises BadFile at a video that was finished by
    something else (`check_made_by` says so of all of them, before anything is computed).
    """
    (output / "segmented").mkdir(parents=True, exist_ok=True)
    if overwrite:
        for video in videos:
            _forget(video, output)
    done: list[Segmented] = []
    left = list(videos)
    with _Meter() as meter:
        while left:
            meter.expect(left)
            before, held_elsewhere = len(done), []
            for video in left:
                with _hold(_lock(video, output)) as held:
                    if not held:
                        LOGGER.info("%s: another process is at work on it", video.name)
                        held_elsewhere.append(video)
                        meter.skip(video)
                    elif _finished_by(video, output) is None:
                        done.append(
                            _segment_video(segmenter, video, output, meter, made_by, overlays)
                        )
                    else:  # perhaps by another process, and since the check above
                        check_made_by([video], output, made_by)
                        if overlays and not _overlay_path(output, video).exists():
                            _write_overlay(output, video)
                        LOGGER.info("%s: finished before", video.name)
                        meter.skip(video)
            # Meanwhile a process that held one may have ended without finishing it.
            left = held_elsewhere if len(done) > before else []
    return done


def check_made_by(videos: Sequence[EvaluationVideo], output: Path, made_by: Mapping) -> None:
    """Raises BadFile, with a list of the differences, if finished videos in `output` were made by
    something else than `made_by`, or if there are masks that no run of ours has begun."""
    for video in videos:
        found = _recorded(video, output)
        if found is None:
            folder = results_folder(output) / video.name
            if next(folder.glob("*.png"), None) and not _lock(video, output).exists():
                raise BadFile(
                    f"{folder}: masks that were made by something else; choose another --workdir, "
                    "or --config.overwrite=True to replace them"
                )
            continue
        now = _made_by(made_by, video)
        different = [
            f"{key}: {found.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(set(found) | set(now))
            if found.get(key) != now.get(key)
        ]
        if different:
            raise BadFile(
                f"{_record(video, output)}: the finished results were made by something else:\n  "
                + "\n  ".join(different)
                + "\nchoose another --workdir, or --config.overwrite=True to replace them"
            )


def _made_by(made_by: Mapping, video: EvaluationVideo) -> dict:
    """With what identifies the video, and as it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps({**made_by, "video": identity(video)}))


def identity(video: EvaluationVideo) -> str:
    """A hash of what is segmented: frames by name and size, given masks by content."""
    state = hashlib.blake2b(digest_size=16)
    for path in video.frames:
        state.update(f"{path.name} {path.stat().st_size}\n".encode())
    for index in sorted(video.given):
        state.update(f"{index}\n".encode())
        state.update(video.given[index].read_bytes())
    state.update(repr((video.save, video.reading, sorted(video.starts.items()))).encode())
    return state.hexdigest()


def unfinished(videos: Sequence[EvaluationVideo], output: Path) -> list[str]:
    """Names of the videos without a finished result: those that other processes still work on."""
    return [video.name for video in videos if _finished_by(video, output) is None]


def is_finished(video: EvaluationVideo, output: Path, made_by: Mapping) -> bool:
    """Whether all masks of a video are there, made by `made_by`."""
    return _finished_by(video, output) == _made_by(made_by, video)


def _record(video: EvaluationVideo, output: Path) -> Path:
    return output / "segmented" / f"{video.name}.json"


def _lock(video: EvaluationVideo, output: Path) -> Path:
    return output / "segmented" / f"{video.name}.lock"


def _forget(video: EvaluationVideo, output: Path) -> None:
    """The video counts as not finished, and no picture shows what its masks were."""
    _record(video, output).unlink(missing_ok=True)
    _overlay_path(output, video).unlink(missing_ok=True)


def _recorded(video: EvaluationVideo, output: Path) -> dict | None:
    """What made a video's masks, as its record says; None for none, or a damaged one."""
    try:
        return json.loads(_record(video, output).read_text())["made_by"]
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _finished_by(video: EvaluationVideo, output: Path) -> dict | None:
    """What made a video's masks; None where one is missing, or the record."""
    folder = results_folder(output) / video.name
    there = {path.name for path in folder.glob("*.png")}
    return _recorded(video, output) if there >= _mask_names(video) else None


def _mask_names(video: EvaluationVideo) -> set[str]:
    return {f"{video.frames[index].stem}.png" for index in video.save}


def _segment_video(
    segmenter: VideoSegmenter,
    video: EvaluationVideo,
    output: Path,
    meter: "_Meter",
    made_by: Mapping,
    overlays: bool,
) -> Segmented:
    """Writes a video's masks, then its picture, then its record."""
    _forget(video, output)
    start = time.perf_counter()
    masks = {index: read_given(video, index) for index in sorted(video.given)}
    palette = read_palette(video.given[min(video.given)])
    if palette is None or video.reading == "binary":
        palette = VOC_PALETTE
    folder = results_folder(output) / video.name
    folder.mkdir(parents=True, exist_ok=True)
    save, names, times = set(video.save), _mask_names(video), []
    for path in folder.glob("*.png"):  # of an earlier run with other frames
        if path.name not in names:
            path.unlink()
    frames = (read_frame(path) for path in video.frames)
    with MaskWriter() as writer:
        for index, label in enumerate(segmenter.segment(frames, masks, times=times)):
            path = video.frames[index]
            if index in save:
                writer.write(folder / f"{path.stem}.png", label, palette)
            meter.frame(video)
    seconds = time.perf_counter() - start
    result = Segmented(video.name, len(video.frames), seconds, sum(times))
    if overlays:
        _write_overlay(output, video)
    content = {**dataclasses.asdict(result), "made_by": _made_by(made_by, video)}
    write_file(_record(video, output), json.dumps(content, indent=1).encode())
    LOGGER.info(
        "%s: %d frames, %.2f per second with decoding and writing, %.2f without; %s",
        result.name,
        result.frames,
        result.frames / result.seconds,
        result.frames / max(result.compute_seconds, 1e-9),
        meter.remaining(),
    )
    return result


def _overlay_path(output: Path, video: EvaluationVideo) -> Path:
    return output / "overlays" / f"{video.name}.png"


def _write_overlay(output: Path, video: EvaluationVideo) -> None:
    """A strip of a finished video's frames with their masks, from the first to the last."""
    count = len(video.save)
    chosen = np.linspace(0, count - 1, min(count, OVERLAY_FRAMES)).round().astype(int)
    pictures = []
    for path in (video.frames[video.save[i]] for i in chosen):
        mask = results_folder(output) / video.name / f"{path.stem}.png"
        pictures.append(overlay(read_frame(path), read_mask(mask, refuse_shades=False)))
    write_image(_overlay_path(output, video), np.concatenate(pictures, axis=1))


class _Meter:
    """Frames per second and time left: a bar on a terminal, else a log line now and then."""

    LOG_EVERY_SECONDS = 60

    def __init__(self):
        self._left = self._done = 0
        self._start = self._logged = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            disable=not rich.get_console().is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", rate="")

    def __enter__(self) -> "_Meter":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def expect(self, videos: Sequence[EvaluationVideo]) -> None:
        self._change(sum(len(video.frames) for video in videos))

    def skip(self, video: EvaluationVideo) -> None:
        self._change(-len(video.frames))

    def _change(self, frames: int) -> None:
        self._left += frames
        self._bar.update(self._task, total=self._left + self._done)

    def frame(self, video: EvaluationVideo) -> None:
        self._done += 1
        self._left -= 1
        now = time.perf_counter()
        self._bar.update(
            self._task, advance=1, description=escape(video.name), rate=self.remaining()
        )
        if self._bar.disable and now - self._logged > self.LOG_EVERY_SECONDS:
            self._logged = now
            LOGGER.info("%s: under way; %s", video.name, self.remaining())

    def remaining(self) -> str:
        rate = self._done / (time.perf_counter() - self._start)
        return f"{rate:.2f} frames per second overall, {self._left / rate:.0f} s left"


@contextmanager
def _hold(path: Path) -> Iterator[bool]:
    """Holds the lock file at `path` if no other process does; yields whether it does."""
    with path.open("a") as file:
        yield locks.take(file)
