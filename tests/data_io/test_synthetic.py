import numpy as np
import pytest
from PIL import Image

from cfbi_jax.data import davis, synthetic, videos


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
    texture = np.zeros((81, 81, 3), np.uint8)
    texture[36:45, 36:45] = 255  # a white spot in the middle
    still = np.zeros(4)
    blob = synthetic._Blob(
        *(1, texture, 15.0, still, still, still),
        start=np.array([60.0, 40.0]),
        speed=np.array([3.0, 1.0]),
        angle=0.5,
        spin=0.1,
        swing=0.1,
        swing_phase=0.0,
        swing_speed=0.1,
    )
    for time in (0, 1, 7):
        box, cover, drawn = synthetic._draw_blob(blob, time, (96, 160))
        corner = [box[0].start, box[1].start]
        expected = np.array([40.0 + time, 60.0 + 3 * time])
        outline_centre = np.argwhere(cover >= 128).mean(axis=0) + corner
        spot_centre = np.argwhere(drawn[..., 0] >= 128).mean(axis=0) + corner
        np.testing.assert_allclose(outline_centre, expected, atol=0.3)
        np.testing.assert_allclose(spot_centre, expected, atol=0.6)


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
            error = np.abs(np.array(image).astype(int) - frames[i])
            assert error.mean() < 5
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
