import cv2
import numpy as np
import pytest
from small import GivenVideo

from cfbi_jax.data import clips, static_images

COLOURS = np.array([[40, 40, 40], [220, 40, 40], [40, 220, 40]], np.uint8)


class Still(GivenVideo):
    """Videos whose frames are given; the rng that comes with a request is kept."""

    def __init__(self, labels, frames=None):
        labels = np.asarray(labels, np.uint8)
        coloured = COLOURS[np.where(labels == 255, 0, labels)]
        super().__init__("still", coloured if frames is None else frames, labels)
        self.rngs = []


class OneVideo:
    def __init__(self, video):
        self.only = video

    def __len__(self):
        return 3

    def video(self, index, rng):
        self.only.rngs.append((index, rng))
        return self.only


def two_objects():
    label = np.zeros((1, 120, 160), np.uint8)
    label[0, 40:80, 30:65] = 1
    label[0, 45:85, 95:130] = 2
    return label


def moving(still, seed, num_frames=8):
    return static_images.StaticClips(OneVideo(still), num_frames).video(
        0, np.random.default_rng(seed)
    )


def test_what_it_is():
    still = Still(two_objects())
    source = static_images.StaticClips(OneVideo(still), 6)
    assert len(source) == 3
    rng = np.random.default_rng(0)
    video = source.video(2, rng)
    assert still.rngs == [(2, rng)]
    assert (video.name, len(video)) == ("still", 6)
    assert (video.frame(5).shape, video.frame(5).dtype) == ((120, 160, 3), np.uint8)
    assert (video.mask(5).shape, video.mask(5).dtype) == ((120, 160), np.uint8)


def test_determined_by_the_rng():
    one, same, other = (moving(Still(two_objects()), seed) for seed in (1, 1, 2))
    for t in (5, 0):
        np.testing.assert_array_equal(one.frame(t), same.frame(t))
        np.testing.assert_array_equal(one.mask(t), same.mask(t))
        np.testing.assert_array_equal(one.frame(t), one.frame(t))
        assert (one.mask(t) != other.mask(t)).any()


def test_masks_match_pictures():
    """Colours tell the objects apart; no object is anywhere but where its mask is."""
    seen = set()
    for seed in range(12):
        video = moving(Still(two_objects()), seed)
        for t in range(0, 8, 2):
            frame, mask = video.frame(t).astype(int), video.mask(t)
            nearest = np.abs(frame[:, :, None] - COLOURS.astype(int)).sum(-1).argmin(-1)
            # Blends on the edges of one object over the other can be nearest to the background.
            assert (nearest != mask).mean() < 0.004, (seed, t)
            seen.update(np.unique(mask).tolist())
    assert seen == {0, 1, 2}


def test_smooth_motion_of_its_own():
    """Objects and background move, differently, a little from frame to frame."""
    label = two_objects()
    frames = COLOURS[label].copy()
    # A blue dot far from the objects shows the background's motion.
    frames[0, 105:111, 75:81] = (0, 0, 255)
    still = Still(label, frames)
    for seed in range(8):
        video = moving(still, seed)
        centres = np.full((8, 3, 2), np.nan)
        for t in range(8):
            mask, frame = video.mask(t), video.frame(t).astype(int)
            blue = frame[..., 2] - frame[..., 0] > 100
            for i, where in enumerate((blue, mask == 1, mask == 2)):
                if where.sum() > 20:
                    centres[t, i] = np.argwhere(where).mean(axis=0)
        paths = np.diff(centres, axis=0)
        lengths = np.linalg.norm(paths, axis=-1)
        # Paths reach 18 pixels each way; objects that hide one another or leave the picture move
        # their visible centres a little more.
        assert np.nanmax(lengths) < 20
        assert np.nanmax(np.nansum(lengths[:, 1:], axis=0)) > 4
        apart = centres[:, 1] - centres[:, 0]
        if not np.isnan(apart).any():
            assert np.linalg.norm(apart - apart[0], axis=-1).max() > 2


class Given(np.random.Generator):
    """Draws what is given."""

    def __init__(self, points):
        super().__init__(np.random.PCG64(0))
        self.points = np.asarray(points, float)

    def uniform(self, low, high, shape):
        assert self.points.shape == shape
        return self.points


