"""From the configuration's `sources` to videos that clips are drawn from."""

import hashlib
import logging
import os
from pathlib import Path

from ml_collections import ConfigDict

from cfbi_jax.data import davis, youtube_vos
from cfbi_jax.data.clips import ClipSource
from cfbi_jax.data.pasted import PastedVideos
from cfbi_jax.data.records import RecordVideos, prepare
from cfbi_jax.data.static_images import StaticClips
from cfbi_jax.data.synthetic import MAX_OBJECTS, SyntheticVideos
from cfbi_jax.data.videos import check_names, split_names

LOGGER = logging.getLogger(__name__)

DATASETS = ("davis", "youtube_vos", "synthetic")


def clip_source(source: ConfigDict, records: str, max_objects: int, seed: int) -> ClipSource:
    """The videos of one of `config.sources`; those on disk are copied to records first.

    Args:
      source: the fields that `config.source` describes.
      records: folder of the records; "": `~/.cache/cfbi_jax/records` (or below XDG_CACHE_HOME).
      max_objects, seed: of synthetic videos, which have 10 objects at most.

    Errors: ValueError for an unknown data set, and those of `training_files` and `prepare`.
    """
    dataset, root = source["dataset"], source["root"]
    if dataset not in DATASETS:
        raise ValueError(f'config.sources.NAME.dataset is "{dataset}"; expected one of {DATASETS}')
    if dataset == "synthetic":
        for field in ("sequences", "exclude"):
            if source[field]:
                raise ValueError(
                    f"config.sources.NAME.{field} is {source[field]!r}, and dataset is synthetic, "
                    "whose videos are drawn; expected none"
                )
        videos = SyntheticVideos(seed, max_objects=min(max_objects, MAX_OBJECTS))
    else:
        if not root:
            raise ValueError(
                f"the root of the {dataset} source is empty (config.sources.NAME.root); expected "
                "the folder of the data set"
            )
        names = split_names(source["sequences"]) or None
        split, year = source["split"], source["year"]
        least = 1 if source["static"] else 2  # frames that a clip needs
        if dataset == "davis":
            names = _without(source, names or davis.sequence_names(root, year, split))
            resolution = source["resolution"]
            if source["full_resolution"] and resolution == "480p":
                resolution = davis.finest_resolution(root, names)
                LOGGER.info("%s: training on %s", root, resolution)
            about = f"davis_{year}_{split}_{resolution}"
            files = davis.training_files(root, year, split, resolution, names, least)
        else:
            about = f"youtube_vos_{split}"
            names = _without(source, names or list(youtube_vos.read_meta(root, split)))
            files = youtube_vos.training_files(root, split, names, least)
        # Another folder or another choice of videos has records of its own.
        kept = [video.name for video in files]
        place = hashlib.blake2b(f"{Path(root).resolve()} {kept}".encode(), digest_size=4)
        videos = RecordVideos(
            prepare(f"{about}_{place.hexdigest()}", files, records or _default_folder())
        )
    if source["static"]:
        videos = StaticClips(videos, source["static_frames"])
    return PastedVideos(videos, source["paste"]) if source["paste"] else videos


def contents(source: ClipSource) -> str:
    """Which files a source has: a hash of names, of frames' sizes and masks' contents; "" for
    videos that are drawn."""
    while isinstance(source, (StaticClips, PastedVideos)):
        source = source.source
    return source.digest if isinstance(source, RecordVideos) else ""


def _without(source: ConfigDict, names: list[str]) -> list[str]:
    excluded = split_names(source["exclude"])
    check_names("video", excluded, names, Path(source["root"]))
    return [name for name in names if name not in excluded]


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cfbi_jax" / "records"
