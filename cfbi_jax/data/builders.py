"""TFDS builders that copy videos to train on into ArrayRecord, one record per annotated frame.

    builder = DavisFrames(root="DAVIS", config="2017", data_dir="records")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]   {"video", "stem", "frame", "mask"}: bytes, all four

Nothing is downloaded, nothing is encoded anew: `frame` and `mask` are the files as they are. The
split is always called train. `download_and_prepare` compares records that it finds with the files;
`tfds.data_source("davis_frames/2017", ...)` takes those that it finds without looking at the files.
To read videos rather than records: `records.RecordVideos`.

Importing this module imports TFDS, which takes 0.6 s; TensorFlow is not needed.
"""

import contextlib
import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from cfbi_jax import locks
from cfbi_jax.data import davis, youtube_vos
from cfbi_jax.data.records import damaged
from cfbi_jax.data.videos import TrainingFiles, check_training_files, in_threads

LOGGER = logging.getLogger(__name__)

# Of pictures in a shard of the records, which are in memory while it is written.
SHARD_BYTES = 256 << 20


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """There is nothing on Google's servers, and looking leaves an empty folder in /tmp."""


class VideoFrames(tfds.core.ShardBasedBuilder):
    """The records of any videos. The metadata tell which files they were made from.

    Written shard by shard, as TFDS' other builders collect all records before they write any, past
    1000 MiB by means of TensorFlow.

    Args:
      files: the videos.
      options: those of every TFDS builder, such as `data_dir`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look beside this file for checksums of downloads; there are none, and looking takes
    # a package (importlib_resources) that TFDS does not install on our Pythons.
    code_path = None

    def __init__(self, *, files: Sequence[TrainingFiles], **options):
        self.files = list(files)
        super().__init__(**{"file_format": "array_record", **options})

    def download_and_prepare(self, **options) -> None:
        """Writes the records, or finds them complete. They appear complete or not at all.

        One process at a time writes them, where the file system knows locks.

        Args:
          options: those of every TFDS builder.

        Errors: those of `check_training_files`, before anything is written; OSError where they
        cannot be written, for example on a full disk; ValueError if there are records, but damaged
        ones, or of other files: other names, sizes, or order of videos, or another reading. The
        place of the files does not matter.
        """
        contents = describe(self.files)
        with contextlib.nullcontext() if self.data_path.exists() else _turn(Path(self.data_path)):
            try:
                super().download_and_prepare(**options)
            except OSError:
                # Another process that prepares the same records may be the first to finish.
                if not self.data_path.exists():
                    raise
            except RuntimeError as error:  # what ArrayRecord raises
                raise OSError(f"{self.data_path}: cannot write the records: {error}") from error
        # What is on disk, whichever process wrote it.
        self._check_complete()
        difference = _first_difference(self.info.metadata["videos"], contents)
        if difference:
            raise ValueError(
                f"{self.data_path}: made from other files than these: {difference}; delete this"
                " folder to have the records made anew, or choose another place for them"
            )

    def _check_complete(self) -> None:
        try:
            self.info.read_from_directory(self.data_path)
            expected = sum(len(video["frames"]) for video in self.info.metadata["videos"])
            files = self.info.splits["train"].filepaths
            found = sum(ArrayRecordReader(str(file)).num_records() for file in files)
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise damaged(self.data_path, error) from error
        if found != expected:
            raise damaged(self.data_path, f"{found} of {expected}")

    def _info(self) -> _Info:
        # A scalar of object type holds bytes. The Image feature would turn palettes into colours.
        features = {
            "video": tfds.features.Text(),
            "stem": tfds.features.Text(),
            "frame": tfds.features.Scalar(np.object_),
            "mask": tfds.features.Scalar(np.object_),
        }
        return _Info(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the frames of a video lie one after the other
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable]]:
        self.info.metadata["largest_ids"] = check_training_files(self.files)
        self.info.metadata["videos"] = describe(self.files)
        frames = [
            (video.name, frame, mask)
            for video in self.files
            for frame, mask in zip(video.frames, video.masks, strict=True)
        ]
        sizes = [frame.stat().st_size + mask.stat().st_size for _, frame, mask in frames]
        place, total = Path(self.data_path).parent, sum(sizes)  # the path itself is a temporary one
        free = shutil.disk_usage(place).free
        if total > free:
            raise OSError(
                f"{place}: {total >> 20} MiB of records, {free >> 20} MiB are free; expected room "
                "for them, there or in another place"
            )
        LOGGER.info("copying %d frames (%d MiB) to %s", len(frames), total >> 20, place)
        shards, size = [[]], 0
        for frame, of_frame in zip(frames, sizes, strict=True):
            if shards[-1] and size + of_frame > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(frame)
            size += of_frame
        return {"train": [partial(self._generate_examples, shard) for shard in shards]}

    def _generate_examples(
        self, frames: Sequence[tuple[str, Path, Path]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The records of frames given by their video, picture and mask."""
        for key, (video, frame, mask) in enumerate(frames):
            yield (
                key,
                {
                    "video": video,
                    "stem": frame.stem,
                    "frame": frame.read_bytes(),
                    "mask": mask.read_bytes(),
                },
            )


