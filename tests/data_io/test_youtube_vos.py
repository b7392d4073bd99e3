"""A small YouTube-VOS folder: ids with a gap, object 4 appears late, frames are 5 apart."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from cfbi_jax.data import videos, youtube_vos

META = {
    "videos": {
        "b": {
            "objects": {
                "4": {"category": "dog", "frames": ["00015", "00010"]},
                "2": {"category": "cat", "frames": ["00000", "00005", "00010"]},
            }
        },
        "a": {"objects": {"1": {"frames": ["00020"]}}},
    }
}


def save_frame(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24)).save(path)


def save_mask(path, *ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.zeros((24, 32), np.uint8)
    for i, object_id in enumerate(ids):
        label[4:12, 4 * i : 4 * i + 4] = object_id
    Image.fromarray(label).save(path)


@pytest.fixture
def root(tmp_path):
    for split in ("valid", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "meta.json").write_text(json.dumps(META))
        for name, stem in (("b", 0), ("b", 5), ("b", 10), ("b", 15), ("a", 20)):
            save_frame(tmp_path / split / "JPEGImages" / name / f"{stem:05d}.jpg")
        save_mask(tmp_path / split / "Annotations" / "b" / "00000.png", 2)
        save_mask(tmp_path / split / "Annotations" / "b" / "00010.png", 2, 4)
        save_mask(tmp_path / split / "Annotations" / "a" / "00020.png", 1)
    for stem in (5, 15):
        save_mask(tmp_path / "train" / "Annotations" / "b" / f"{stem:05d}.png", 2, 4)
    for stem in range(20):
        save_frame(tmp_path / "valid_all_frames" / "JPEGImages" / "b" / f"{stem:05d}.jpg")
    for stem in range(17, 26):
        save_frame(tmp_path / "valid_all_frames" / "JPEGImages" / "a" / f"{stem:05d}.jpg")
    return tmp_path


def write_meta(root, videos_entry):
    (root / "valid" / "meta.json").write_text(json.dumps({"videos": videos_entry}))


def test_frames_of_a_video_are_those_of_its_objects(root):
    first, video = youtube_vos.evaluation_videos(root)
    assert (first.name, video.name) == ("a", "b")
    frames = root / "valid" / "JPEGImages" / "b"
    assert video.frames == tuple(frames / f"000{i}.jpg" for i in ("00", "05", "10", "15"))
    masks = root / "valid" / "Annotations" / "b"
    assert video.given == {0: masks / "00000.png", 2: masks / "00010.png"}
    assert video.starts == {2: 0, 4: 2}
    assert video.save == (0, 1, 2, 3)
    assert video.truth == {}
    assert videos.check_videos([first, video]) == {"a": (1,), "b": (2, 4)}


def test_an_object_is_given_at_its_own_first_frame_only(root):
    (video,) = youtube_vos.evaluation_videos(root, videos=["b"])
    np.testing.assert_array_equal(videos.read_given(video, 2)[6, [0, 4]], [0, 4])
    # The file itself shows object 2 there as well, and the truth has to.
    np.testing.assert_array_equal(videos.read_label(video, video.given[2])[6, [0, 4]], [2, 4])
    save_mask(video.given[0], 2, 4)  # object 4 seen before its first frame
    np.testing.assert_array_equal(videos.read_given(video, 0)[6, [0, 4]], [2, 0])


def test_all_frames_run_from_the_first_listed_to_the_last(root):
    first, video = youtube_vos.evaluation_videos(root, all_frames=True)
    assert [path.stem for path in first.frames] == ["00020"]
    assert [path.stem for path in video.frames] == [f"{i:05d}" for i in range(16)]
    assert video.frames[1].parent.parent.parent.name == "valid_all_frames"
    assert video.save == (0, 5, 10, 15)
    assert video.starts == {2: 0, 4: 10}
    assert sorted(video.given) == [0, 10]
    assert videos.check_videos([first, video]) == {"a": (1,), "b": (2, 4)}


def test_frames_are_in_the_order_of_their_numbers(root):
    """99995 before 100000; and of other files in the folders nothing is taken."""
    frames = ["99990", "99995", "100000"]
    objects = {"1": {"frames": frames[::-1]}, "255": {"frames": ["100000", "99995"]}}
    write_meta(root, {"c": {"objects": objects}})
    for split in ("valid", "valid_all_frames"):
        folder = root / split / "JPEGImages" / "c"
        for stem in frames:
            save_frame(folder / f"{stem}.jpg")
        for name in ("._99995.jpg", "preview.jpg", "99996.txt"):
            (folder / name).write_bytes(b"")
    save_mask(root / "valid/Annotations/c/99990.png", 1)
    save_mask(root / "valid/Annotations/c/99995.png", 1, 255)
    for all_frames in (False, True):
        (video,) = youtube_vos.evaluation_videos(root, all_frames=all_frames)
        assert [path.stem for path in video.frames] == frames
        assert video.save == (0, 1, 2) and video.starts == {1: 0, 255: 1}


def test_only_the_split_train_is_annotated_whole(root):
    (root / "train").rename(root / "train_some")
    (_, video) = youtube_vos.evaluation_videos(root, "train_some")
    assert video.truth == {}


def test_a_meta_file_with_a_mark_of_its_order_of_bytes(root):
    path = root / "valid" / "meta.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(youtube_vos.read_meta(root, "valid")) == ["a", "b"]


def test_held_out_training_videos_have_the_truth(root):
    (video,) = youtube_vos.evaluation_videos(root, "train", videos=["b"])
    assert sorted(video.given) == [0, 2]
    assert [video.truth[i].stem for i in video.save] == ["00000", "00005", "00010", "00015"]
    video.truth[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"b/00005\.png: no such file"):
        youtube_vos.evaluation_videos(root, "train")


def test_meta_is_read_whole(root):
    meta = youtube_vos.read_meta(root, "valid")
    assert list(meta["b"]) == [2, 4]
    assert meta["b"][4] == youtube_vos.ObjectEntry("dog", ("00010", "00015"))
    assert meta["a"][1].category == ""


def test_missing_files(root):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        youtube_vos.evaluation_videos(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"test/meta\.json: .* train, valid"):
        youtube_vos.evaluation_videos(root, "test")
    with pytest.raises(FileNotFoundError, match="train_all_frames/JPEGImages: no such folder"):
        youtube_vos.evaluation_videos(root, "train", all_frames=True)
    with pytest.raises(ValueError, match=r"meta\.json: no video 'c' among 2"):
        youtube_vos.evaluation_videos(root, videos=["c"])
    (root / "valid" / "Annotations" / "b" / "00010.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b/00010\.png: .* object 4 starts there"):
        youtube_vos.evaluation_videos(root)
    (root / "valid" / "JPEGImages" / "b" / "00005.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b/00005\.jpg: no such frame"):
        youtube_vos.evaluation_videos(root)


@pytest.mark.parametrize(
    "content", ["{", '{"videos": []}', "[]", '{"videos": {"a": {}}}', 100_000 * "["]
)
def test_damaged_meta(root, content):
    (root / "valid" / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"valid/meta\.json"):
        youtube_vos.evaluation_videos(root)


@pytest.mark.parametrize("name", ["a/b", "", ".."])
def test_names_are_those_of_folders(root, name):
    write_meta(root, {name: {"objects": {"1": {"frames": ["00000"]}}}})
    with pytest.raises(ValueError, match=rf"meta\.json: '{name}' .* expected the name of a folder"):
        youtube_vos.read_meta(root, "valid")


@pytest.mark.parametrize("split", ["train/", "./train", "valid/../train", "", ".."])
def test_a_split_is_the_name_of_a_folder(root, split):
    """`train/`, as shells complete it, would not be known as the split whose masks are all true."""
    with pytest.raises(ValueError, match=f"split is '{split}'; expected the name of a folder"):
        youtube_vos.evaluation_videos(root, split)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({}, "no 'objects'"),
        ({"0": {"frames": ["00000"]}}, "object id '0'; expected 1 to 255"),
        ({"256": {"frames": ["00000"]}}, "object id '256'; expected 1 to 255"),
        ({"x": {"frames": ["00000"]}}, "object id 'x'; expected 1 to 255"),
        ({"1": {"frames": []}}, "object 1: no frames"),
        ({"1": {"category": "dog"}}, "object 1: no frames"),
        ({"1": {"frames": [5]}}, "object 1: frame 5"),
        ({"1": {"frames": ["00000"], "category": 3}}, "object 1: category 3; expected a name"),
        ({"2": {"frames": ["00000"]}, "02": {"frames": ["00005"]}}, "object 02 is there twice"),
    ],
)
def test_wrong_entries_of_meta(root, objects, message):
    write_meta(root, {"b": {"objects": objects}})
    with pytest.raises(ValueError, match=rf"meta\.json: video 'b': {message}"):
        youtube_vos.evaluation_videos(root)


def test_empty_first_mask_is_legal_if_an_object_comes_later(root, caplog):
    (video,) = youtube_vos.evaluation_videos(root, videos=["b"])
    save_mask(video.given[0])
    with caplog.at_level(logging.WARNING):
        assert videos.check_videos([video]) == {"b": (4,)}
    assert "object 2 starts at 00000 but has no pixel" in caplog.text
    save_mask(video.given[2], 2)  # object 2 does not start here, so nothing is given
    with pytest.raises(
        ValueError, match=r"b/00000\.png: an empty first mask, and no object in a l"
    ):
        videos.check_videos([video])


def test_more_objects_than_rows_over_the_whole_video(root):
    listed = youtube_vos.evaluation_videos(root)
    message = (
        r"b/00010\.png: with it b has 2 objects \(ids 2, 4\); expected at most max_objects = 1"
    )
    with pytest.raises(ValueError, match=message):
        videos.check_videos(listed, max_objects=1)


def test_training_files_are_the_annotated_frames(root, caplog):
    annotations = root / "train" / "Annotations" / "b"
    (annotations / "00005.png").unlink()
    save_frame(root / "train" / "JPEGImages" / "b" / "00002.jpg")
    with caplog.at_level(logging.WARNING):
        (video,) = youtube_vos.training_files(root)
    assert "a: annotated frames: 1; skipped" in caplog.text
    assert (video.name, video.reading) == ("b", "ids")
    pictures = root / "train" / "JPEGImages" / "b"
    assert video.frames == tuple(pictures / f"{stem}.jpg" for stem in ("00000", "00010", "00015"))
    assert video.masks == tuple(annotations / f"{stem}.png" for stem in ("00000", "00010", "00015"))


def test_training_files_are_in_the_order_of_their_numbers(root):
    save_frame(root / "train" / "JPEGImages" / "b" / "100000.jpg")
    save_mask(root / "train" / "Annotations" / "b" / "100000.png", 2)
    save_mask(root / "train" / "Annotations" / "b" / "._00000.png", 2)  # as macOS leaves them
    (video,) = youtube_vos.training_files(root)
    stems = ["00000", "00005", "00010", "00015", "100000"]
    assert [path.stem for path in video.frames] == [path.stem for path in video.masks] == stems


def test_training_files_of_some_videos_are_sorted(root):
    save_frame(root / "train" / "JPEGImages" / "a" / "00025.jpg")
    save_mask(root / "train" / "Annotations" / "a" / "00025.png", 1)
    assert [video.name for video in youtube_vos.training_files(root)] == ["a", "b"]
    found = youtube_vos.training_files(root, videos=["b", "a", "b"])
    assert [video.name for video in found] == ["a", "b"]
    assert [video.name for video in youtube_vos.training_files(root, videos=["b"])] == ["b"]
    with pytest.raises(ValueError, match=r"train/meta\.json: no video 'c' among 2"):
        youtube_vos.training_files(root, videos=["c"])


def test_training_files_that_are_missing(root):
    train = root / "train"
    (train / "JPEGImages" / "b" / "00010.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages/b/00010\.jpg: no such frame, but it"):
        youtube_vos.training_files(root)
    (train / "Annotations" / "a").rename(train / "Annotations" / "other")
    with pytest.raises(FileNotFoundError, match="Annotations/a: no such folder, but meta.json"):
        youtube_vos.training_files(root)
    (train / "Annotations").rename(train / "Masks")
    with pytest.raises(FileNotFoundError, match="train/Annotations: no such folder"):
        youtube_vos.training_files(root)
    (train / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/meta\.json: no such file; .*: valid"):
        youtube_vos.training_files(root)


def test_all_frames_of_held_out_videos_have_the_truth(root):
    (root / "valid_all_frames").rename(root / "train_all_frames")
    (video,) = youtube_vos.evaluation_videos(root, "train", all_frames=True, videos=["b"])
    assert len(video.frames) == 16
    found = {i: path.stem for i, path in video.truth.items()}
    assert found == {0: "00000", 5: "00005", 10: "00010", 15: "00015"}


def test_255_is_an_object_as_any_other(root):
    write_meta(root, {"b": {"objects": {"255": {"frames": ["00000"]}}}})
    save_mask(root / "valid" / "Annotations" / "b" / "00000.png", 255)
    assert videos.check_videos(youtube_vos.evaluation_videos(root)) == {"b": (255,)}


def test_training_files_of_another_split_and_of_single_frames(root):
    (root / "train").rename(root / "part")
    first, second = youtube_vos.training_files(root, "part", least=1)
    assert [(v.name, len(v.frames)) for v in (first, second)] == [("a", 1), ("b", 4)]
    assert second.frames[0] == root / "part" / "JPEGImages" / "b" / "00000.jpg"
    assert second.masks[0] == root / "part" / "Annotations" / "b" / "00000.png"
