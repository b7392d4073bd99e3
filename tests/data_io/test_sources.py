"""From a source's fields to videos: compared with the files they name."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cfbi_jax.config import source
from cfbi_jax.data import synthetic
from cfbi_jax.data.clips import ClipSource
from cfbi_jax.data.image_files import read_frame
from cfbi_jax.data.sources import clip_source, contents
from cfbi_jax.data.static_images import StaticClips

SIZE = (48, 64)


@pytest.fixture
def davis_root(tmp_path):
    """Three videos to train on and one to validate on, in a resolution of its own name."""
    root = tmp_path / "DAVIS"
    for split, seeds in (("train", (1, 2, 3)), ("val", (4,))):
        synthetic.write_davis(root, seeds, split, resolution="48p", num_frames=3, size=SIZE)
    return root


@pytest.fixture
def youtube_root(tmp_path):
    """One video of two frames, both annotated; object 4 alone."""
    folder = tmp_path / "YTB" / "train"
    rng = np.random.default_rng(0)
    for stem in ("00000", "00005"):
        pictures = {
            "JPEGImages": rng.integers(0, 256, (*SIZE, 3), np.uint8),
            "Annotations": np.kron([[0, 4], [0, 0]], np.ones((24, 32), int)).astype(np.uint8),
        }
        for kind, picture in pictures.items():
            path = folder / kind / "a" / f"{stem}.{'jpg' if kind == 'JPEGImages' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    meta = {"videos": {"a": {"objects": {"4": {"frames": ["00000"]}}}}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "YTB"


def make(tmp_path, **fields):
    return clip_source("mine", source(**fields), str(tmp_path / "records"), max_objects=3, seed=5)


def videos_of(found, seed=0):
    assert isinstance(found, ClipSource)
    return [found.video(i, np.random.default_rng(seed)) for i in range(len(found))]


def test_davis(tmp_path, davis_root):
    videos = videos_of(make(tmp_path, dataset="davis", root=str(davis_root), resolution="48p"))
    assert [video.name for video in videos] == [f"synthetic-000{i}" for i in (1, 2, 3)]
    for video in videos:
        assert len(video) == 3
        own = f"48p/{video.name}/00002"
        frame = read_frame(davis_root / "JPEGImages" / f"{own}.jpg")
        np.testing.assert_array_equal(video.frame(2), frame)
        mask = np.array(Image.open(davis_root / "Annotations" / f"{own}.png"))
        np.testing.assert_array_equal(video.mask(2), mask)


def test_every_choice_of_videos_has_records_of_its_own(tmp_path, davis_root):
    fields = dict(dataset="davis", root=str(davis_root), resolution="48p")
    choices = [
        ({}, ["1", "2", "3"]),
        ({"sequences": "synthetic-0003, synthetic-0001"}, ["1", "3"]),
        ({"exclude": "synthetic-0002"}, ["1", "3"]),  # the same
        ({"split": "val"}, ["4"]),
        ({}, ["1", "2", "3"]),
    ]
    for changes, names in choices:
        videos = videos_of(make(tmp_path, **fields, **changes))
        assert [video.name.removeprefix("synthetic-000") for video in videos] == names
    assert len(list((tmp_path / "records").iterdir())) == 3


def test_davis_2016_is_binary(tmp_path, davis_root):
    lists = davis_root / "ImageSets"
    (lists / "2016").mkdir()
    (lists / "2016" / "train.txt").write_text("synthetic-0001\n")
    fields = dict(dataset="davis", root=str(davis_root), resolution="48p")
    (both,) = videos_of(make(tmp_path, **fields, sequences="synthetic-0001"))
    (binary,) = videos_of(make(tmp_path, **fields, year=2016))
    assert both.mask(0).max() == 2
    np.testing.assert_array_equal(binary.mask(0), both.mask(0) > 0)


def test_youtube_vos(tmp_path, youtube_root):
    (video,) = videos_of(make(tmp_path, dataset="youtube_vos", root=str(youtube_root)))
    assert (video.name, len(video)) == ("a", 2)
    assert set(np.unique(video.mask(1))) == {0, 4}
    frame = read_frame(youtube_root / "train" / "JPEGImages" / "a" / "00005.jpg")
    np.testing.assert_array_equal(video.frame(1), frame)


def test_synthetic(tmp_path):
    found = make(tmp_path, dataset="synthetic")
    assert isinstance(found, ClipSource)
    videos = [found.video(i, np.random.default_rng(i)) for i in range(12)]
    assert {v.mask(0).max() for v in videos} == {1, 2, 3}  # max_objects
    again = make(tmp_path, dataset="synthetic").video(0, np.random.default_rng(0))
    np.testing.assert_array_equal(again.frame(0), videos[0].frame(0))
    assert len(clip_source("mine", source(dataset="synthetic"), "", max_objects=12, seed=5))
    other = clip_source("mine", source(dataset="synthetic"), "", max_objects=3, seed=6)
    assert other.video(0, np.random.default_rng(0)).name != videos[0].name


def test_static(tmp_path, davis_root):
    fields = dict(dataset="davis", root=str(davis_root), resolution="48p", static=True)
    found = make(tmp_path, **fields)
    assert isinstance(found, StaticClips) and len(found) == 3
    videos = videos_of(found)
    assert [video.name for video in videos] == [f"synthetic-000{i}" for i in (1, 2, 3)]
    assert {len(video) for video in videos} == {8}  # the files have three frames
    assert not np.array_equal(videos[0].frame(0), videos[0].frame(7))
    longer = make(tmp_path, **fields, static_frames=20)
    assert {len(video) for video in videos_of(longer)} == {20}
    with pytest.raises(ValueError, match="static_frames = 1; expected two at least"):
        make(tmp_path, **fields, static_frames=1)


def test_paste(tmp_path, davis_root):
    fields = dict(dataset="davis", root=str(davis_root), resolution="48p")
    plain, pasted = make(tmp_path, **fields), make(tmp_path, **fields, static=True, paste=1.0)
    assert [video.name.count("+") for video in videos_of(pasted)] == [1, 1, 1]
    assert contents(pasted) == contents(plain) != ""
    own = make(tmp_path, **fields, paste=1.0, paste_doubles=1.0)
    names = [video.name for video in videos_of(plain)]
    assert [video.name for video in videos_of(own)] == [f"{name}+{name}" for name in names]
    with pytest.raises(ValueError, match="paste = 2.0; expected a share from 0 to 1"):
        make(tmp_path, **fields, paste=2.0)


def test_ids_that_leave_none_to_what_is_pasted(tmp_path, davis_root):
    path = davis_root / "Annotations/48p/synthetic-0002/00001.png"
    label = np.array(Image.open(path))
    Image.fromarray(np.where(label > 0, 128, 0).astype(np.uint8)).save(path)
    fields = dict(dataset="davis", root=str(davis_root), resolution="48p")
    make(tmp_path, **fields)
    with pytest.raises(ValueError, match="mine: synthetic-0002 has object 128; expected .* 127"):
        make(tmp_path, **fields, paste=0.5)
    make(tmp_path, **fields, paste=0.5, exclude="synthetic-0002")


def test_videos_without_objects_are_named(tmp_path, davis_root, caplog):
    fields = dict(dataset="davis", root=str(davis_root), resolution="48p")
    for path in (davis_root / "Annotations/48p/synthetic-0002").iterdir():
        Image.fromarray(np.uint8(255) * (np.array(Image.open(path)) > 0)).save(path)
    for _ in range(2):  # also where the records are there already
        caplog.clear()
        make(tmp_path, **fields)
        assert "mine: 1 of 3 videos have no object in any mask" in caplog.text
        assert caplog.text.rstrip().endswith(": synthetic-0002")


def test_records_go_to_the_cache_unless_told(tmp_path, davis_root, monkeypatch):
    fields = source(dataset="davis", root=str(davis_root), resolution="48p")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clip_source("mine", fields, "", max_objects=3, seed=0)
    assert list((tmp_path / "cache" / "cfbi_jax" / "records").rglob("*.array_record*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    clip_source("mine", fields, "", max_objects=3, seed=0)
    assert list((tmp_path / "home/.cache/cfbi_jax/records").rglob("*.array_record*"))


def test_bad_fields(tmp_path, davis_root):
    with pytest.raises(ValueError, match='sources.mine.dataset is "davis2017"; expected one of'):
        make(tmp_path, dataset="davis2017", root=str(davis_root))
    for dataset in ("davis", "youtube_vos"):
        with pytest.raises(ValueError, match="config.sources.mine.root is empty"):
            make(tmp_path, dataset=dataset)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        make(tmp_path, dataset="davis", root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no sequence 'synthetic-0009'"):
        make(tmp_path, dataset="davis", root=str(davis_root), sequences="synthetic-0009")
    with pytest.raises(ValueError, match="no video 'dog'"):
        make(tmp_path, dataset="davis", root=str(davis_root), exclude="dog")
    with pytest.raises(ValueError, match="exclude is 'dog', and dataset is synthetic"):
        make(tmp_path, dataset="synthetic", exclude="dog")
    with pytest.raises(ValueError, match="full_resolution is True, and dataset is youtube_vos"):
        make(tmp_path, dataset="youtube_vos", root=str(davis_root), full_resolution=True)
    assert not (tmp_path / "records").exists()


def test_static_takes_single_pictures_of_any_size(tmp_path):
    root = tmp_path / "pictures"
    for seed, size in ((1, (48, 64)), (2, (40, 56))):
        synthetic.write_davis(root, (seed,), f"list{seed}", num_frames=1, size=size)
    names = ["synthetic-0001", "synthetic-0002"]
    (root / "ImageSets/2017/train.txt").write_text("\n".join(names))
    videos = videos_of(make(tmp_path, dataset="davis", root=str(root), static=True))
    assert [video.name for video in videos] == names
    assert [video.frame(7).shape for video in videos] == [(48, 64, 3), (40, 56, 3)]
    with pytest.raises(ValueError, match="no videos to train on"):
        make(tmp_path, dataset="davis", root=str(root))


def test_full_resolution_where_it_is(tmp_path):
    """In place of 480p only: a resolution that was asked for stays."""
    root = tmp_path / "DAVIS"

    def shape(**fields):
        found = make(tmp_path, dataset="davis", root=str(root), **fields)
        return found.video(0, np.random.default_rng(0)).frame(0).shape

    for resolution, size in (("480p", (48, 64)), ("240p", (40, 40))):
        synthetic.write_davis(root, (1,), "train", resolution=resolution, num_frames=2, size=size)
    assert shape(full_resolution=True) == (48, 64, 3)
    # Of other sequences only, as of a test split:
    synthetic.write_davis(root, (2,), "test-dev", resolution="Full-Resolution", num_frames=2)
    assert shape(full_resolution=True) == (48, 64, 3)
    synthetic.write_davis(
        root, (1,), "train", resolution="Full-Resolution", num_frames=2, size=(96, 128)
    )
    assert shape(full_resolution=True) == (96, 128, 3)
    assert shape(full_resolution=False) == (48, 64, 3)
    assert shape(full_resolution=True, resolution="240p") == (40, 40, 3)


def test_a_copy_elsewhere_has_records_of_its_own(tmp_path, davis_root):
    """Of the same names: it may have been mended, and neither is refused for the other."""
    other = shutil.copytree(davis_root, tmp_path / "other")
    path = other / "Annotations/48p/synthetic-0001/00000.png"
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(path)
    fields = dict(dataset="davis", resolution="48p")
    for root, largest in ((davis_root, 2), (other, 7), (davis_root, 2)):
        assert videos_of(make(tmp_path, **fields, root=str(root)))[0].mask(0).max() == largest


def test_127_is_the_last_id_that_leaves_one(tmp_path, davis_root):
    path = davis_root / "Annotations/48p/synthetic-0002/00001.png"
    Image.fromarray(np.where(np.array(Image.open(path)) > 0, 127, 0).astype(np.uint8)).save(path)
    make(tmp_path, dataset="davis", root=str(davis_root), resolution="48p", paste=0.5)


def test_choices_of_youtube_vos(tmp_path, youtube_root):
    train = youtube_root / "train"
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(train / kind / "a", train / kind / "b")
    meta = json.loads((train / "meta.json").read_text())
    meta["videos"]["b"] = meta["videos"]["a"]
    (train / "meta.json").write_text(json.dumps(meta))
    shutil.copytree(train, youtube_root / "part")
    (youtube_root / "part/JPEGImages/a/00000.jpg").unlink()
    (youtube_root / "part/Annotations/a/00000.png").unlink()
    fields = dict(dataset="youtube_vos", root=str(youtube_root))
    for changes, expected in (
        ({}, {"a": 2, "b": 2}),
        ({"sequences": "b"}, {"b": 2}),
        ({"exclude": "b"}, {"a": 2}),
        ({"split": "part"}, {"b": 2}),
        ({"split": "part", "static": True, "static_frames": 3}, {"a": 3, "b": 3}),
    ):
        found = videos_of(make(tmp_path, **fields, **changes))
        assert {video.name: len(video) for video in found} == expected


def test_synthetic_videos_have_no_names_to_choose(tmp_path):
    with pytest.raises(ValueError, match="sequences is 'dog', and dataset is synthetic"):
        make(tmp_path, dataset="synthetic", sequences="dog")
