"""Cuts the objects of given masks out of a video.

    python scripts/segment.py --checkpoint CKPT --video video.mp4 --masks first.png --output OUT \\
        --overlay --cutouts

`--video` is a video file, or a folder of pictures in the order of the numbers in their names.
Masks are indexed or grey PNGs of its size: 0 is the background, other values are object ids. The
first one is frame 0's; `40=later.png` is frame 40's, for new objects or corrections: frames count
from 0, whatever pictures are called, and where a later mask is 0 the prediction stays.

    OUT/masks/00000.png        masks: indexed; a picture's mask has its name
    OUT/overlay.mp4            --overlay: the video with the objects coloured
    OUT/cutouts/1/00000.png    --cutouts: object 1, all else black and transparent

What an interrupted run has made stays, and is never replaced: delete it to repeat the command.

`--option NAME=VALUE` sets a field of `cfbi_jax.inference.options.Options`:
`--option "scales=(1.0, 1.3)" --option compute_dtype=bfloat16`. Bad input gives a message and exit
status 1.
"""

import argparse
import ast
import contextlib
import dataclasses
import itertools
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from cfbi_jax import VideoSegmenter
from cfbi_jax.data.image_files import (
    VOC_PALETTE,
    list_frames,
    read_mask,
    read_palette,
    write_image,
)
from cfbi_jax.files import check_writable, path_of
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.video import MaskWriter, open_video, overlay, read_frames

PICTURES_PER_SECOND = 24.0  # of an overlay where the video is a folder


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=path_of)
    parser.add_argument("--video", required=True, type=path_of, help="video file or folder")
    parser.add_argument(
        "--masks",
        required=True,
        nargs="+",
        action="extend",
        metavar="[FRAME=]PNG",
        help="frame 0 if not named",
    )
    parser.add_argument("--output", required=True, type=path_of)
    parser.add_argument("--overlay", action="store_true", help="write OUT/overlay.mp4")
    parser.add_argument("--cutouts", action="store_true", help="write OUT/cutouts/<id>/")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args(arguments)


def mask_paths(arguments: list[str]) -> dict[int, Path]:
    """`["first.png", "40=later.png"]` -> `{0: first.png, 40: later.png}`."""
    paths = {}
    for argument in arguments:
        frame, path = re.fullmatch(r"(?:(\d+)=)?(.*)", argument, re.DOTALL).groups()
        if not path:
            raise ValueError(f"--masks {argument!r}: expected the name of a PNG")
        frame = int(frame or 0)
        if frame in paths:
            raise ValueError(f"two masks for frame {frame}: {paths[frame]} and {path}")
        paths[frame] = path_of(path)
    return paths


def options_of(arguments: list[str]) -> dict[str, Any]:
    """`["flip=True"]` -> `{"flip": True}`; the values are Python's, or text."""
    known = [field.name for field in dataclasses.fields(Options)]
    options = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--option {argument}: expected NAME=VALUE with one of {known}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


