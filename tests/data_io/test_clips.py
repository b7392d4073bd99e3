import collections

import cv2
import numpy as np
import pytest

from cfbi_jax.data import augment, clips

SMALL = dict(crop_size=33, short_edge=33, min_scale=1.0, max_scale=1.0, min_object_pixels=20)


class FakeVideo:
    """Every pixel of frame t is (t, t, t); masks are given; counts what is read."""

    name = "fake"

    def __init__(self, masks):
        self.masks = np.asarray(masks, np.uint8)
        self.read = collections.Counter()

    def __len__(self):
        return len(self.masks)

    def frame(self, t):
        assert 0 <= t < len(self)
        self.read["frame", t] += 1
        return np.full((*self.masks.shape[1:], 3), t, np.uint8)

    def mask(self, t):
        assert 0 <= t < len(self)
        self.read["mask", t] += 1
        return self.masks[t]


def with_object(num_frames, rows=20, object_id=1):
    masks = np.zeros((num_frames, 33, 33), np.uint8)
    masks[:, :rows] = object_id
    return masks


def times_in(clip):
    """The frames of a clip of a FakeVideo."""
    assert (clip.frames == clip.frames[:, :1, :1, :1]).all()
    return clip.frames[:, 0, 0, 0].tolist()


def draw(video, count, **changes):
    options = clips.ClipOptions(**SMALL | changes)
    return [clips.sample_clip(video, np.random.default_rng(seed), options) for seed in range(count)]


def choose(video, count, **changes):
    options = clips.ClipOptions(**SMALL | changes)
    return [
        clips.choose_frames(len(video), video.mask, np.random.default_rng(seed), options)
        for seed in range(count)
    ]


# ---- Which frames ----


def test_current_frames_follow_in_both_directions():
    steps, forwards = collections.Counter(), 0
    for _, *following in choose(FakeVideo(with_object(200)), 400):
        if min(following) < 9 or max(following) > 190:
            continue  # may have turned round
        gaps = np.diff(following)
        assert len(gaps) == 3 and (np.sign(gaps) == np.sign(gaps[0])).all()
        forwards += gaps[0] > 0
        steps.update(np.abs(gaps).tolist())
    total = sum(steps.values()) // 3
    assert total > 300
    assert abs(forwards / total - 0.5) < 5 * 0.5 / np.sqrt(total)
    assert sorted(steps) == [1, 2, 3]
    assert min(steps.values()) > 0.8 * total  # a third each; the standard error is 0.05 of that


@pytest.mark.parametrize("num_current, max_gap", [(1, 1), (2, 5)])
def test_options_of_time(num_current, max_gap):
    gaps = set()
    video = FakeVideo(with_object(200))
    for _, *following in choose(video, 60, num_current=num_current, max_gap=max_gap):
        assert len(following) == 1 + num_current
        if 2 * max_gap < min(following) and max(following) < 199 - 2 * max_gap:
            gaps.update(np.abs(np.diff(following)).tolist())
    assert gaps == set(range(1, max_gap + 1))


def test_frames_past_the_end_are_reflected():
    """With gaps of 1 the order of frames is known but for the start and the direction."""
    walks = {tuple(times[1:]) for times in choose(FakeVideo(with_object(4)), 100, max_gap=1)}
    forwards = {(0, 1, 2, 3), (1, 2, 3, 2), (2, 3, 2, 1), (3, 2, 1, 0)}
    assert walks == forwards | {tuple(3 - t for t in walk) for walk in forwards}


def test_two_frames_are_enough():
    walks = {tuple(times_in(clip)[1:]) for clip in draw(FakeVideo(with_object(2)), 50, max_gap=1)}
    assert walks == {(0, 1, 0, 1), (1, 0, 1, 0)}


@pytest.mark.parametrize("num_frames", [0, 1])
def test_fewer_than_two_frames(num_frames):
    with pytest.raises(ValueError, match=f"fake: {num_frames} frames; expected two"):
        draw(FakeVideo(with_object(num_frames)), 1)


def test_reference_and_previous_frame_are_any_frame():
    drawn = [times[:2] for times in choose(FakeVideo(with_object(5)), 500)]
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.transpose(drawn)), 1)
    # 25 equally likely pairs, 20 each: chi-squared with 24 degrees of freedom, 99.99 %.
    assert ((counts - 20) ** 2 / 20).sum() < 61


# ---- The reference ----


