"""A small DAVIS folder is written with Pillow, damaged in one way, and must be refused for that."""

import dataclasses
import logging
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from cfbi_jax.data import davis, videos

SIZE = (24, 32)


def save_frame(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def save_mask(path, *ids, size=SIZE):
    """Ids side by side in blocks, in an indexed PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.zeros(size, np.uint8)
    for i, object_id in enumerate(ids):
        label[4:12, 4 * i : 4 * i + 4] = object_id
    image = Image.fromarray(label)
    image.putpalette([0, 0, 0, 128, 0, 0] * 128)
    image.save(path)


@pytest.fixture
def root(tmp_path):
    """Two sequences of four frames and two objects, fully annotated."""
    for name in ("bear", "dogs-jump"):
        for i in range(4):
            save_frame(tmp_path / "JPEGImages" / "480p" / name / f"{i:05d}.jpg")
            save_mask(tmp_path / "Annotations" / "480p" / name / f"{i:05d}.png", 1, 2)
    for year in ("2016", "2017"):
        (tmp_path / "ImageSets" / year).mkdir(parents=True)
        (tmp_path / "ImageSets" / year / "val.txt").write_text("dogs-jump\nbear\n")
    return tmp_path


def load_and_check(root, max_objects=None, **options):
    return videos.check_videos(davis.evaluation_videos(root, **options), max_objects)


def frame_file(root, i, name="bear"):
    return root / "JPEGImages" / "480p" / name / f"{i:05d}.jpg"


def mask_file(root, i, name="bear"):
    return root / "Annotations" / "480p" / name / f"{i:05d}.png"


def test_sequences_in_the_order_of_the_list(root):
    first, second = davis.evaluation_videos(root)
    assert (first.name, second.name) == ("dogs-jump", "bear")
    assert second.frames == tuple(frame_file(root, i) for i in range(4))
    assert second.given == {0: mask_file(root, 0)}
    assert second.save == (0, 1, 2, 3)
    assert second.truth == {i: mask_file(root, i) for i in range(4)}
    assert load_and_check(root) == {"dogs-jump": (1, 2), "bear": (1, 2)}


def test_restricted_to_some_sequences(root):
    assert [v.name for v in davis.evaluation_videos(root, sequences=["bear"])] == ["bear"]
    with pytest.raises(
        ValueError, match=r"val\.txt: no sequence 'dog-jump' .*near names: dogs-jump"
    ):
        davis.evaluation_videos(root, sequences=["bear", "dog-jump"])


def test_2016_is_binary_and_2017_takes_255_for_background(root):
    save_mask(mask_file(root, 0), 1, 3, 255)
    (video,) = davis.evaluation_videos(root, 2016, sequences=["bear"])
    row = videos.read_given(video, 0)[6]
    np.testing.assert_array_equal(row[[0, 4, 8, 12]], [1, 1, 1, 0])
    (video,) = davis.evaluation_videos(root, 2017, sequences=["bear"])
    row = videos.read_label(video, mask_file(root, 0))[6]
    np.testing.assert_array_equal(row[[0, 4, 8, 12]], [1, 3, 0, 0])


def test_first_annotations_only_as_in_test_dev(root):
    for i in range(1, 4):
        mask_file(root, i).unlink()
    (video,) = davis.evaluation_videos(root, sequences=["bear"])
    assert video.given == {0: mask_file(root, 0)}
    assert video.truth == {}
    assert video.save == (0, 1, 2, 3)


def test_two_annotations_of_four_are_a_copy_that_went_wrong(root):
    for i in (2, 3):
        mask_file(root, i).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.png: no such file; 2 of 4 annotations"):
        davis.evaluation_videos(root, sequences=["bear"])


def test_what_a_mac_leaves_beside_masks_is_none(root):
    shutil.copy(mask_file(root, 0), mask_file(root, 0).with_name("._00000.png"))
    (video,) = davis.evaluation_videos(root, sequences=["bear"])
    assert list(video.truth.values()) == [mask_file(root, i) for i in range(4)]


def test_a_list_with_a_name_twice(root):
    (root / "ImageSets/2017/val.txt").write_text("bear\ndogs-jump\nbear\n")
    with pytest.raises(ValueError, match=r"val\.txt: more than once in the list: bear"):
        davis.evaluation_videos(root)


def test_the_finest_resolution_is_there_for_all_or_it_is_none(root):
    names, full = ["bear", "dogs-jump"], "Full-Resolution"
    for kind in ("JPEGImages", "Annotations"):
        for name in names:
            assert davis.finest_resolution(root, names) == "480p"
            shutil.copytree(root / kind / "480p" / name, root / kind / full / name)
    assert davis.finest_resolution(root, names) == full


def test_the_missing_frame_of_many_is_named(root):
    for i in range(4, 9):
        save_frame(frame_file(root, i))
        save_mask(mask_file(root, i), 1, 2)
    frame_file(root, 5).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"00005\.jpg: no such frame, but there are 4 and 6"
    ):
        davis.evaluation_videos(root, sequences=["bear"])


def test_numbers_of_frames_may_start_and_step_anyhow(root):
    for i in (3, 2, 1, 0):
        frame_file(root, i).rename(frame_file(root, 10 + 5 * i))
        mask_file(root, i).rename(mask_file(root, 10 + 5 * i))
    (video,) = davis.evaluation_videos(root, sequences=["bear"])
    assert [path.stem for path in video.frames] == ["00010", "00015", "00020", "00025"]
    assert video.given == {0: mask_file(root, 10)}


def test_missing_folders_and_lists(root):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        davis.evaluation_videos(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such list; .*2017/val\.txt"):
        davis.evaluation_videos(root, split="test")
    with pytest.raises(FileNotFoundError, match="240p: no such folder; there are: 480p"):
        davis.evaluation_videos(root, resolution="240p")
    with pytest.raises(ValueError, match="2018; expected 2016 or 2017"):
        davis.evaluation_videos(root, year=2018)
    shutil.rmtree(frame_file(root, 0).parent)
    with pytest.raises(FileNotFoundError, match="JPEGImages/480p/bear: no such folder"):
        davis.evaluation_videos(root)
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val\.txt: an empty list"):
        davis.evaluation_videos(root)


@pytest.mark.parametrize(("frame", "annotated"), [(2, True), (3, True), (2, False)])
def test_missing_frame(root, frame, annotated):
    frame_file(root, frame).unlink()
    if not annotated:
        for i in range(1, 4):
            mask_file(root, i).unlink()
    message = rf"JPEGImages/480p/bear/0000{frame}\.jpg: no such frame"
    with pytest.raises(FileNotFoundError, match=message):
        davis.evaluation_videos(root)


def test_missing_masks(root):
    mask_file(root, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"Annotations/480p/bear/00002\.png: no such file"):
        davis.evaluation_videos(root)
    mask_file(root, 0).unlink()
    with pytest.raises(FileNotFoundError, match=r"bear/00000\.png: .* mask of the first frame"):
        davis.evaluation_videos(root)


def test_file_that_vanishes_after_listing(root):
    listed = davis.evaluation_videos(root)
    frame_file(root, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"bear/00002\.jpg"):
        videos.check_videos(listed)


@pytest.mark.parametrize("frame", [0, 3])
def test_mask_of_another_size(root, frame):
    save_mask(mask_file(root, frame), 1, size=(24, 30))
    message = rf"bear/0000{frame}\.png: 24 x 30 pixels .* expected 24 x 32 as in .*00000\.jpg"
    with pytest.raises(ValueError, match=message):
        load_and_check(root)


def test_mask_of_another_size_without_truth(root):
    for i in range(1, 4):
        mask_file(root, i).unlink()
    save_mask(mask_file(root, 0), 1, size=(24, 30))
    with pytest.raises(ValueError, match=r"bear/00000\.png: 24 x 30 pixels .* expected 24 x 32"):
        load_and_check(root)


def test_frame_of_another_size(root):
    save_frame(frame_file(root, 2), size=(26, 32))
    with pytest.raises(ValueError, match=r"bear/00002\.jpg: 26 x 32 pixels .* expected 24 x 32"):
        load_and_check(root)


def test_truncated_frame(root):
    path = frame_file(root, 2)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"bear/00002\.jpg: a picture cut short"):
        load_and_check(root)


def test_first_mask_of_colours(root):
    Image.new("RGB", SIZE[::-1]).save(mask_file(root, 0))
    with pytest.raises(ValueError, match=r"bear/00000\.png: RGB colours"):
        load_and_check(root)


def test_anti_aliased_first_mask(root):
    Image.radial_gradient("L").resize(SIZE[::-1]).save(mask_file(root, 0))
    with pytest.raises(ValueError, match=r"bear/00000\.png: \d+ ids, .* anti-aliased"):
        load_and_check(root)


def test_id_above_255(root):
    Image.fromarray(np.full(SIZE, 300, np.uint16)).save(mask_file(root, 0))
    with pytest.raises(ValueError, match=r"bear/00000\.png: ids from 300 to 300"):
        load_and_check(root)


def test_more_objects_than_rows(root):
    save_mask(mask_file(root, 0), 1, 2, 7)
    assert load_and_check(root, max_objects=3)["bear"] == (1, 2, 7)
    message = r"bear/00000\.png: .* 3 objects \(ids 1, 2, 7\); expected at most max_objects = 2"
    with pytest.raises(ValueError, match=message):
        load_and_check(root, max_objects=2)


def test_empty_first_mask(root):
    save_mask(mask_file(root, 0))
    with pytest.raises(ValueError, match=r"bear/00000\.png: an empty first mask"):
        load_and_check(root)
    save_mask(mask_file(root, 0), 255)  # void only: empty in 2017, an object in 2016
    message = r"bear/00000\.png: an empty first mask.* masks of 0 and 255 set year=2016"
    with pytest.raises(ValueError, match=message):
        load_and_check(root)
    assert load_and_check(root, year=2016)["bear"] == (1,)


def test_frames_that_viewers_turn(root):
    """Masks drawn on the turned picture would not fit; upside down, the size tells nothing."""
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(frame_file(root, 2)).save(frame_file(root, 2), exif=exif)
    message = r"bear/00002\.jpg: viewers turn or mirror .*orientation 3"
    with pytest.raises(ValueError, match=message):
        load_and_check(root)
    with pytest.raises(ValueError, match=message):
        videos.check_training_files(davis.training_files(root, split="val"))


def test_first_error_in_the_order_of_the_list_is_raised(root, monkeypatch):
    for name in ("bear", "dogs-jump"):
        save_mask(mask_file(root, 0, name))
    original = videos.read_given

    def slow_for_the_first(video, index):
        if video.name == "dogs-jump":
            time.sleep(0.1)
        return original(video, index)

    monkeypatch.setattr(videos, "read_given", slow_for_the_first)
    with pytest.raises(ValueError, match=r"dogs-jump/00000\.png: an empty first mask"):
        load_and_check(root)


# ---- To train on ----


def test_training_files_are_all_frames_with_their_masks(root):
    first, second = davis.training_files(root, split="val")
    assert (first.name, second.name) == ("dogs-jump", "bear")
    assert second.frames == tuple(frame_file(root, i) for i in range(4))
    assert second.masks == tuple(mask_file(root, i) for i in range(4))
    assert (first.reading, second.reading) == ("void_255", "void_255")
    (video,) = davis.training_files(root, 2016, "val", sequences=["bear"])
    assert (video.name, video.reading) == ("bear", "binary")
    assert [v.name for v in davis.training_files(root, split="val", sequences=["bear"])] == ["bear"]


def test_training_files_are_those_of_the_train_list_by_default(root):
    with pytest.raises(FileNotFoundError, match=r"2017/train\.txt: no such list; .*2017/val\.txt"):
        davis.training_files(root)
    (root / "ImageSets" / "2017" / "train.txt").write_text("bear\n")
    assert [video.name for video in davis.training_files(root)] == ["bear"]
    with pytest.raises(FileNotFoundError, match="240p: no such folder; there are: 480p"):
        davis.training_files(root, resolution="240p")
    with pytest.raises(ValueError, match=r"train\.txt: no sequence 'dogs-jump'"):
        davis.training_files(root, sequences=["dogs-jump"])
    with pytest.raises(ValueError, match="2018; expected 2016 or 2017"):
        davis.training_files(root, year=2018)


@pytest.mark.parametrize("kept", [{0, 1, 3}, {1, 2, 3}, {0}, set()])
def test_every_frame_to_train_on_needs_its_mask(root, kept):
    missing = sorted(set(range(4)) - kept)
    for i in missing:
        mask_file(root, i).unlink()
    message = rf"Annotations/480p/bear/0000{missing[0]}\.png: no such file; {len(kept)} of 4 "
    with pytest.raises(FileNotFoundError, match=message):
        davis.training_files(root, split="val")


def test_mask_to_train_on_without_frame(root):
    frame_file(root, 3).unlink()
    with pytest.raises(FileNotFoundError, match=r"bear/00003\.jpg: no such frame, but it has an"):
        davis.training_files(root, split="val")


def test_sequence_of_one_frame_is_skipped(root, caplog):
    for i in (1, 2, 3):
        frame_file(root, i).unlink()
        mask_file(root, i).unlink()
    for i in (2, 3):
        frame_file(root, i, "dogs-jump").unlink()
        mask_file(root, i, "dogs-jump").unlink()
    with caplog.at_level(logging.WARNING):
        assert [v.name for v in davis.training_files(root, split="val")] == ["dogs-jump"]
    assert "bear: annotated frames: 1; skipped" in caplog.text
    assert "dogs-jump" not in caplog.text


@pytest.mark.parametrize("name", ["animals/bear", "..", "/bear", "./bear"])
def test_names_are_those_of_folders(root, name):
    (root / "ImageSets" / "2017" / "val.txt").write_text(f"bear\n{name}\n")
    with pytest.raises(ValueError, match=rf"val\.txt: '{name}' .* expected the name of a folder"):
        davis.sequence_names(root, 2017, "val")


def test_names_are_lines(tmp_path):
    """Folders may have spaces in their names."""
    path = tmp_path / "ImageSets/2017/train.txt"
    path.parent.mkdir(parents=True)
    path.write_text("my dog\n\n bear \r\n", encoding="utf-8-sig")
    assert davis.sequence_names(tmp_path, 2017, "train") == ["my dog", "bear"]


def test_names_of_frames_may_be_more_than_numbers(root):
    for i in range(4):
        for path in (frame_file(root, i), mask_file(root, i)):
            path.rename(path.with_stem(f"bear_{i}"))
    (video,) = davis.evaluation_videos(root, sequences=["bear"])
    assert [path.stem for path in video.frames] == [f"bear_{i}" for i in range(4)]


def test_the_first_mask_is_that_of_the_first_frame(root):
    (video,) = davis.evaluation_videos(root, sequences=["bear"])
    late = dataclasses.replace(video, given={1: mask_file(root, 1)})
    with pytest.raises(ValueError, match=r"bear: the first mask is given at frame 1 \(00001\.jpg"):
        videos.check_videos([late])