@contextlib.contextmanager
def video_writer(path: Path, per_second: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that adds an RGB frame. The file appears at the end; where an error or
    Ctrl-C is the end, with the frames so far, as those of the masks.

    Codecs want even sizes: an odd one is filled up with its last row or column.
    Errors: OSError where OpenCV cannot write such a file, or wrote less than it was given.
    """
    temporary = path.absolute().with_name(f".{os.getpid()}-{path.name}")  # see open_video
    writer = cv2.VideoWriter()
    written = 0
    if per_second > 65:  # MPEG-4 counts time in 1/65535 seconds, OpenCV in thousandths of a frame
        per_second = round(per_second)

    def write(rgb: np.ndarray) -> None:
        nonlocal written
        height, width = rgb.shape[:2]
        rgb = cv2.copyMakeBorder(rgb, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if not writer.isOpened():
            size = rgb.shape[1], rgb.shape[0]
            if not writer.open(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), per_second, size):
                what = f"{size[0]} x {size[1]} pixels, {per_second:g} frames per second"
                raise OSError(f"{path}: OpenCV cannot write a video of {what}")
        writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        written += 1

    ended = False
    try:
        yield write
        ended = True
    finally:
        writer.release()
        try:
            found = stated_by(temporary)[0] if written else 0
            if ended and found != written:  # OpenCV does not say that the disk is full
                raise OSError(f"{path}: {found} of {written} frames were written; a full disk?")
            if found:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def stated_by(video: Path) -> tuple[int, float]:
    """Frames of a video file and frames per second, as it says; 0 where it does not."""
    capture = open_video(video)
    try:
        count, per_second = (capture.get(x) for x in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    return max(int(count), 0), max(per_second, 0.0)


def count_frames(video: Path) -> int:
    """Frames of a video file that can be read. Decodes all: what files state is an estimate, or
    counts frames that are cut off."""
    capture = open_video(video)
    try:
        return sum(1 for _ in iter(capture.grab, False))
    finally:
        capture.release()


def main(arguments: argparse.Namespace) -> None:
    options = Options(**options_of(arguments.option))
    video, output = arguments.video, arguments.output
    frames = read_frames(video)
    first = next(frames)
    size, frames = first.shape[:2], itertools.chain([first], frames)
    paths = mask_paths(arguments.masks)
    names, per_second = None, PICTURES_PER_SECOND
    if video.is_dir():
        names = [path.stem for path in list_frames(video)]
        count = len(names)
    else:
        count, stated = stated_by(video)
        per_second = stated or per_second
        if any(paths):
            count = count_frames(video)
    late = [frame for frame in sorted(paths) if frame and frame >= count]
    if late:
        raise ValueError(f"masks for frames {late}; {video} has {count} frames, from 0 on")
    for frame, path in sorted(paths.items()):
        if path.parent.resolve() == video.resolve():
            raise ValueError(f"{path}: a mask among the pictures of the video; move it elsewhere")
        if frame and names:
            print(f"{path}: the mask of {names[frame]}")
    masks = {frame: read_mask(path) for frame, path in paths.items()}
    for frame, mask in masks.items():
        if mask.shape != size:
            raise ValueError(
                f"{paths[frame]}: {mask.shape[0]} x {mask.shape[1]} pixels (height x width); "
                f"expected {size[0]} x {size[1]} as the frames of {video}, upright"
            )
    palette = read_palette(paths[min(paths)])
    if palette is None:
        palette = VOC_PALETTE

    results = [output / name for name in ("masks", "overlay.mp4", "cutouts")]
    there = ", ".join(str(path) for path in results if path.exists())
    if there:
        raise FileExistsError(f"{there}: exists; delete it, or choose another --output")
    ids = sorted(set().union(*(np.unique(mask).tolist() for mask in masks.values())) - {0})
    masks_folder, overlay_path, cutouts = results
    check_writable(output)

    seen = deque()  # frames whose masks are still to come

    def remembered() -> Iterator[np.ndarray]:
        for frame in frames:
            if arguments.overlay or arguments.cutouts:
                seen.append(frame)
            yield frame

    segmenter = VideoSegmenter.from_checkpoint(arguments.checkpoint, **dataclasses.asdict(options))
    labels = segmenter.segment(remembered(), masks)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(MaskWriter())
        if arguments.overlay:
            write_frame = stack.enter_context(video_writer(overlay_path, per_second))
        for index, label in enumerate(track(labels, "segmenting", count or None)):
            name = f"{index:05d}" if names is None else names[index]
            writer.write(masks_folder / f"{name}.png", label, palette)
            if not seen:
                continue
            frame = seen.popleft()
            if arguments.overlay:
                write_frame(overlay(frame, label, palette=palette))
            if arguments.cutouts:
                opaque = np.dstack([frame, np.full_like(label, 255)])
                for object_id in ids:
                    path = cutouts / str(object_id) / f"{name}.png"
                    write_image(path, opaque * (label == object_id)[..., None])
    for path in results:
        if path.exists():
            print(f"wrote {path}")


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave no temporary file
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        main(parse_arguments())
    except KeyboardInterrupt:
        said = "interrupted: --output holds the first frames only; delete it to repeat the command"
        print(said, file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")