def test_paths_are_affine_motion_about_a_centre():
    """Where all points of the curve are the same, it is that point all the time."""
    centre = np.array([70.0, 20.0])
    rng = Given(3 * [[0.1, -0.2, 0.3, 0.4, 0.5]])
    path = static_images._random_path(rng, centre, 100, np.ones(5), 5)
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    linear = np.exp(0.4) * turn @ [[1, 0.5], [0, 1]]
    for matrix in path:
        np.testing.assert_allclose(matrix[:, :2], linear, rtol=1e-12)
        # The centre goes by shares of the short edge and nowhere else.
        np.testing.assert_allclose(matrix @ [*centre, 1], centre + [10, -20], rtol=1e-12)


def test_paths_begin_and_end_with_points_of_their_own():
    """The first and the last of the curve's three points; half of the second in the middle."""
    rng = Given([[x, 0, 0, 0, 0] for x in (1, 4, 2)])
    path = static_images._random_path(rng, np.zeros(2), 10, np.ones(5), 3)
    np.testing.assert_allclose(path[:, 0, 2], [10, (1 + 2 * 4 + 2) / 4 * 10, 20])


def test_objects_turn_and_change_size():
    angles, areas = [], []
    label = np.zeros((1, 120, 160), np.uint8)
    label[0, 55:65, 50:110] = 1  # a bar
    for seed in range(20):
        mask = moving(Still(label), seed).mask(0)
        rows, columns = np.nonzero(mask)
        areas.append(len(rows) / 600)
        values, vectors = np.linalg.eigh(np.cov(columns, rows))
        x, y = vectors[:, 1]
        angles.append(np.degrees(np.arctan(y / x)))
    assert min(angles) < -5 and max(angles) > 5 and np.abs(angles).max() < 30
    assert min(areas) < 0.9 and max(areas) > 1.1 and 0.6 < min(areas) < max(areas) < 1.5


def test_layers_are_drawn_as_if_each_were_as_large_as_the_frame():
    """Boxes spare work and no pixel, not even the half covered ones on an object's edges."""
    label = np.zeros((1, 60, 80), np.uint8)
    label[0, 20:40, 30:55] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_images, "_BACKGROUND_RANGE", np.zeros(5))
        patch.setattr(static_images, "_OBJECT_RANGE", np.array([0.3, 0.3, 0.3, 1.2, 0]))
        videos = [moving(Still(label), seed) for seed in range(12)]
    for video in videos:
        for t in (0, 3, 7):
            cover = cv2.warpAffine(np.float32(label[0]), video.layers[0].path[t], (80, 60))
            expected = 40 + cover * (220 - 40)  # red; OpenCV rounds places to 1/32 of a pixel
            assert np.abs(video.frame(t)[..., 0] - expected).max() < 13