def test_reference_has_enough_object_pixels():
    """Half of the frames have exactly 200 pixels, one fewer than needed."""
    masks = np.zeros((20, 33, 33), np.uint8)
    masks[::2, :8, :25] = 1
    masks[1::2, :8, :25] = 1
    masks[1::2, 8, 0] = 1
    video = FakeVideo(masks)
    # All 50 draws of a sample fail with probability 2**-50.
    references = [times[0] for times in choose(video, 60, reference_tries=50)]
    assert {t % 2 for t in references} == {1}
    # Five draws fail with probability 1 / 32, and then the last is kept; one fails half the time.
    for tries, share in ((5, 1 / 32), (1, 1 / 2)):
        drawn = choose(video, 300, reference_tries=tries)
        failed = np.mean([times[0] % 2 == 0 for times in drawn])
        assert abs(failed - share) < 5 * np.sqrt(share * (1 - share) / 300), tries


def test_nobodys_pixels_make_no_reference():
    masks = with_object(10, rows=30, object_id=255)
    masks[7] = with_object(1)[0]
    drawn = choose(FakeVideo(masks), 20, reference_tries=200)
    assert {times[0] for times in drawn} == {7}


# ---- Objects that the reference does not know ----


def half_known():
    """Object 2 is in the second half of the video only, object 1 everywhere."""
    masks = with_object(60)
    masks[30:, 21:] = 2
    return FakeVideo(masks)


def test_frames_are_drawn_again_until_the_reference_knows_all():
    def share(count, tries):
        drawn = choose(half_known(), count, consistency_tries=tries)
        return np.mean([times[0] < 30 and max(times[1:]) >= 30 for times in drawn])

    once = share(400, 0)
    # Reference in the first half, previous frame in the second: about a quarter.
    assert 0.15 < once < 0.4
    assert abs(share(400, 1) - once**2) < 0.05
    assert share(60, 40) == 0


def test_unknown_objects_become_background():
    seen = 0
    for clip in draw(half_known(), 100, consistency_tries=0):
        reference, *_ = times_in(clip)
        known = reference >= 30
        assert clip.num_objects == 1 + known
        for t, label in zip(times_in(clip), clip.labels, strict=True):
            expected = half_known().masks[t]
            if not known:
                seen += (expected == 2).any()
                expected = np.where(expected == 2, 0, expected)
            assert (label == expected).all() or (label == expected[:, ::-1]).all()
    assert seen > 10


def test_nobodys_pixels_are_no_unknown_object():
    masks = with_object(30)
    masks[1:, 25:] = 255  # frame 0 has none
    video = FakeVideo(masks)
    # Were 255 an object, a reference at frame 0 would be rejected nearly always.
    assert any(times[0] == 0 for times in choose(video, 200))
    video = FakeVideo(masks[:2])
    for clip in draw(video, 20):
        for t, label in zip(times_in(clip), clip.labels, strict=True):
            np.testing.assert_array_equal(label, masks[t])


# ---- Which objects, and their numbers ----


def test_small_objects_are_dropped_in_all_frames():
    masks = np.zeros((8, 33, 33), np.uint8)
    masks[:, :15] = 9
    masks[:4, 20, :20] = 4  # exactly min_object_pixels: too small
    masks[4:, 20, :21] = 4  # one more
    masks[:, 30:, :] = 200
    sizes = set()
    for clip in draw(FakeVideo(masks), 40):
        reference = times_in(clip)[0]
        new = {9: 1, 200: 2} if reference < 4 else {4: 1, 9: 2, 200: 3}
        sizes.add(len(new))
        assert clip.num_objects == len(new)
        for t, label in zip(times_in(clip), clip.labels, strict=True):
            expected = np.zeros((33, 33), np.uint8)
            for old, number in new.items():
                expected[masks[t] == old] = number
            assert (label == expected).all() or (label == expected[:, ::-1]).all()
    assert sizes == {2, 3}


def test_at_most_max_objects_a_random_subset():
    masks = np.zeros((3, 33, 33), np.uint8)
    ids = np.array([3, 5, 8, 11, 100, 101, 254])
    for row, object_id in enumerate(ids):
        masks[:, 4 * row : 4 * row + 2] = object_id
    masks[:, 32] = 255
    kept = collections.Counter()
    for clip in draw(FakeVideo(masks), 300, max_objects=3):
        assert clip.num_objects == 3
        rows = clip.labels[:, 0:28:4, 0]
        assert (rows == rows[0]).all()  # the same in all frames
        # Ids are dense and in the order of the old ones.
        assert rows[0][rows[0] > 0].tolist() == [1, 2, 3]
        assert (clip.labels[:, 32] == 255).all()
        kept.update(ids[rows[0] > 0].tolist())
    # Each with probability 3 / 7: 129 times, give or take 8.6.
    assert len(kept) == 7 and all(abs(n - 300 * 3 / 7) < 43 for n in kept.values())


