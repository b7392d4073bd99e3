"""From the configuration's `sources` to videos that clips are drawn from."""

import hashlib
import logging
from pathlib import Path

from ml_collections import ConfigDict

from cfbi_jax.data import davis, youtube_vos
from cfbi_jax.data.clips import ClipSource
from cfbi_jax.data.pasted import MAX_ID, PastedVideos
from cfbi_jax.data.records import RecordVideos, prepare
from cfbi_jax.data.static_images import StaticClips
from cfbi_jax.data.synthetic import MAX_OBJECTS, SyntheticVideos
from cfbi_jax.data.videos import check_names, split_names
from cfbi_jax.files import cache_folder

LOGGER = logging.getLogger(__name__)

DATASETS = ("davis", "youtube_vos", "synthetic")


def clip_source(
    name: str, source: ConfigDict, records: str, max_objects: int, seed: int
) -> ClipSource:
    """The videos of `config.sources.<name>`; those on disk are copied to records first.

    Args:
      source: the fields that `config.source` describes.
      records: folder of the records; "": `~/.cache/cfbi_jax/records` (or below XDG_CACHE_HOME).
      max_objects, seed: of synthetic videos, which have 10 objects at most.

    Errors: ValueError for an unknown data set and for choices that it does not have, and those of
    `training_files` and `prepare`.
    """
    field = f"config.sources.{name}"
    dataset = source["dataset"]
    if dataset not in DATASETS:
        raise ValueError(f'{field}.dataset is "{dataset}"; expected one of {DATASETS}')
    if source["full_resolution"] and dataset != "davis":
        raise ValueError(
            f"{field}.full_resolution is True, and dataset is {dataset}; expected davis, which has "
            "pictures of several sizes"
        )
    if dataset == "synthetic":
        for choice in ("sequences", "exclude"):
            if source[choice]:
                raise ValueError(
                    f"{field}.{choice} is {source[choice]!r}, and dataset is synthetic, "
                    "whose videos are drawn; expected none"
                )
        videos = SyntheticVideos(seed, max_objects=min(max_objects, MAX_OBJECTS))
    else:
        if not source["root"]:
            raise ValueError(f"{field}.root is empty; expected the folder of the data set")
        videos = _recorded(source, Path(records) if records else cache_folder() / "records")
        _check_ids(videos, field, source["paste"])
    if source["static"]:
        videos = StaticClips(videos, source["static_frames"])
    if source["paste"]:
        videos = PastedVideos(videos, source["paste"], source["paste_doubles"])
    return videos


def _recorded(source: ConfigDict, records: Path) -> RecordVideos:
    """The videos of a data set on disk. Another folder or choice of videos has its own records."""
    root, split, year = source["root"], source["split"], source["year"]
    names = split_names(source["sequences"]) or None
    least = 1 if source["static"] else 2  # frames that a clip needs
    if source["dataset"] == "davis":
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
    kept = [video.name for video in files]
    place = hashlib.blake2b(f"{Path(root).resolve()} {kept}".encode(), digest_size=4)
    return RecordVideos(prepare(f"{about}_{place.hexdigest()}", files, records))


def _check_ids(videos: RecordVideos, field: str, paste: float) -> None:
    """Warns of videos without objects. Errors: ValueError for ids that leave none to what is pasted
    beside them."""
    empty = [name for name, largest in videos.largest_ids.items() if not largest]
    if empty:
        LOGGER.warning(
            "%s: %d of %d videos have no object in any mask (255 is nobody's): %s",
            *(field, len(empty), len(videos), ", ".join(empty[:5])),
        )
    high = [name for name, largest in videos.largest_ids.items() if largest > MAX_ID]
    if paste and high:
        raise ValueError(
            f"{field}: {high[0]} has object {videos.largest_ids[high[0]]}; expected ids up to "
            f"{MAX_ID}, as others' objects are pasted ({field}.paste is {paste}), or the video "
            f"in {field}.exclude"
        )


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
