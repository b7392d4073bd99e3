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
import re
import signal
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from cfbi_jax import VideoSegmenter
from cfbi_jax.data.image_files import (
    VOC_PALETTE,
    ids_in,
    list_frames,
    read_mask,
    read_palette,
    write_image,
)
from cfbi_jax.files import check_writable, path_of
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.video import (
    MaskWriter,
    count_frames,
    overlay,
    read_frames,
    stated_by,
    video_writer,
)

PICTURES_PER_SECOND = 24.0  # of an overlay where the video is a folder
EXISTS = "exists; delete it, or choose another --output"


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


def main(arguments: argparse.Namespace) -> None:
    options = Options(**options_of(arguments.option))
    video, output = arguments.video, arguments.output
    frames = read_frames(video)
    first = next(frames)
    frames = itertools.chain([first], frames)
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
    masks = read_masks(paths, video, first.shape[:2], count, names)
    palette = read_palette(paths[min(paths)])
    if palette is None:
        palette = VOC_PALETTE

    results = [output / name for name in ("masks", "overlay.mp4", "cutouts")]
    if there := ", ".join(str(path) for path in results if path.exists()):
        raise FileExistsError(f"{there}: {EXISTS}")
    check_writable(output)
    masks_folder, overlay_path, cutouts = results

    seen = deque()  # frames whose masks are still to come

    def remembered() -> Iterator[np.ndarray]:
        for frame in frames:
            if arguments.overlay or arguments.cutouts:
                seen.append(frame)
            yield frame

    ids = sorted(set().union(*(ids_in(mask).tolist() for mask in masks.values())) - {0})
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(masks_folder))
        segmenter = VideoSegmenter.from_checkpoint(
            arguments.checkpoint, **dataclasses.asdict(options)
        )
        labels = segmenter.segment(remembered(), masks)
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
                for object_id in ids:
                    path = cutouts / str(object_id) / f"{name}.png"
                    writer.submit(write_cutout, path, frame, label == object_id)
    for path in results:
        if path.exists():
            print(f"wrote {path}")


def read_masks(
    paths: dict[int, Path],
    video: Path,
    size: tuple[int, int],
    count: int,
    names: list[str] | None,
) -> dict[int, np.ndarray]:
    """The given masks by frame, of a video of `count` frames of `size` (height, width), which have
    `names` where they are pictures. Errors: ValueError that names the file."""
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
    return masks


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder, which one of several processes can, and removes it if nothing came into it.
    Raises FileExistsError where it is there."""
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise FileExistsError(f"{folder}: {EXISTS}") from error
    try:
        yield
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_cutout(path: Path, frame: np.ndarray, mine: np.ndarray) -> None:
    """The frame where `mine` is true; all else is black and transparent."""
    opaque = np.dstack([frame, np.full(mine.shape, 255, np.uint8)])
    write_image(path, opaque * mine[..., None])


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
