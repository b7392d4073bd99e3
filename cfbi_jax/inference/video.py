"""Frames in, masks and pictures out, while the computation goes on."""

import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from cfbi_jax.data import image_files
from cfbi_jax.data.image_files import VOC_PALETTE
from cfbi_jax.files import BadFile

LOGGER = logging.getLogger(__name__)

# A video's place that cannot be read may be as long as this before it counts as the end.
DAMAGED_FRAMES = 100
_BOX_NAME = re.compile(rb"[ -~]{4}")
# The header of an mp4 file's track: version, times (of 8 bytes in version 1), and the first five
# numbers of the matrix by which it is shown, row by row.
_TRACK_MATRIX = re.compile(rb"tkhd(?:\x00.{39}|\x01.{51})(.{20})", re.DOTALL)


def read_frames(source: Path | str) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The RGB frames of a folder of pictures or of a video file, one at a time.

    A folder's frames come in the order of the numbers in their names; their sizes are checked
    here, before the first one is read. A video file is turned upright if it says how; one that
    players mirror (mp4), and a picture that viewers turn (EXIF), is an error, as masks drawn on
    what they show would not fit.

    Errors: FileNotFoundError for a missing source or an empty folder; ValueError for a file that is
    no video or picture or is cut short (mp4 and AVI), a damaged frame, a picture of another size,
    no frame. Fewer frames than a video file states are told: it may only estimate them, or hide
    some. OpenCV scales a video file's frames to the size of its first.
    """
    source = Path(source)
    if source.is_dir():
        paths = image_files.list_frames(source)
        size = image_files.image_size(paths[0])
        for path in paths:
            found = image_files.image_size(path)
            if found != size:
                raise ValueError(
                    f"{source}: {path.name} has {found[0]} x {found[1]} pixels (height x width); "
                    f"expected {size[0]} x {size[1]} as in the first frame"
                )
        return (image_files.read_frame(path) for path in paths)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such folder of frames or video file")
    _check_complete(source)
    _check_not_mirrored(source)
    capture = open_video(source)
    if not capture.isOpened():
        raise ValueError(f"{source}: no video that can be read; expected e.g. an mp4 file")
    return _decode_video(capture, source)


def open_video(path: Path) -> cv2.VideoCapture:
    return cv2.VideoCapture(
        str(path.absolute())
    )  # FFmpeg takes what is before a colon for a protocol


def _check_complete(path: Path) -> None:
    """Raises ValueError for an mp4 or AVI file that ends before its last part does."""
    length, end = path.stat().st_size, 0
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] == b"RIFF":
        size = int.from_bytes(start[4:], "little")
        end = 0 if size == 0xFFFFFFFF else 8 + size  # not known while it was written
    end = max((end for _, _, end in _boxes(path)), default=end)
    if end > length:
        raise ValueError(f"{path}: cut short; it has {length} bytes, expected {end}")


def _boxes(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Name, first and last byte (exclusive) of every outermost box of an mp4 file; else none."""
    length, begin = path.stat().st_size, 0
    with path.open("rb") as file:
        start = file.read(16)
        # Box after box: size, name, content. Cameras put other things behind the last one.
        while start[4:8] == b"ftyp" if begin == 0 else _BOX_NAME.fullmatch(start[4:8]):
            size = int.from_bytes(start[:4], "big")
            if size == 1:
                size = int.from_bytes(start[8:16], "big")
            end = begin + size if size >= 8 else length  # 0: up to the end of the file
            yield start[4:8], begin, end
            if end >= length:
                return
            begin = end
            file.seek(begin)
            start = file.read(16)


def _check_not_mirrored(path: Path) -> None:
    """Raises ValueError for an mp4 file that players show mirrored: OpenCV turns it only."""
    index = b""
    with path.open("rb") as file:
        for name, begin, end in _boxes(path):
            if name == b"moov":
                file.seek(begin)
                index = file.read(end - begin)
    for matrix in _TRACK_MATRIX.findall(index):
        a, b, _, c, d = np.frombuffer(matrix, ">i4").tolist()
        if a * d < b * c:
            raise BadFile(
                f"{path}: players mirror this video, and only turns are read; expected it encoded "
                "as it is shown (ffmpeg -i IN OUT.mp4)"
            )


def _decode_video(
    capture: cv2.VideoCapture, source: Path
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Yields the RGB frames of an opened video file and releases it."""
    try:
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less: not known
        decoded = 0
        while True:
            good, bgr = capture.read()
            if not good:
                break
            decoded += 1
            yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        if any(capture.read()[0] for _ in range(DAMAGED_FRAMES)):  # so this was not the end
            raise BadFile(
                f"{source}: frame {decoded} is damaged, later ones can be read; expected a video "
                "without such places, e.g. encoded anew (ffmpeg -i IN OUT.mp4)"
            )
        if decoded == 0:
            code = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
            raise ValueError(
                f"{source}: no frame can be read (codec {code.decode(errors='replace')}); expected "
                "a video that OpenCV decodes, e.g. encoded anew (ffmpeg -i IN OUT.mp4)"
            )
        if decoded < stated:
            LOGGER.warning("%s: %d frames can be read; it states %d", source, decoded, stated)
    finally:
        capture.release()


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


class MaskWriter:
    """Writes masks in a few threads, so that the computation need not wait for PNG files.

        with MaskWriter() as writer:
            writer.write(path, label)

    At most `pending` masks wait; `write` blocks then, which bounds the memory. An error in writing
    is raised by a later `write`, or at the end of the block, which waits for all masks. When the
    block ends by an error, masks that wait are still written (not after Ctrl-C) and that error goes
    on.
    """

    def __init__(self, threads: int = 2, pending: int = 16):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mask-writer")
        self._pending: deque[Future[None]] = deque()
        self._limit = pending

    def write(
        self,
        path: Path | str,
        label: np.ndarray,
        palette: UInt8[np.ndarray, "256 3"] = VOC_PALETTE,
    ) -> None:
        """Hands a mask over; see `image_files.write_mask`. The label may be changed afterwards."""
        self.submit(image_files.write_mask, path, np.array(label), palette)

    def submit(self, write: Callable, *arguments: Any) -> None:
        """The same for any function that writes a file; the arguments are not to be changed."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._limit):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(write, *arguments))

    def __enter__(self) -> "MaskWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        self._pool.shutdown(wait=True, cancel_futures=interrupted)
        if error is None:
            for job in self._pending:
                job.result()


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


def overlay(
    frame: UInt8[np.ndarray, "height width 3"],
    label: UInt8[np.ndarray, "height width"],
    alpha: float = 0.5,
    palette: UInt8[np.ndarray, "256 3"] = VOC_PALETTE,
) -> UInt8[np.ndarray, "height width 3"]:
    """The frame with each object tinted (`alpha` of its colour) and outlined in full colour.

    Errors: ValueError for a label of another size.
    """
    if frame.shape[:2] != label.shape:
        raise ValueError(f"a frame of {frame.shape[:2]} pixels and a label of {label.shape}")
    colours = palette[label]
    tinted = cv2.addWeighted(frame, 1 - alpha, colours, alpha, 0)
    kernel = np.ones((3, 3), np.uint8)
    # The outermost pixels of an object, except along the border of the picture.
    outline = cv2.erode(label, kernel) != cv2.dilate(label, kernel)
    tinted[outline] = colours[outline]
    return np.where(label[..., None] > 0, tinted, frame)
