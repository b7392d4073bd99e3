"""Small data sets are copied into records, and what is read back is compared with their files."""

import errno
import fcntl
import json
import logging
import multiprocessing
import operator
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from cfbi_jax.data import builders, davis, records, synthetic, youtube_vos
from cfbi_jax.data.videos import TrainingFiles, check_training_files
from cfbi_jax.files import BadFile

SIZE = (48, 64)


@pytest.fixture
def root(tmp_path):
    """DAVIS with two sequences of three frames, of which the second has a void pixel."""
    synthetic.write_davis(tmp_path / "DAVIS", [1, 2], "train", num_frames=3, size=SIZE)
    path = mask_file(tmp_path / "DAVIS", 0)
    label = np.array(Image.open(path))
    label[0, 0] = 255
    Image.fromarray(label).save(path)
    lists = tmp_path / "DAVIS" / "ImageSets"
    shutil.copytree(lists / "2017", lists / "2016")
    return tmp_path / "DAVIS"


@pytest.fixture
def youtube_root(tmp_path):
    """YouTube-VOS with a video of two annotated frames out of three, and ids with a gap."""
    rng = np.random.default_rng(0)
    for stem in ("00000", "00005", "00010"):
        frame = tmp_path / "YTB" / "train" / "JPEGImages" / "a" / f"{stem}.jpg"
        frame.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(frame)
    for stem in ("00005", "00010"):
        mask = tmp_path / "YTB" / "train" / "Annotations" / "a" / f"{stem}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron([[0, 2], [5, 0]], np.ones((24, 32), int)).astype(np.uint8)).save(
            mask
        )
    meta = {"videos": {"a": {"objects": {"2": {"frames": ["00005"]}, "5": {"frames": ["00005"]}}}}}
    (tmp_path / "YTB" / "train" / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "YTB"


def frame_file(root, t, name="synthetic-0002"):
    return root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg"


def mask_file(root, t, name="synthetic-0002"):
    return root / "Annotations" / "480p" / name / f"{t:05d}.png"


def prepare(root, tmp_path, **options):
    return records.prepare("davis", davis.training_files(root, **options), tmp_path / "records")


def stamps(folder):
    """When each file below a folder was written, and which file it is."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def assert_no_records(tmp_path):
    """Nothing below `records` can be opened, or looks as if it were under way."""
    assert not list((tmp_path / "records").rglob("*.array_record*"))
    with pytest.raises(FileNotFoundError, match=r"metadata\.json: no such file; expected .*record"):
        records.RecordVideos(tmp_path / "records" / "davis" / "video_frames" / "1.0.0")


# ---- What is in the records ----


def test_records_hold_the_bytes_of_the_files(root, tmp_path):
    folder = prepare(root, tmp_path)
    assert tmp_path / "records" in folder.parents
    source = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(source) == 6
    for i, (name, t) in enumerate((f"synthetic-000{v}", t) for v in (1, 2) for t in range(3)):
        assert source[i]["video"] == name.encode()
        assert source[i]["stem"] == f"{t:05d}".encode()
        assert source[i]["frame"] == frame_file(root, t, name).read_bytes()
        assert source[i]["mask"] == mask_file(root, t, name).read_bytes()


@pytest.mark.parametrize("year", [2016, 2017])
def test_videos_are_those_of_the_files(root, tmp_path, year):
    opened = records.RecordVideos(prepare(root, tmp_path, year=year))
    assert len(opened) == 2
    for index, name in enumerate(("synthetic-0001", "synthetic-0002")):
        video = opened.video(index, np.random.default_rng(0))
        assert (video.name, len(video)) == (name, 3)
        for t in (2, 0, 1):
            frame, mask = video.frame(t), video.mask(t)
            assert frame.dtype == mask.dtype == np.uint8
            expected = np.array(Image.open(frame_file(root, t, name)))
            # Pillow's JPEG decoder and OpenCV's may round differently.
            assert np.abs(frame.astype(int) - expected).max() <= 3
            stored = np.array(Image.open(mask_file(root, t, name)))
            np.testing.assert_array_equal(mask, stored > 0 if year == 2016 else stored)
    # Void is an object's pixel in 2016, and is left for the loss to ignore in 2017.
    assert opened.video(1).mask(0)[0, 0] == (1 if year == 2016 else 255)
    assert {1, 2} <= set(np.unique(opened.video(0).mask(0))) or year == 2016


def test_white_masks_of_2016_are_one_object(root, tmp_path):
    for t in range(3):
        white = np.array(Image.open(mask_file(root, t))) // 2 * 255
        Image.fromarray(white).save(mask_file(root, t))
    assert set(np.unique(white)) == {0, 255}
    video = records.RecordVideos(prepare(root, tmp_path, year=2016)).video(1)
    np.testing.assert_array_equal(video.mask(2), white // 255)


def test_youtube_vos_has_the_annotated_frames_only(youtube_root, tmp_path):
    files = youtube_vos.training_files(youtube_root)
    video = records.RecordVideos(records.prepare("ytb", files, tmp_path)).video(0)
    assert (video.name, len(video)) == ("a", 2)
    np.testing.assert_array_equal(np.unique(video.mask(0)), [0, 2, 5])
    pictures = youtube_root / "train" / "JPEGImages" / "a"
    expected = np.array(Image.open(pictures / "00005.jpg")).astype(int)
    assert np.abs(video.frame(0) - expected).max() <= 3


def test_frames_and_videos_outside_are_no_neighbours(root, tmp_path):
    opened = records.RecordVideos(prepare(root, tmp_path))
    for t in (-1, 3):
        for read in (opened.video(0).frame, opened.video(0).mask):
            with pytest.raises(IndexError, match=f"synthetic-0001: frame {t}; expected 0 to 2"):
                read(t)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"video {index}; expected 0 to 1"):
            opened.video(index)


def test_only_the_frame_asked_for_is_read(root, tmp_path, monkeypatch):
    folder = prepare(root, tmp_path)
    # One record per chunk on disk: ArrayRecord reads and decompresses whole chunks.
    (file,) = folder.glob("*.array_record*")
    assert "group_size:1," in ArrayRecordReader(str(file)).writer_options_string() + ","
    opened = records.RecordVideos(folder)
    asked, decoded = [], []

    class Watched:
        def __init__(self, records):
            self.records = records

        def __getitem__(self, index):
            asked.append(index)
            return self.records[index]

    def watched(decode):
        def decode_and_tell(data, name, **options):
            decoded.append(name)
            return decode(data, name, **options)

        return decode_and_tell

    for name in ("decode_frame", "decode_mask"):
        monkeypatch.setattr(records, name, watched(getattr(records, name)))
    opened.source.data_source = Watched(opened.source.data_source)
    video = opened.video(1)
    assert asked == []
    video.frame(2)
    video.mask(0)
    assert asked == [5, 3]
    assert decoded == [
        f"{folder}: frame synthetic-0002/00002",
        f"{folder}: mask synthetic-0002/00000",
    ]


def test_a_file_that_cannot_be_decoded_is_named(root, tmp_path, monkeypatch):
    """Before anything is written, and by records that have it all the same."""
    # Complete by its header and its end, but the checksums of the parts between are wrong.
    data = bytearray(mask_file(root, 1).read_bytes())
    data[-60:-40] = bytes(20)
    mask_file(root, 1).write_bytes(data)
    with pytest.raises(ValueError, match=r"synthetic-0002/00001\.png: damaged picture"):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)
    monkeypatch.setattr(builders, "check_training_files", lambda files: {})
    video = records.RecordVideos(prepare(root, tmp_path)).video(1)
    assert video.mask(0).shape == SIZE
    damaged = r"1\.0\.0: mask synthetic-0002/00001: damaged picture .* mend the file .* and delete "
    with pytest.raises(ValueError, match=damaged + re.escape(str(tmp_path / "records"))):
        video.mask(1)


def test_a_damaged_frame_is_named(root, tmp_path):
    """A PNG: decoders take what is within a JPEG as it is."""
    for video in ("synthetic-0001", "synthetic-0002"):
        for path in (root / "JPEGImages" / "480p" / video).iterdir():
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
    path = frame_file(root, 1).with_suffix(".png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"synthetic-0002/00001\.png"):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)


def test_largest_ids(root, tmp_path):
    for t, values in enumerate([[0, 255], [0, 7], [0, 3]]):
        label = np.kron([values, values[::-1]], np.ones((24, 32), int)).astype(np.uint8)
        Image.fromarray(label).save(mask_file(root, t, "synthetic-0001"))
        Image.fromarray(np.uint8(255) * (label > 0)).save(mask_file(root, t))
    for year, expected in ((2017, [7, 0]), (2016, [1, 1])):
        files = davis.training_files(root, year=year)
        videos = records.RecordVideos(records.prepare(str(year), files, tmp_path / "records"))
        assert list(videos.largest_ids.values()) == expected


def test_reading_in_another_process(root, tmp_path):
    opened = records.RecordVideos(prepare(root, tmp_path))
    unopened = pickle.dumps(opened)
    expected = opened.video(1).frame(2)
    assert pickle.dumps(opened) == unopened  # nothing of the open file is in it
    assert len(unopened) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(operator.methodcaller("frame", 2), (opened.video(1),))
    np.testing.assert_array_equal(found, expected)


# ---- When they are written, and when not ----


def test_complete_records_are_not_written_again(root, tmp_path):
    folder = prepare(root, tmp_path)
    before = stamps(folder)
    assert len(before) == 4
    assert prepare(root, tmp_path) == folder
    assert stamps(folder) == before


def test_nothing_is_left_elsewhere(root, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    prepare(root, tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_data_set_may_move(root, tmp_path):
    folder = prepare(root, tmp_path)
    before = stamps(folder)
    moved = root.rename(tmp_path / "elsewhere")
    assert prepare(moved, tmp_path) == folder
    assert stamps(folder) == before
    shutil.rmtree(moved)
    assert records.RecordVideos(folder).video(1).frame(0).shape == (*SIZE, 3)


def test_records_may_move(root, tmp_path):
    folder = prepare(root, tmp_path)
    moved = (tmp_path / "records").rename(tmp_path / "copied")
    opened = records.RecordVideos(moved / folder.relative_to(tmp_path / "records"))
    assert opened.video(1).frame(0).shape == (*SIZE, 3)


def change(root):
    with frame_file(root, 1).open("ab") as file:
        file.write(b"end")


def mend(root):
    """Another palette, in a file of the same size."""
    path = mask_file(root, 1)
    data = bytearray(path.read_bytes())
    start = data.index(b"PLTE")
    end = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    data[end - 1] ^= 1
    data[end : end + 4] = zlib.crc32(data[start:end]).to_bytes(4, "big")
    path.write_bytes(data)


def remove(root):
    frame_file(root, 2).unlink()
    mask_file(root, 2).unlink()


def add(root):
    shutil.copy(frame_file(root, 2), frame_file(root, 3))
    shutil.copy(mask_file(root, 2), mask_file(root, 3))


def remove_a_sequence(root):
    (root / "ImageSets" / "2017" / "train.txt").write_text("synthetic-0001\n")


def reorder(root):
    (root / "ImageSets" / "2017" / "train.txt").write_text("synthetic-0002\nsynthetic-0001\n")


@pytest.mark.parametrize(
    ("edit", "difference"),
    [
        (change, r"frame synthetic-0002/00001\.jpg has \d+ bytes, in the records \d+"),
        (mend, r"mask synthetic-0002/00001\.png is another file than the one in the records"),
        (remove, r"frame synthetic-0002/00002\.jpg is in the records only"),
        (add, r"frame synthetic-0002/00003\.jpg is not in the records"),
        (remove_a_sequence, r"frame synthetic-0002/00000\.jpg is in the records only"),
        (reorder, "the same files in another order"),
    ],
)
def test_records_of_other_files_are_refused(root, tmp_path, edit, difference):
    folder = prepare(root, tmp_path)
    before = stamps(folder)
    edit(root)
    with pytest.raises(ValueError, match=f"{folder}: made from .*: {difference}; delete this"):
        prepare(root, tmp_path)
    assert stamps(folder) == before
    shutil.rmtree(folder)
    assert len(records.RecordVideos(prepare(root, tmp_path))) == len(davis.training_files(root))


def test_records_read_in_another_way_are_refused(root, tmp_path):
    prepare(root, tmp_path)
    message = "masks of synthetic-0001 are read as binary, not void_255"
    with pytest.raises(ValueError, match=message):
        prepare(root, tmp_path, year=2016)


def test_interrupted_preparation_leaves_nothing(root, tmp_path, monkeypatch):
    original = builders.VideoFrames._generate_examples

    def interrupted(self, frames):
        for number, example in enumerate(original(self, frames)):
            if number == 4:
                raise KeyboardInterrupt
            yield example

    with monkeypatch.context() as patch:
        patch.setattr(builders.VideoFrames, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, tmp_path)
    assert_no_records(tmp_path)
    assert not list((tmp_path / "records").rglob("incomplete*"))
    assert len(records.RecordVideos(prepare(root, tmp_path)).video(1)) == 3


KILLED_WHEN_ALL_IS_WRITTEN = """
import os, signal, sys
import tensorflow_datasets as tfds
from cfbi_jax.data import davis, records
def kill(self, folder, *args, **options):
    assert list(self.data_dir and __import__("pathlib").Path(folder).glob("*.array_record*"))
    os.kill(os.getpid(), signal.SIGKILL)
tfds.core.DatasetInfo.write_to_directory = kill
records.prepare("davis", davis.training_files(sys.argv[1]), sys.argv[2])
"""


def test_killed_preparation_is_not_taken_for_a_finished_one(root, tmp_path, caplog):
    command = [sys.executable, "-c", KILLED_WHEN_ALL_IS_WRITTEN, root, tmp_path / "records"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left,) = (tmp_path / "records").rglob("incomplete.*_1.0.0")
    assert list(left.glob("*.array_record*"))
    with caplog.at_level(logging.WARNING):
        folder = prepare(root, tmp_path)
    assert f"{left}: left by an interrupted preparation" in caplog.text
    assert records.RecordVideos(folder).video(1).frame(2).shape == (*SIZE, 3)


def test_without_locks_the_first_to_finish_counts(root, tmp_path, monkeypatch):
    original = builders.VideoFrames._generate_examples
    folders = []

    def overtaken(self, frames):
        yield from original(self, frames)
        monkeypatch.setattr(builders.VideoFrames, "_generate_examples", original)
        folders.append(prepare(root, tmp_path))
        folders.append(stamps(folders[0]))

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(builders.VideoFrames, "_generate_examples", overtaken)
    assert prepare(root, tmp_path) == folders[0]
    assert stamps(folders[0]) == folders[1]  # those of the faster one
    assert not list((tmp_path / "records").rglob("incomplete*"))


def test_the_second_process_waits_for_the_first(root, tmp_path, monkeypatch, caplog):
    original = builders.VideoFrames._generate_examples
    caplog.set_level(logging.INFO)
    second = []

    def slow(self, frames):
        for example in original(self, frames):
            if not second:
                second.append(ThreadPoolExecutor(1).submit(prepare, root, tmp_path))
                while "waiting for it" not in caplog.text:
                    time.sleep(0.01)
            yield example

    monkeypatch.setattr(builders.VideoFrames, "_generate_examples", slow)
    assert prepare(root, tmp_path) == second[0].result()
    assert caplog.text.count("copying 6 frames") == 1


def test_shards(root, tmp_path, monkeypatch):
    """Many files, none of which TFDS collects in memory before it writes the first."""
    monkeypatch.setattr(builders, "SHARD_BYTES", 7000)
    monkeypatch.setattr(tfds.core.writer.shuffle, "MAX_MEM_BUFFER_SIZE", 100)
    folder = prepare(root, tmp_path)
    assert 2 < len(list(folder.glob("*.array_record*"))) < 6
    opened = records.RecordVideos(folder)
    for number, video in enumerate(davis.training_files(root)):
        for t, frame in enumerate(video.frames):
            assert opened.source[3 * number + t]["frame"] == frame.read_bytes()


def test_a_folder_that_cannot_be_made(root, tmp_path):
    (tmp_path / "records").touch()
    message = "no place for records.*config.records.*records/davis"
    with pytest.raises((FileExistsError, NotADirectoryError), match=message):
        prepare(root, tmp_path)


def test_no_room_for_the_records(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 999))
    with pytest.raises(OSError, match="0 MiB of records, 0 MiB are free; expected room"):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)


def test_a_disk_that_fills_up(root, tmp_path, monkeypatch):
    def full(self, record):
        raise RuntimeError("No space left on device; writing x")

    monkeypatch.setattr(ArrayRecordWriter, "write", full)
    with pytest.raises(OSError, match="cannot write the records: .*No space left on device"):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)


def _without_metadata(folder):
    (folder / "metadata.json").unlink()


def _without_info(folder):
    (folder / "dataset_info.json").unlink()


def _without_records(folder):
    next(folder.glob("*.array_record*")).unlink()


def _cut_short(folder):
    file = next(folder.glob("*.array_record*"))
    file.write_bytes(file.read_bytes()[:-70_000])


@pytest.mark.parametrize("damage", [_without_metadata, _without_info, _without_records, _cut_short])
def test_damaged_records_are_refused(root, tmp_path, damage):
    folder = prepare(root, tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=f"{folder}: damaged records .* delete this folder"):
        prepare(root, tmp_path)


def test_damage_that_is_met_when_reading(root, tmp_path):
    folder = prepare(root, tmp_path)
    (file,) = folder.glob("*.array_record*")
    data = bytearray(file.read_bytes())
    data[100:20_000] = bytes(19_900)
    file.write_bytes(data)
    video = records.RecordVideos(prepare(root, tmp_path)).video(0)
    with pytest.raises(BadFile, match=f"{folder}: damaged records"):
        for t in range(3):
            video.frame(t)


# ---- What is refused before anything is written ----


def test_mask_of_another_size_is_refused(root, tmp_path):
    Image.new("L", (60, 48)).save(mask_file(root, 2))
    message = r"0002/00002\.png: 48 x 60 pixels .* expected 48 x 64 as in .*0002/00000\.jpg"
    with pytest.raises(ValueError, match=message):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)


def test_frame_of_another_size_is_refused(root, tmp_path):
    Image.new("RGB", (64, 40)).save(frame_file(root, 1))
    message = r"0002/00001\.jpg: 40 x 64 pixels .* expected 48 x 64 as in .*0002/00000\.jpg"
    with pytest.raises(ValueError, match=message):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)


def test_sequences_may_have_different_sizes(root, tmp_path):
    synthetic.write_davis(root, [3], "extra", num_frames=2, size=(40, 48))
    (root / "ImageSets" / "2017" / "train.txt").write_text("synthetic-0001\nsynthetic-0003\n")
    opened = records.RecordVideos(prepare(root, tmp_path))
    assert [opened.video(i).frame(1).shape[:2] for i in (0, 1)] == [SIZE, (40, 48)]


def test_files_that_are_no_pictures_are_refused(root, tmp_path):
    data = frame_file(root, 2).read_bytes()
    frame_file(root, 2).write_bytes(data[:-200])
    with pytest.raises(ValueError, match=r"0002/00002\.jpg: a picture cut short"):
        prepare(root, tmp_path)
    frame_file(root, 2).write_bytes(data)
    Image.new("RGB", SIZE[::-1]).save(mask_file(root, 2))
    with pytest.raises(ValueError, match=r"0002/00002\.png: RGB colours"):
        prepare(root, tmp_path)
    assert_no_records(tmp_path)


def test_file_that_vanishes_after_listing(root, tmp_path):
    files = davis.training_files(root)
    mask_file(root, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"0002/00001\.png"):
        records.prepare("davis", files, tmp_path / "records")
    assert_no_records(tmp_path)


def test_no_videos_and_videos_of_one_name_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="no videos to train on"):
        records.prepare("davis", [], tmp_path / "records")
    files = davis.training_files(root)
    with pytest.raises(ValueError, match="synthetic-0002: more than one video of this name"):
        records.prepare("davis", [*files, files[1]], tmp_path / "records")
    assert_no_records(tmp_path)


def test_a_mask_per_frame_is_expected():
    with pytest.raises(ValueError, match="bear: 2 frames and 1 masks"):
        TrainingFiles("bear", (Path("0.jpg"), Path("1.jpg")), (Path("0.png"),), "ids")


def test_first_error_in_the_order_of_the_list_is_raised(root):
    files = davis.training_files(root)
    for name in ("synthetic-0001", "synthetic-0002"):
        Image.new("L", (60, 48)).save(mask_file(root, 2, name))
    for order in (files, files[::-1]):
        with pytest.raises(ValueError, match=f"{order[0].name}/00002"):
            check_training_files(order)


# ---- Builders by name ----


@pytest.mark.parametrize("config", ["2016", "2017"])
def test_davis_builder(root, tmp_path, config):
    def source():
        return tfds.data_source(
            f"davis_frames/{config}",
            split="train",
            data_dir=tmp_path / "tfds",
            builder_kwargs={"root": root},
        )

    assert len(source()) == 6
    assert source()[5]["mask"] == mask_file(root, 2).read_bytes()
    builder = builders.DavisFrames(root=root, config=config, data_dir=tmp_path / "tfds")
    video = records.RecordVideos(builder.data_path).video(1)
    assert video.mask(0)[0, 0] == {"2016": 1, "2017": 255}[config]
    change(root)
    with pytest.raises(ValueError, match=r"made from other files .* frame synthetic-0002/00001"):
        builder.download_and_prepare()


def test_davis_builder_of_another_list_and_resolution(root, tmp_path):
    synthetic.write_davis(root, [3], "val", 2017, "240p", num_frames=2, size=SIZE)
    config = builders.DavisConfig(name="2017_val_240p", split="val", resolution="240p")
    builder = builders.DavisFrames(root=root, config=config, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert [r["video"] for r in builder.as_data_source("train")] == [b"synthetic-0003"] * 2
    assert builder.info.splits["train"].num_examples == 2


def test_youtube_vos_builder(youtube_root, tmp_path):
    for config in ("2018", "2019"):
        builder = builders.YoutubeVosFrames(root=youtube_root, config=config, data_dir=tmp_path)
        builder.download_and_prepare()
        stems = [record["stem"] for record in builder.as_data_source("train")]
        assert stems == [b"00005", b"00010"]
        assert f"/{config}/" in str(builder.data_path)


# ---- What is not imported ----

LIGHT = """
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
def no_network(event, args):
    assert event not in ("socket.connect", "socket.getaddrinfo"), args
sys.addaudithook(no_network)
from cfbi_jax.data import davis, records
assert "tensorflow_datasets" not in sys.modules
folder = records.prepare("davis", davis.training_files(sys.argv[1]), sys.argv[2])
video = records.RecordVideos(folder).video(1)
print(video.frame(0).shape, video.mask(2).shape)
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""


def test_neither_tensorflow_nor_jax_nor_a_network_is_needed(root, tmp_path):
    command = [sys.executable, "-c", LIGHT, root, tmp_path / "records"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("(48, 64, 3) (48, 64)\n")


def test_records_of_a_relative_folder_are_found_from_elsewhere(root, tmp_path, monkeypatch):
    folder = prepare(root, tmp_path)
    monkeypatch.chdir(tmp_path)
    opened = records.RecordVideos(folder.relative_to(tmp_path))
    monkeypatch.chdir(root)
    assert opened.video(1).frame(2).shape == (*SIZE, 3)


def test_records_older_than_their_largest_ids(root, tmp_path):
    metadata = prepare(root, tmp_path) / "metadata.json"
    content = json.loads(metadata.read_text())
    del content["largest_ids"]
    metadata.write_text(json.dumps(content))
    assert records.RecordVideos(metadata.parent).largest_ids == {}


def test_digest_is_of_the_contents(root, tmp_path):
    before = records.RecordVideos(prepare(root, tmp_path)).digest
    mend(root)
    files = davis.training_files(root)
    after = records.RecordVideos(records.prepare("other", files, tmp_path / "records")).digest
    assert before != after


def test_complete_records_need_no_place_to_write(root, tmp_path, monkeypatch):
    """As on a disk that is read only."""
    folder = prepare(root, tmp_path)

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    assert prepare(root, tmp_path) == folder
