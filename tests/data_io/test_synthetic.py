import dataclasses
import importlib.metadata
import pickle
import re
import socket

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image

from cfbi_jax.data import davis, synthetic, synthetic_looks, videos
from cfbi_jax.evaluation.metrics import region_similarity


def rgb_mean(frame, where):
    return frame[where].mean(axis=0)


def topmost(video, time):
    """The index of the blob that each pixel's centre is in, -1 for none; -2 if near an outline.

    Drawn without OpenCV: a pixel is near if points around its centre are not all in or all out.
    """
    height, width = video.size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    centres = np.stack([x, y], axis=-1).reshape(-1, 2)
    result = np.full(height * width, -1)
    for i, blob in enumerate(video._blobs):
        polygon = Polygon(synthetic._outline(blob, time, video.size))
        around = [(0.4 * dx, 0.4 * dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        inside = np.stack([polygon.contains_points(centres + offset) for offset in around])
        result[inside.all(axis=0)] = i
        result[inside.any(axis=0) & ~inside.all(axis=0)] = -2
    return result.reshape(height, width)


def ids_of_topmost(video, time):
    """The mask to expect, and where it is sure."""
    top = topmost(video, time)
    ids = np.array([*(blob.object_id for blob in video._blobs), 0])  # the last for index -1
    return ids[np.maximum(top, -1)], top != -2


def test_shapes_and_determinism():
    frames, labels = synthetic.synthetic_video(5, 4, (48, 64), 3)
    assert (frames.shape, frames.dtype) == ((4, 48, 64, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((4, 48, 64), np.uint8)
    same_frames, same_labels = synthetic.synthetic_video(5, 4, (48, 64), 3)
    np.testing.assert_array_equal(frames, same_frames)
    np.testing.assert_array_equal(labels, same_labels)
    assert (synthetic.synthetic_video(6, 4, (48, 64), 3)[1] != labels).any()
    # A longer video begins like a shorter one.
    np.testing.assert_array_equal(synthetic.synthetic_video(5, 2, (48, 64), 3)[0], frames[:2])


@pytest.mark.parametrize("num_objects", [1, 3, 10])
def test_every_object_is_there_at_the_start(num_objects):
    for seed in range(8):
        _, labels = synthetic.synthetic_video(seed, 1, (64, 96), num_objects)
        areas = np.bincount(labels[0].ravel(), minlength=num_objects + 1)
        assert len(areas) == num_objects + 1
        assert areas.min() >= 0.005 * labels[0].size


def test_places_are_drawn_again_until_objects_are_visible(monkeypatch):
    small = min(np.bincount(synthetic.synthetic_video(s, 1)[1].ravel())[1:].min() for s in range(5))
    wanted = 0.05
    assert small < wanted * 96 * 160  # some of these seeds need another attempt
    monkeypatch.setattr(synthetic, "_VISIBLE_AT_START", wanted)
    for seed in range(5):
        _, labels = synthetic.synthetic_video(seed, 1)
        assert np.bincount(labels.ravel())[1:].min() >= wanted * labels.size
    monkeypatch.setattr(synthetic, "_VISIBLE_AT_START", 0.9)
    with pytest.raises(ValueError, match="seed 0: no room for 2 objects"):
        synthetic.synthetic_video(0, 1, (32, 32))


def test_objects_move_a_little_in_every_frame():
    for seed in range(6):
        _, labels = synthetic.synthetic_video(seed, 12, num_objects=1)
        for before, after in zip(labels[:-1] > 0, labels[1:] > 0, strict=True):
            if before.sum() > 200 and after.sum() > 200:
                overlap = (before & after).sum() / (before | after).sum()
                assert 0.5 < overlap < 1


def test_objects_travel():
    """Their centres move by a part of a pixel to a few pixels per frame."""
    for seed in range(6):
        _, labels = synthetic.synthetic_video(seed, 8, num_objects=1)
        centres = np.array([np.argwhere(label > 0).mean(axis=0) for label in labels])
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        assert 0.3 < steps.mean() < 3


def test_texture_moves_with_the_outline():
    texture = np.full((81, 81, 3), 90, np.uint8)
    texture[36:45, 36:45] = 255  # a white spot in the middle
    still = np.zeros(4)
    blob = synthetic._Blob(
        *(1, 1, 15.0, still, still, still),
        start=np.array([60.0, 40.0]),
        speed=np.array([3.0, 1.0]),
        angle=0.5,
        spin=0.1,
        swing=0.1,
        swing_phase=0.0,
        swing_speed=0.1,
        shade=0.0,
    )
    for time in (0, 1, 7):
        frame, label = np.zeros((96, 160, 3), np.uint8), np.full((96, 160), 9, np.uint8)
        synthetic._paint(frame, label, blob, texture, time)
        expected = np.array([40.0 + time, 60.0 + 3 * time])
        assert set(np.unique(label)) == {1, 9}
        outline_centre = np.argwhere(label == 1).mean(axis=0)
        spot_centre = np.argwhere(frame[..., 0] >= 170).mean(axis=0)
        np.testing.assert_allclose(outline_centre, expected, atol=0.3)
        np.testing.assert_allclose(spot_centre, expected, atol=0.6)
    # The shade follows a cosine: brightest where it starts.
    synthetic._paint(frame, label, dataclasses.replace(blob, shade=0.1), texture, 0)
    assert tuple(frame[30, 60]) == (99, 99, 99)  # in the blob, 10 pixels above the spot


@pytest.mark.parametrize("time", [0, 9])
def test_masks_are_the_outlines_and_nearer_blobs_hide_others(time):
    overlaps = False
    for seed in range(6):
        video = synthetic.SyntheticVideo(seed, 10, (48, 80), 3)
        expected, sure = ids_of_topmost(video, time)
        assert sure.mean() > 0.8
        np.testing.assert_array_equal(video.mask(time)[sure], expected[sure])
        video._blobs.reverse()
        overlaps |= (ids_of_topmost(video, time)[0][sure] != expected[sure]).any()
    assert overlaps  # else their order would not matter


@pytest.mark.parametrize("time", [0, 9])
def test_frames_show_what_the_masks_say(time):
    """With object 1 red, object 2 green and all else black, a mask can be read off its frame."""
    for seed in range(6):
        video = synthetic.SyntheticVideo(seed, 10, num_objects=2)
        video._blobs = [dataclasses.replace(blob, shade=0.0) for blob in video._blobs]
        video._textures = [np.zeros_like(texture) for texture in video._textures]
        for blob, texture in zip(video._blobs, video._textures, strict=True):
            if blob.object_id:
                texture[..., blob.object_id - 1] = 200
        video._background.texture[:] = 0
        video._light.swings[:] = 0
        frame, mask = video.frame(time)[..., :2], video.mask(time)
        brightest = frame.max(axis=-1)
        bright, dark = brightest > 115, brightest < 15
        np.testing.assert_array_equal(mask[bright], frame.argmax(axis=-1)[bright] + 1)
        assert not mask[dark].any()
        assert (bright | dark).mean() > 0.97 and bright.mean() > 0.01


def test_labels_fit_the_frames():
    """Colours jump where the label's outline is, more than in a shifted place."""
    jumps, jumps_elsewhere = [], []
    for seed in range(8):
        frames, labels = synthetic.synthetic_video(seed, 1, (96, 160), 2)
        edge = labels[0, :, 1:] != labels[0, :, :-1]
        # Smooth edges are up to two pixels wide: compare the pixels on either side.
        colour = frames[0].astype(int)
        change = np.abs(colour[:, 3:] - colour[:, :-3]).sum(axis=-1)
        jumps.append(change[edge[:, 1:-1]].mean())
        jumps_elsewhere.append(change[np.roll(edge, 12, axis=1)[:, 1:-1]].mean())
    assert np.mean(jumps) > 1.5 * np.mean(jumps_elsewhere)


def test_ids_stay_with_their_objects():
    """The mean colour of an id in a late frame is that of the same id in the first, mostly."""
    right, total = 0, 0
    for seed in range(6):
        frames, labels = synthetic.synthetic_video(seed, 12, num_objects=3)
        means = [
            {i: frames[t][labels[t] == i].mean(axis=0) for i in np.unique(labels[t]) if i}
            for t in (0, -1)
        ]
        for object_id, colour in means[1].items():
            nearest = min(means[0], key=lambda i: np.abs(means[0][i] - colour).sum())  # noqa: B023
            right, total = right + (nearest == object_id), total + 1
    assert right >= 0.9 * total


def test_distractors_look_like_an_object_and_are_background():
    like, total = 0, 0
    for seed in range(12):
        video = synthetic.SyntheticVideo(seed, 1, num_objects=3)
        top, frame = topmost(video, 0), video.frame(0).astype(float)
        colours = {
            blob.object_id: rgb_mean(frame, top == i)
            for i, blob in enumerate(video._blobs)
            if blob.object_id
        }
        distractors = [i for i, blob in enumerate(video._blobs) if blob.object_id == 0]
        assert 1 <= len(distractors) <= 3
        for i in distractors:
            assert not video.mask(0)[top == i].any()
            if (top == i).sum() < 80:
                continue
            colour = rgb_mean(frame, top == i)
            nearest = min(colours, key=lambda k: np.abs(colours[k] - colour).sum())  # noqa: B023
            like, total = like + (nearest == video._blobs[i].looks_like), total + 1
    assert total >= 15
    assert like >= 0.85 * total


def test_every_distractor_has_a_texture_of_its_own(monkeypatch):
    monkeypatch.setattr(
        synthetic_looks,
        "similar_texture",
        lambda rng, texture, side: np.full((side, side, 3), texture[0, 0], np.uint8),
    )
    for seed in range(4):
        video = synthetic.SyntheticVideo(seed, num_objects=2)
        for blob, texture in zip(video._blobs, video._textures, strict=True):
            assert len(texture) == int(4 * blob.radius) + 8
            plain = (texture == texture[0, 0]).all()
            assert plain == (blob.object_id == 0)


def test_distractors_texture_is_the_same_or_of_slightly_other_hue():
    """Detail by detail: not only of the same mean colour."""
    (texture,) = synthetic_looks.object_textures(np.random.default_rng(0), [60])
    differences = []
    for seed in range(20):
        similar = synthetic_looks.similar_texture(np.random.default_rng(seed), texture, 60)
        differences.append(np.abs(similar.astype(int) - texture).mean())
        correlation = np.corrcoef(similar.sum(axis=-1).ravel(), texture.sum(axis=-1).ravel())[0, 1]
        assert correlation > 0.9
    assert 0.0 in differences
    assert 5 < max(differences) < 60


# ---- Frame by frame ----


def test_frames_do_not_depend_on_those_drawn_before():
    frames, masks = synthetic.synthetic_video(7, 14, (48, 64), 3)
    video = synthetic.SyntheticVideo(7, 14, (48, 64), 3)
    assert len(video) == 14
    # More frames than are kept, some of them again after they were dropped.
    for t in [13, 2, *range(12, -1, -1), 13, 2, 2]:
        np.testing.assert_array_equal(video.mask(t), masks[t])
        np.testing.assert_array_equal(video.frame(t), frames[t])
    with pytest.raises(IndexError, match="frame 14 of 14"):
        video.frame(14)
    with pytest.raises(IndexError, match="frame -1 of 14"):
        video.mask(-1)


def test_a_frame_and_its_mask_are_drawn_once(monkeypatch):
    video = synthetic.SyntheticVideo(7, 20, (48, 64), 1)
    times, paint = [], synthetic._paint

    def counted(*arguments):
        times.append(arguments[-1])
        paint(*arguments)

    monkeypatch.setattr(synthetic, "_paint", counted)
    clip = [0, 5, 6, 7, 8]
    for t in clip:
        video.frame(t)
    for t in clip:
        video.mask(t)
    assert times == [t for t in clip for _ in video._blobs]
    # Kept for others, hence not theirs to change; and not all of a long video.
    assert not video.frame(0).flags.writeable and not video.mask(0).flags.writeable
    for t in range(20):
        video.frame(t)
    assert len(video._drawn) <= synthetic._FRAMES_KEPT


def test_camera_noise():
    noise = [synthetic_looks.camera_noise(np.random.default_rng(s), (96, 160)) for s in (0, 1)]
    for one in noise:
        assert abs(one.mean()) < 0.1 and 1.8 < one.std() < 2.2
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03
    # Frames have it, each its own: the same picture twice differs by twice the variance.
    video = synthetic.SyntheticVideo(0)
    video._background.texture[:] = 128
    video._background.pan[:] = video._light.swings[:] = 0
    video._blobs, video._textures = [], []
    change = video.frame(1).astype(int) - video.frame(2)
    assert 1.8 * 2**0.5 < change.std() < 2.2 * 2**0.5


def test_light_changes_mildly():
    changes = []
    for seed in range(10):
        light = synthetic_looks.Light(np.random.default_rng(seed))
        tables = np.array([light.table(time)[0] for time in range(24)]).astype(int)
        assert (np.diff(tables, axis=1) >= 0).all()  # brighter stays brighter
        middle = tables[:, 128].mean(axis=-1)
        assert np.abs(middle - 128).max() <= 25 + 8
        assert np.abs(np.diff(tables, axis=0)).max() <= 12
        changes.append([np.ptp(middle), np.ptp(tables[:, 200] - tables[:, 56], axis=0).max()])
    brightness, contrast = np.mean(changes, axis=0)
    assert brightness > 8 and contrast > 8

    video = synthetic.SyntheticVideo(0)
    lit = video.frame(5).astype(int)
    video = synthetic.SyntheticVideo(0)
    video._light.table = lambda time: np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, -1, 3)
    table = synthetic_looks.Light.table(video._light, 5)[0].astype(int)
    expected = table[video.frame(5), np.arange(3)]
    assert np.abs(lit - expected).mean() < 4 < np.abs(lit - video.frame(5)).mean()


# ---- Photographs ----


def test_photographs_come_with_the_package_and_need_no_download(monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("tried to use the network")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    shipped = {str(path) for path in importlib.metadata.files("scikit-image")}
    synthetic_looks.photograph.cache_clear()
    for name in synthetic_looks.PHOTOGRAPHS:
        assert f"skimage/data/{name}" in shipped
        picture = synthetic_looks.photograph(name)
        assert max(picture.shape) <= 640 and min(picture.shape[:2]) >= 250
        grey = (picture == picture[..., :1]).all()
        assert grey == (name in synthetic_looks._GREY_PHOTOGRAPHS)
        assert synthetic_looks.photograph(name) is picture


def test_half_of_what_is_seen_is_photographed(monkeypatch):
    pieces, piece = [], synthetic_looks._photograph_piece

    def counted(rng, name, shape, *arguments):
        pieces.append((name, shape))
        return piece(rng, name, shape, *arguments)

    monkeypatch.setattr(synthetic_looks, "_photograph_piece", counted)
    rng = np.random.default_rng(0)
    for _ in range(50):
        before = len(pieces)
        textures = synthetic_looks.object_textures(rng, [20, 30, 40, 50])
        assert [t.shape for t in textures] == [(side, side, 3) for side in (20, 30, 40, 50)]
        names = [name for name, _ in pieces[before:]]
        assert len(set(names)) == len(names)
    assert 70 <= len(pieces) <= 130  # of 200
    assert {name for name, _ in pieces} == set(synthetic_looks.PHOTOGRAPHS)
    pieces.clear()
    for _ in range(100):
        assert synthetic_looks.background_texture(rng, (30, 40)).shape == (30, 40, 3)
    assert 30 <= len(pieces) <= 70


@pytest.mark.parametrize("name", ["coffee.png", "grass.png"])
def test_pieces_of_a_photograph_show_it(name):
    """A piece as large as the photograph is that, in other colours, maybe flipped."""
    rng = np.random.default_rng(3)
    whole = synthetic_looks.photograph(name)
    piece = synthetic_looks._photograph_piece(rng, name, whole.shape[:2], 1.0, 1.0)
    assert piece.shape == whole.shape
    brightness, expected = piece.sum(axis=-1), whole.sum(axis=-1)
    similarity = [
        np.corrcoef(brightness[::i, ::j].ravel(), expected.ravel())[0, 1]
        for i in (1, -1)
        for j in (1, -1)
    ]
    assert max(similarity) > 0.8


def test_turning_hues():
    turned = synthetic_looks._turn_hue(1 / 3) @ np.array([200.0, 30.0, 10.0])
    np.testing.assert_allclose(turned, [10, 200, 30], atol=1e-3)  # red has become green
    matrix = synthetic_looks._turn_hue(0.1)
    np.testing.assert_allclose(matrix @ np.full(3, 90.0), 90, atol=1e-3)


# ---- Videos to train on ----


def test_training_videos_are_new_and_none_of_evaluation():
    source = synthetic.SyntheticVideos(0, num_videos=5, num_frames=3, size=(32, 48))
    rng = np.random.default_rng(1)
    made = [source.video(i % 5, rng) for i in range(100)]
    assert len(source) == 5
    found = [re.fullmatch(r"synthetic-(\d+)-objects-(\d)", video.name) for video in made]
    seeds = [int(match[1]) for match in found]
    assert min(seeds) >= 1_000_000 == synthetic.FIRST_TRAINING_SEED
    assert len(set(seeds)) == 100
    assert [int(match[2]) for match in found] == [video.mask(0).max() for video in made]
    assert {int(match[2]) for match in found} == {1, 2, 3}
    again = synthetic.SyntheticVideo(seeds[9], 3, (32, 48), int(found[9][2]))
    np.testing.assert_array_equal(again.frame(2), made[9].frame(2))
    assert len(made[9]) == 3 and made[9].frame(2).shape == (32, 48, 3)


def test_seeds_of_training_videos_start_at_the_first(monkeypatch):
    first = 2**31 - 50
    monkeypatch.setattr(synthetic, "FIRST_TRAINING_SEED", first)
    source, rng = synthetic.SyntheticVideos(0, size=(32, 48)), np.random.default_rng(0)
    seeds = [source.video(0, rng).seed for _ in range(20)]
    assert min(seeds) >= first and len(set(seeds)) > 10


def test_training_videos_are_determined_by_seed_index_and_generator():
    def name(seed, index, generator):
        source = synthetic.SyntheticVideos(seed, size=(32, 48))
        return source.video(index, np.random.default_rng(generator)).name

    assert name(0, 1, 2) == name(0, 1, 2)
    assert len({name(0, 1, 2), name(3, 1, 2), name(0, 3, 2), name(0, 1, 3)}) == 4


def test_pickling():
    source = synthetic.SyntheticVideos(4, 10, 3, (32, 48), 2)
    video = source.video(6, np.random.default_rng(0))
    first = video.frame(1)
    copied = pickle.loads(pickle.dumps(source))
    assert len(copied) == 10
    for other in (
        copied.video(6, np.random.default_rng(0)),
        pickle.loads(pickle.dumps(video)),
    ):
        assert other.name == video.name
        np.testing.assert_array_equal(other.frame(1), first)
        np.testing.assert_array_equal(other.frame(2), video.frame(2))
        np.testing.assert_array_equal(other.mask(2), video.mask(2))


def test_arguments_of_training_videos():
    for wrong in ({"seed": -1}, {"num_videos": 0}, {"max_objects": 0}, {"max_objects": 11}):
        with pytest.raises(ValueError, match="expected seed 0 or more"):
            synthetic.SyntheticVideos(**{"seed": 0, **wrong})
    source = synthetic.SyntheticVideos(0, num_videos=2)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"video {index} of 2"):
            source.video(index, np.random.default_rng(0))


def test_repeating_the_first_mask_is_a_poor_prediction():
    scores = []
    for seed in range(8):
        _, masks = synthetic.synthetic_video(seed)
        scores += [
            region_similarity(masks[0] == i, mask == i) for mask in masks[1:] for i in (1, 2)
        ]
    assert 0.2 < np.mean(scores) < 0.45


@pytest.mark.parametrize("wrong", [{"num_objects": 0}, {"num_objects": 11}, {"num_frames": 0}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected 1 frame or more"):
        synthetic.synthetic_video(0, **wrong)
    with pytest.raises(ValueError, match="32 x 32"):
        synthetic.synthetic_video(0, size=(16, 64))


def test_written_as_a_davis_folder(tmp_path):
    options = dict(num_frames=3, size=(40, 64), num_objects=2)
    names = synthetic.write_davis(tmp_path, [3, 12], resolution="240p", **options)
    assert names == ["synthetic-0003", "synthetic-0012"]
    listed = davis.evaluation_videos(tmp_path, 2017, "val", "240p")
    assert videos.check_videos(listed) == {name: (1, 2) for name in names}

    frames, labels = synthetic.synthetic_video(12, **options)
    for i in range(3):
        with Image.open(listed[1].frames[i]) as image:
            assert image.format == "JPEG"
            errors = np.abs(np.array(image).astype(int) - frames).mean(axis=(1, 2, 3))
            assert errors[i] < 8 and errors.argmin() == i
        with Image.open(listed[1].truth[i]) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.array(image), labels[i])


def test_writing_again_replaces_synthetic_data_only(tmp_path):
    options = dict(size=(32, 32), num_objects=1)
    synthetic.write_davis(tmp_path, [1, 2], num_frames=3, **options)
    synthetic.write_davis(tmp_path, [1], num_frames=2, **options)
    (video,) = davis.evaluation_videos(tmp_path)
    assert (video.name, len(video.frames), len(video.truth)) == ("synthetic-0001", 2, 2)
    folder = tmp_path / "JPEGImages" / "480p"
    assert sorted(p.name for p in folder.iterdir()) == ["synthetic-0001", "synthetic-0002"]

    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("blackswan\n")
    with pytest.raises(FileExistsError, match=r"val\.txt: lists blackswan"):
        synthetic.write_davis(tmp_path, [1], num_frames=1, **options)


def test_equal_videos_are_left_alone(tmp_path):
    """Another process may be reading them; those of other seeds or sizes are replaced."""

    def write(size):
        synthetic.write_davis(tmp_path, [1], num_frames=2, size=size)
        return {path: path.stat().st_ino for path in tmp_path.rglob("*.[jp][pn]g")}

    first = write((40, 56))
    assert len(first) == 4 and write((40, 56)) == first
    changed = write((40, 48))
    assert all(changed[path] != inode for path, inode in first.items())