def test_a_clip_without_objects_is_legal():
    masks = np.zeros((4, 33, 33), np.uint8)
    masks[:, 5] = 255
    clip = draw(FakeVideo(masks), 1)[0]
    assert clip.num_objects == 0
    np.testing.assert_array_equal(clip.labels, masks[[0] * 5])


# ---- The sample ----


def test_shapes_names_and_determinism():
    rng = np.random.default_rng(0)
    video = FakeVideo((rng.random((12, 50, 70)) < 0.5) * 7)
    options = clips.ClipOptions(crop_size=49, short_edge=50)
    one, same, other = (
        clips.sample_clip(video, np.random.default_rng(seed), options) for seed in (3, 3, 4)
    )
    assert (one.frames.shape, one.frames.dtype) == ((5, 49, 49, 3), np.uint8)
    assert (one.labels.shape, one.labels.dtype) == ((5, 49, 49), np.uint8)
    assert (one.name, one.num_objects) == ("fake", 1)
    np.testing.assert_array_equal(one.frames, same.frames)
    np.testing.assert_array_equal(one.labels, same.labels)
    assert (one.labels != other.labels).any()


def test_colours_change_in_all_frames_alike_and_nothing_else_does(monkeypatch):
    video, drawn = FakeVideo(with_object(12)), []
    choose = augment.choose_colours

    def seen(rng, strength):
        assert strength == 0.3
        drawn.append(choose(rng, strength))
        return drawn[-1]

    monkeypatch.setattr(augment, "choose_colours", seen)
    plain, coloured = draw(video, 9), draw(video, 9, colour_jitter=0.3)
    assert len(drawn) == 9  # one change for a clip
    for one, other, colours in zip(plain, coloured, drawn, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        for frame, changed in zip(one.frames, other.frames, strict=True):
            np.testing.assert_array_equal(changed, augment.change_colours(frame, colours))


def test_nothing_is_read_twice_and_few_masks_in_all():
    for seed in range(30):
        video = FakeVideo(with_object(250))
        clip = clips.sample_clip(video, np.random.default_rng(seed), clips.ClipOptions(**SMALL))
        assert set(video.read.values()) == {1}
        times = set(times_in(clip))
        assert {t for kind, t in video.read if kind == "frame"} == times
        # All frames show all there is: the first draw is kept.
        assert {t for kind, t in video.read if kind == "mask"} == times


def test_frames_labels_and_masks_stay_together():
    """Red encodes the object and green the frame: both can be read off the clip's pictures."""

    class Painted(FakeVideo):
        def frame(self, t):
            frame = np.zeros((*self.masks.shape[1:], 3), np.uint8)
            frame[..., 0] = 80 * self.masks[t]
            frame[..., 1] = 10 * t
            return frame

    masks = np.zeros((10, 60, 110), np.uint8)
    for t in range(10):
        masks[t, 5:30, 10 + 4 * t : 40 + 4 * t] = 1
        masks[t, 35:55, 80 - 4 * t : 105 - 4 * t] = 2
    options = clips.ClipOptions(crop_size=49, short_edge=60)
    kernel, checked, seen = np.ones((3, 3), np.uint8), 0, set()
    for seed in range(40):
        clip = clips.sample_clip(Painted(masks), np.random.default_rng(seed), options)
        painted = np.rint(clip.frames[..., 0] / 80).astype(np.uint8)
        areas = np.bincount(painted[0].ravel(), minlength=4)
        if (abs(areas[1:3] - 100) < 60).any():
            continue  # near the limit of 100: the pixels of the edge may go either way
        checked += 1
        new_ids = np.zeros(4, np.uint8)  # objects that were dropped are still in the pictures
        kept = [i for i in (1, 2) if areas[i] > 100]
        new_ids[kept] = np.arange(1, len(kept) + 1)
        for picture, old, label in zip(clip.frames, painted, clip.labels, strict=True):
            assert len(np.unique(picture[..., 1] // 5)) == 1
            # Bicubic edges are soft: only what is more than a pixel from them is certain.
            certain = cv2.erode(old, kernel) == cv2.dilate(old, kernel)
            certain &= cv2.erode(label, kernel) == cv2.dilate(label, kernel)
            assert certain.mean() > 0.7
            np.testing.assert_array_equal(new_ids[old][certain], label[certain])
        seen.update(np.unique(clip.labels).tolist())
    assert checked > 15 and seen == {0, 1, 2}


def test_frames_are_scaled_at_random(monkeypatch):
    edges, choose = [], augment.choose_view

    def choose_view(reference, rng, *, short_edge, **options):
        edges.append(short_edge)
        return choose(reference, rng, short_edge=short_edge, **options)

    monkeypatch.setattr(augment, "choose_view", choose_view)
    draw(FakeVideo(with_object(5)), 300, short_edge=40, min_scale=1.25, max_scale=2.0)
    assert set(edges) == set(range(50, 81))
    counts = np.histogram(edges, 3, (49.5, 80.5))[0]
    assert counts.min() > 70  # of 100 on average


def test_masks_of_different_sizes():
    class Growing(FakeVideo):
        def mask(self, t):
            return np.ones((33 + 33 * (t == 3), 33), np.uint8)

    video, options = Growing(with_object(12)), clips.ClipOptions(**SMALL, num_current=1)
    met = 0
    for seed, times in enumerate(choose(video, 40, num_current=1)):
        if 3 in times:
            met += times[0] != 3
            with pytest.raises(ValueError, match=r"frame \d+ has size .* and its mask \((33|66),"):
                clips.sample_clip(video, np.random.default_rng(seed), options)
        else:
            clips.sample_clip(video, np.random.default_rng(seed), options)
    assert met > 3


def test_small_objects_that_the_reference_lacks_are_drawn_again_too():
    """Frame 0 lacks an object of ten pixels, which is too small to be one of the clip's."""
    masks = with_object(30)
    masks[1:, 25, :10] = 2
    references = [times[0] for times in choose(FakeVideo(masks), 200)]
    assert 0 not in references


def test_frames_of_another_size_than_masks():
    class Larger(FakeVideo):
        def frame(self, t):
            return np.zeros((66, 66, 3), np.uint8)

    with pytest.raises(ValueError, match=r"fake: frame \d has size \(66, 66\) and its mask \(33,"):
        draw(Larger(with_object(5)), 1)


# ---- Options ----


def test_defaults_are_those_of_the_paper():
    assert vars(clips.ClipOptions()) == dict(
        num_current=3,
        max_gap=3,
        crop_size=465,
        short_edge=480,
        min_scale=1.0,
        max_scale=1.3,
        balanced_crop=True,
        colour_jitter=0.0,
        max_objects=5,
        crop_tries=5,
        min_object_pixels=100,
        min_reference_pixels=200,
        reference_tries=5,
        consistency_tries=5,
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(crop_size=464), "crop_size = 464; expected 16 n \\+ 1, such as 449 or 465"),
        (dict(crop_size=1), "such as 17$"),
        (dict(crop_size=481), "short_edge 480 x min_scale 1.0 = 480 pixels; .* crop_size = 481"),
        (dict(min_scale=0.9), "= 432 pixels"),
        (dict(min_scale=1.4), "min_scale <= max_scale"),
        (dict(min_scale=0.0), "0 < min_scale"),
        (dict(max_scale=float("inf")), "max_scale < inf"),
        (dict(min_scale=float("nan")), "0 < min_scale"),
        (dict(num_current=0), "num_current = 0; expected 1 or more"),
        (dict(max_gap=0), "max_gap = 0"),
        (dict(max_objects=0), "max_objects = 0"),
        (dict(max_objects=255), "at most 254"),
        (dict(colour_jitter=-0.1), "colour_jitter = -0.1; expected 0 or more, below 1"),
        (dict(colour_jitter=1.0), "colour_jitter = 1.0"),
        (dict(crop_tries=0), "crop_tries = 0"),
        (dict(reference_tries=0), "reference_tries = 0"),
        (dict(consistency_tries=-1), "consistency_tries = -1; expected 0 or more"),
        (dict(min_object_pixels=-1), "min_object_pixels = -1"),
        (dict(min_reference_pixels=-1), "min_reference_pixels = -1"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        clips.ClipOptions(**changes)


def test_a_frame_of_another_size_with_its_mask():
    class Growing(FakeVideo):
        def frame(self, t):
            return np.zeros((33 + 33 * (t == 3), 33, 3), np.uint8)

        def mask(self, t):
            return np.ones((33 + 33 * (t == 3), 33), np.uint8)

    refused = 0
    options = clips.ClipOptions(**SMALL, num_current=1)
    video = Growing(with_object(12))
    for seed, times in enumerate(choose(video, 40, num_current=1)):
        if 3 in times and set(times) != {3}:
            refused += 1
            with pytest.raises(ValueError, match=r"fake: frame \d+ has size \((33|66), 33\)"):
                clips.sample_clip(video, np.random.default_rng(seed), options)
    assert refused > 3