@contextlib.contextmanager
def _turn(records: Path) -> Iterator[None]:
    """Waits until no other process writes these records, where the file system knows locks."""
    path = records.with_name(f".{records.name}.lock")
    try:
        records.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        message = f"no place for records: {error.strerror}; config.records names another one"
        raise OSError(error.errno, message, str(records.parent)) from error
    with open(path, "a") as lock:
        if not locks.take(lock):
            LOGGER.info("%s: another process writes these records; waiting for it", records)
            locks.take(lock, wait=True)
        yield  # without locks all write, and the records of the first to finish are taken


@dataclasses.dataclass
class DavisConfig(tfds.core.BuilderConfig):
    """Which list and which pictures of DAVIS: see `davis.training_files`."""

    year: int = 2017
    split: str = "train"
    resolution: str = "480p"


class DavisFrames(VideoFrames):
    """DAVIS 2016 or 2017, from the folder `root` that holds it.

    The configurations 2016 and 2017 are the training lists at 480p; for another list or resolution
    give a `DavisConfig` of another name.
    """

    BUILDER_CONFIGS = [
        DavisConfig(name="2017", description="Several objects; 255 is void.", year=2017),
        DavisConfig(name="2016", description="One object, any value but 0.", year=2016),
    ]

    def __init__(self, *, root: Path | str, **options):
        super().__init__(files=(), **options)  # chooses the configuration
        config = self.builder_config
        self.files = davis.training_files(root, config.year, config.split, config.resolution)


class YoutubeVosFrames(VideoFrames):
    """The training videos of YouTube-VOS 2018 or 2019, from the folder `root` that holds them.

    Both are laid out alike: which of the two `root` is, only its owner knows.
    """

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="2019", description="YouTube-VOS 2019, train."),
        tfds.core.BuilderConfig(name="2018", description="YouTube-VOS 2018, train."),
    ]

    def __init__(self, *, root: Path | str, **options):
        super().__init__(files=(), **options)
        self.files = youtube_vos.training_files(root)


def describe(files: Sequence[TrainingFiles]) -> list[dict[str, Any]]:
    """What records are known by: per video its name, reading, frames by their names and sizes, and
    masks by their names and contents (a mended mask often has the size that it had).

    Made of what JSON can hold, and without the place of the files, which may move.
    Errors: FileNotFoundError for a missing file.
    """

    def describe_one(video: TrainingFiles) -> dict[str, Any]:
        return {
            "name": video.name,
            "reading": video.reading,
            "frames": {path.name: path.stat().st_size for path in video.frames},
            "masks": {path.name: _digest(path) for path in video.masks},
        }

    return in_threads(describe_one, files)


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _first_difference(
    recorded: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]
) -> str:
    """Says in words where two descriptions first differ, "" if nowhere."""
    if recorded == wanted:
        return ""
    then, now = _by_file(recorded), _by_file(wanted)
    for file, known in now.items():
        if file not in then:
            return f"{file} is not in the records"
        if then[file] != known and isinstance(known, int):
            return f"{file} has {known} bytes, in the records {then[file]}"
        if then[file] != known:
            return f"{file} is another file than the one in the records"
    for file in then:
        if file not in now:
            return f"{file} is in the records only"
    readings = {video["name"]: video["reading"] for video in recorded}
    for video in wanted:
        if video["reading"] != readings[video["name"]]:
            was = readings[video["name"]]
            return f"masks of {video['name']} are read as {video['reading']}, not {was}"
    return "the same files in another order"


def _by_file(videos: Sequence[Mapping[str, Any]]) -> dict[str, int | str]:
    """What is known of each file, by what an error says of it."""
    return {
        f"{kind} {video['name']}/{name}": known
        for video in videos
        for kind, files in (("frame", video["frames"]), ("mask", video["masks"]))
        for name, known in files.items()
    }