def test_the_picture_is_kept():
    """Without motion nothing changes but the filling behind objects, which they hide."""
    rng = np.random.default_rng(0)
    label = two_objects()
    frames = rng.integers(0, 256, (1, 120, 160, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_images, "_OBJECT_RANGE", np.zeros(5))
        patch.setattr(static_images, "_BACKGROUND_RANGE", np.zeros(5))
        video = moving(Still(label, frames), 0)
    np.testing.assert_array_equal(video.mask(3), label[0])
    far = np.ones((120, 160), bool)
    far[34:91, 24:136] = False
    same = (label[0] > 0) | far
    np.testing.assert_array_equal(video.frame(3)[same], frames[0][same])


def test_what_is_behind_an_object_looks_like_what_is_around_it():
    label = two_objects()
    frames = COLOURS[label].copy()
    # Nobody's pixels round an object have its colour and yet are not spread under it; the band
    # is wider than the halo that is painted out.
    label[0, 28:92, 18:77][label[0, 28:92, 18:77] == 0] = 255
    frames[0][label[0] == 255] = COLOURS[1]
    with pytest.MonkeyPatch.context() as patch:
        # Objects leave their places, the background stays.
        patch.setattr(static_images, "_BACKGROUND_RANGE", np.zeros(5))
        video = moving(Still(label, frames), 4)
    uncovered = 0
    for t in range(8):
        mask, frame = video.mask(t), video.frame(t).astype(int)
        here = (label[0] > 0) & (label[0] != 255) & (mask == 0)
        here[cv2.dilate(mask, np.ones((3, 3), np.uint8)) > 0] = False  # blended edges
        uncovered += here.sum()
        assert np.abs(frame[here] - 40).max(initial=0) <= 10
    assert uncovered > 200


def test_no_halo_is_left_where_an_object_was():
    """The picture's object is three pixels larger than its mask, as edges often are."""
    label = two_objects()
    frames = COLOURS[[cv2.dilate(label[0], np.ones((7, 7), np.uint8))]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_images, "_BACKGROUND_RANGE", np.zeros(5))
        video = moving(Still(label, frames), 4)
    for t in (0, 7):
        background = cv2.dilate(video.mask(t), np.ones((3, 3), np.uint8)) == 0
        assert np.abs(video.frame(t)[background].astype(int) - 40).max() <= 10


def test_nobodys_pixels_stay_with_the_background():
    label = two_objects()
    label[0, :25] = 255
    shares = []
    for seed in range(6):
        mask = moving(Still(label), seed).mask(4)
        assert set(np.unique(mask)) == {0, 1, 2, 255}
        shares.append((mask == 255).mean())
        assert (mask[-1] != 255).all()
    assert 0.1 < min(shares) < max(shares) < 0.4
    assert len(set(shares)) > 1


def test_at_the_edges_nobodys_pixels_are_reflected():
    """As the picture is, whose colours at the edge are nobody's, too."""
    label = two_objects()
    label[0, :20], label[0, -20:], label[0, :, :20], label[0, :, -20:] = 255, 255, 255, 255
    for seed in range(6):
        video = moving(Still(label), seed)
        for t in (0, 7):
            mask = video.mask(t)
            edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert set(np.unique(edge)) <= {1, 2, 255}


def test_objects_hide_one_another_in_either_order():
    label = np.zeros((1, 100, 100), np.uint8)
    label[0, 30:70, 30:50] = 1
    label[0, 30:70, 50:70] = 2
    hidden = {1: 0, 2: 0}
    for seed in range(20):
        video = moving(Still(label), seed)
        back, front = (layer.object_id for layer in video.layers)
        assert {back, front} == {1, 2}
        hidden[back] += 1
    assert min(hidden.values()) >= 3


def test_objects_that_leave_the_picture():
    """A small object in a corner may be wholly outside: not an error, and not in the mask."""
    label = np.zeros((1, 100, 100), np.uint8)
    label[0, :5, :5] = 1
    present = []
    for seed in range(30):
        video = moving(Still(label), seed)
        for t in (0, 7):
            red = (video.frame(t).astype(int)[..., 0] > 130).sum()
            present.append((video.mask(t) == 1).sum())
            assert abs(red - present[-1]) <= 8
    assert min(present) == 0 and max(present) > 15


def test_only_frames_with_an_object_are_taken():
    labels = np.zeros((6, 120, 160), np.uint8)
    labels[0, :50] = 255
    labels[2], labels[4] = two_objects()[0], 2 * (two_objects()[0] == 1)
    ids = set()
    for seed in range(20):
        mask = moving(Still(labels), seed).mask(0)
        ids.add(tuple(np.unique(mask).tolist()))
    assert ids == {(0, 1, 2), (0, 2)}


def test_errors():
    with pytest.raises(ValueError, match="static_frames = 1; expected two"):
        static_images.StaticClips(OneVideo(Still(two_objects())), 1)


def test_a_video_without_objects_moves_all_the_same():
    video = moving(Still(np.zeros((2, 40, 40), np.uint8)), 0)
    assert not any(video.mask(t).any() for t in range(len(video)))
    assert video.frame(3).shape == (40, 40, 3)


def test_clips_are_made_of_it():
    options = clips.ClipOptions(crop_size=97, short_edge=120)
    rng = np.random.default_rng(0)
    source = static_images.StaticClips(OneVideo(Still(two_objects())))
    drawn = [clips.sample_clip(source.video(0, rng), rng, options) for _ in range(10)]
    assert {clip.num_objects for clip in drawn} <= {1, 2}
    assert any((clip.labels[1] != clip.labels[-1]).any() for clip in drawn)
