"""Videos to train on as TFDS records: written once, then read frame by frame in any order.

    folder = prepare("davis_2017", davis.training_files("DAVIS"), "records")
    video = RecordVideos(folder).video(0)
    video.frame(3), video.mask(3)

Only the frames asked for are read and decoded.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cfbi_jax.data.image_files import decode_frame, decode_mask
from cfbi_jax.data.videos import Reading, TrainingFiles
from cfbi_jax.files import BadFile

LOGGER = logging.getLogger(__name__)


def prepare(name: str, files: Sequence[TrainingFiles], folder: Path | str) -> Path:
    """Copies the videos' bytes into ArrayRecord below `folder`, unless that is done already.

    The records are as large as the files and appear complete or not at all. Returns the folder of
    the records, for `RecordVideos`.

    Args:
      name: a folder's name, another one for each set of videos.
      files: as `davis.training_files` or `youtube_vos.training_files` give them.
      folder: where the records are kept.

    Errors: FileNotFoundError for a missing file; ValueError for no videos, a file that is no
    picture or cut short, sizes that disagree in a video (all before anything is written), and for
    records of that name that are damaged or made from other files; OSError for a full disk.
    """
    import tensorflow_datasets as tfds  # 0.6 s

    from cfbi_jax.data.builders import VideoFrames

    tfds.disable_progress_bar()
    builder = VideoFrames(files=files, data_dir=Path(folder) / name)
    for unfinished in builder.data_path.parent.glob("incomplete.*"):
        LOGGER.warning(
            "%s: left by an interrupted preparation; delete it, unless one is running", unfinished
        )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints of downloads that there are none
        builder.download_and_prepare()
    return Path(builder.data_path)


def damaged(folder: os.PathLike, what: Exception | str) -> BadFile:
    """The error to raise for records that are not as they were written."""
    return BadFile(f"{folder}: damaged records ({what}); delete this folder to have them made anew")


@dataclass(frozen=True)
class RecordVideo:
    """One video of `RecordVideos`, of `len` frames. Those of another index raise IndexError.

    Attributes:
      name: the folder's name.
      reading: what the masks' values mean.
      first: its first record.
      length: how many records it has, one per frame.
    """

    videos: "RecordVideos"
    name: str
    reading: Reading
    first: int
    length: int

    def __len__(self) -> int:
        return self.length

    def frame(self, t: int) -> UInt8[np.ndarray, "height width 3"]:
        """Frame `t` (from 0) as RGB. Errors: IndexError; BadFile, also for a damaged record."""
        record = self._record(t)
        with self._copied():
            return decode_frame(record["frame"], self._file(record, "frame"))

    def mask(self, t: int) -> UInt8[np.ndarray, "height width"]:
        """The ids at frame `t`: 0 or 1 if there is but one object; 255 where void, if there is any.

        Errors: IndexError; those of `decode_mask`, but for shades, which no file had when it was
        copied.
        """
        record = self._record(t)
        with self._copied():
            label = decode_mask(record["mask"], self._file(record, "mask"), refuse_shades=False)
        return (label > 0).astype(np.uint8) if self.reading == "binary" else label

    def _record(self, t: int) -> dict[str, Any]:
        # Without this the neighbouring video would answer.
        if not 0 <= t < self.length:
            raise IndexError(f"{self.name}: frame {t}; expected 0 to {self.length - 1}")
        try:
            return self.videos.source[self.first + t]
        except RuntimeError as error:  # what ArrayRecord raises
            raise damaged(self.videos.folder, error) from error

    @contextlib.contextmanager
    def _copied(self) -> Iterator[None]:
        """Adds to an error of the copy what is to be done about it."""
        try:
            yield
        except BadFile as error:
            raise BadFile(
                f"{error}; mend the file that this is a copy of, and delete {self.videos.folder}"
            ) from error

    def _file(self, record: dict[str, Any], kind: str) -> str:
        return f"{self.videos.folder}: {kind} {self.name}/{record['stem'].decode()}"


class RecordVideos:
    """The videos in a folder of records, in the order in which they were given to `prepare`.

    Pickles to a list of the videos, and reads in any process.

    Args:
      folder: what `prepare` returned, or a builder's `data_dir`.

    Attributes:
      digest: of the files that the records were made from.
      largest_ids: the largest object id of each video, 0 for none; empty where the records are
        older than this.

    Errors: FileNotFoundError for a folder without (complete) records.
    """

    def __init__(self, folder: os.PathLike | str):
        self.folder = Path(folder).absolute()
        metadata = self.folder / "metadata.json"
        if not metadata.is_file():
            raise FileNotFoundError(f"{metadata}: no such file; expected a folder of records")
        self._videos: list[tuple[str, str, int, int]] = []
        first = 0
        content = json.loads(metadata.read_text())
        videos = content["videos"]
        self.largest_ids: dict[str, int] = content.get("largest_ids", {})
        self.digest = hashlib.blake2b(json.dumps(videos).encode(), digest_size=8).hexdigest()
        for video in videos:
            length = len(video["frames"])
            self._videos.append((video["name"], video["reading"], first, length))
            first += length

    @functools.cached_property
    def source(self):
        """TFDS's random access to the records; opened by the process that first reads."""
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.folder).as_data_source("train")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "source"}

    def __len__(self) -> int:
        return len(self._videos)

    def video(self, index: int, rng: np.random.Generator | None = None) -> RecordVideo:
        """Video `index`; nothing in it is random, so `rng` is not used. Errors: IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: video {index}; expected 0 to {len(self) - 1}")
        name, reading, first, length = self._videos[index]
        return RecordVideo(self, name, reading, first, length)
