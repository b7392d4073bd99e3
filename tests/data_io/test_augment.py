import cv2
import numpy as np
import pytest

from cfbi_jax.data import augment, clips


def a_picture(height, width, seed=0):
    """Noise of high contrast, where an error of a part of a pixel shows."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def any_view(reference, seed, **changes):
    settings = dict(short_edge=60, side=49, tries=1, min_object_pixels=100) | changes
    return augment.choose_view(reference, np.random.default_rng(seed), **settings)


# ---- The view ----


@pytest.mark.parametrize(
    "shape, scaled", [((480, 854), (480, 854)), ((45, 30), (90, 60)), ((48, 86), (55, 99))]
)
def test_the_short_edge_is_scaled(shape, scaled):
    view = any_view(np.zeros(shape, np.uint8), 0, short_edge=min(scaled))
    assert view.size == scaled


def test_windows_and_mirroring_are_uniform():
    label = np.zeros((50, 54), np.uint8)
    views = [any_view(label, seed, short_edge=50) for seed in range(600)]
    assert {view.size for view in views} == {(50, 54)}
    tops = np.bincount([view.top for view in views])
    lefts = np.bincount([view.left for view in views])
    assert len(tops) == 2 and len(lefts) == 6  # all windows inside, up to the last one
    assert abs(tops - 300).max() < 5 * np.sqrt(150)
    assert abs(lefts - 100).max() < 5 * np.sqrt(600 * 5 / 36)
    assert abs(sum(view.mirrored for view in views) - 300) < 5 * np.sqrt(150)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    "shape, size, top, left, side",
    [
        ((48, 86), (61, 109), 0, 0, 49),
        ((48, 86), (61, 109), 12, 60, 49),  # the last window
        ((48, 86), (55, 99), 3, 21, 33),
        ((86, 48), (86, 48), 30, 7, 33),  # scale 1
        ((200, 131), (75, 49), 26, 0, 49),  # smaller
        ((20, 30), (77, 116), 9, 50, 65),  # much larger
    ],
)
def test_a_view_is_a_window_of_the_scaled_frame(shape, size, top, left, side, mirrored):
    frame = a_picture(*shape)
    scaled = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_CUBIC)
    expected = scaled[top : top + side, left : left + side][:, :: -1 if mirrored else 1]
    view = augment.View(size, top, left, side, mirrored)
    np.testing.assert_allclose(
        augment.view_frame(frame, view).astype(int), expected.astype(int), atol=1
    )
    label = frame[..., 0].copy()
    rows = np.floor((np.arange(size[0]) + 0.5) * shape[0] / size[0]).astype(int)
    columns = np.floor((np.arange(size[1]) + 0.5) * shape[1] / size[1]).astype(int)
    expected = label[np.ix_(rows, columns)][top : top + side, left : left + side]
    got = augment.view_label(label, view)
    # Halves may be rounded either way in the reference above.
    assert (got != expected[:, :: -1 if mirrored else 1]).mean() < 0.002


def test_random_views_at_full_size():
    """480p as in training: cut from the frame scaled as a whole, to within one grey level."""
    frame = a_picture(480, 854)
    for seed in range(4):
        short_edge = 480 + 48 * seed + seed
        view = any_view(frame[..., 0], seed, short_edge=short_edge, side=465)
        scaled = cv2.resize(frame, view.size[::-1], interpolation=cv2.INTER_CUBIC)
        window = scaled[view.top :, view.left :][:465, :465]
        window = window[:, ::-1] if view.mirrored else window
        difference = np.abs(augment.view_frame(frame, view).astype(int) - window)
        assert difference.max() <= 1


def test_frames_and_labels_have_no_offset():
    """The edge of a shape is, on average, at the same place in both (to 1/20 of a pixel)."""
    y, x = np.mgrid[:120, :160]
    label = ((y - 55) ** 2 + (x - 70) ** 2 < 45**2).astype(np.uint8)
    frame = np.repeat(200 * label[..., None], 3, axis=2)
    # Scales at which hardly any pixel's centre is at an edge between two pixels.
    for size in ((157, 209), (131, 175), (91, 121)):
        for mirrored in (False, True):
            view = augment.View(size, 0, 0, min(size), mirrored)
            weights = augment.view_frame(frame, view)[..., 0].astype(float)
            ids = augment.view_label(label, view)
            rows, columns = np.indices(ids.shape)
            for axis in (rows, columns):
                from_frame = (weights * axis).sum() / weights.sum()
                from_label = (ids * axis).sum() / ids.sum()
                assert abs(from_frame - from_label) < 0.05, (size, mirrored)


# ---- Balanced crop ----


def corner_object():
    """A frame of 100 x 200 with an object of 12 x 12 pixels in a corner."""
    label = np.zeros((100, 200), np.uint8)
    label[:12, :12] = 3
    label[50:] = 255  # never an object
    return label


def seen_probability(side, min_pixels):
    """That a uniform window shows more than `min_pixels` of the corner's 12 x 12, by counting."""
    tops, lefts = np.arange(100 - side + 1), np.arange(200 - side + 1)
    area = np.maximum(12 - tops, 0)[:, None] * np.maximum(12 - lefts, 0)[None]
    return (area > min_pixels).mean()


@pytest.mark.parametrize("tries", [1, 5, 20])
def test_balanced_crop_finds_objects_as_often_as_it_should(tries):
    label, draws = corner_object(), 400
    once = seen_probability(97, 100)
    assert 0.01 < once < 0.05
    expected = 1 - (1 - once) ** tries
    found = 0
    for seed in range(draws):
        view = any_view(label, seed, short_edge=100, side=97, tries=tries)
        found += (augment.view_label(label, view) == 3).sum() > 100
    assert abs(found / draws - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws)


def test_ordinary_crop_takes_the_first_window():
    """As an option of clips: the share of clips that show an object in a corner."""

    class Video:
        name = "corner"

        def __len__(self):
            return 2

        def frame(self, t):
            return np.zeros((100, 200, 3), np.uint8)

        def mask(self, t):
            return corner_object()

    shares = {}
    for balanced in (False, True):
        options = clips.ClipOptions(
            crop_size=97,
            short_edge=100,
            max_scale=1.0,
            balanced_crop=balanced,
            crop_tries=20,
            min_reference_pixels=0,
        )
        drawn = [
            clips.sample_clip(Video(), np.random.default_rng(seed), options) for seed in range(150)
        ]
        shares[balanced] = np.mean([clip.num_objects for clip in drawn])
        for clip in drawn:
            # Too small a part of the object is dropped, with either crop.
            assert set(np.unique(clip.labels)) - {255} == set(range(clip.num_objects + 1))
    once = seen_probability(97, 100)
    for balanced, share in ((False, once), (True, 1 - (1 - once) ** 20)):
        assert abs(shares[balanced] - share) < 4.5 * np.sqrt(share * (1 - share) / 150)
    assert shares[True] > 4 * shares[False]


# ---- Objects ----


def test_objects_above_counts_pixels_of_objects_only():
    label = np.zeros((30, 30), np.uint8)
    label[0, :10], label[1, :11], label[2:8] = 7, 254, 255
    assert augment.objects_above(label, 10).tolist() == [254]
    assert augment.objects_above(label, 9).tolist() == [7, 254]
    assert augment.objects_above(label, 11).tolist() == []
    assert augment.objects_above(np.zeros((3, 3), np.uint8), 0).tolist() == []


def test_choose_objects():
    label = np.repeat(np.array([0, 9, 4, 255, 30, 2], np.uint8), 20).reshape(12, 10)
    rng = np.random.default_rng(0)

    def choose(max_objects):
        return tuple(
            augment.choose_objects(label, rng, min_object_pixels=19, max_objects=max_objects)
        )

    assert choose(4) == (2, 4, 9, 30)
    pairs = {choose(2) for _ in range(200)}
    assert pairs == {(2, 4), (2, 9), (2, 30), (4, 9), (4, 30), (9, 30)}


def test_renumber():
    label = np.array([[[0, 2, 4], [9, 30, 255]]], np.uint8)
    new = augment.renumber(label, [4, 30])
    np.testing.assert_array_equal(new, [[[0, 0, 1], [0, 2, 255]]])
    assert new.dtype == np.uint8
    np.testing.assert_array_equal(augment.renumber(label, []), [[[0, 0, 0], [0, 0, 255]]])


# ---- Colours ----


def test_colours_are_changed_by_a_matrix():
    frame = a_picture(9, 11)
    colours = augment.choose_colours(np.random.default_rng(9), 0.4)
    exact = frame @ colours[:, :3].T + colours[:, 3]
    changed = augment.change_colours(frame, colours)
    assert changed.dtype == np.uint8 and exact.min() < 0 and exact.max() > 255  # both are cut off
    # OpenCV's factors have ten bits after the point: three of them, times 255, are off by 0.4.
    assert np.abs(changed - np.clip(exact, 0, 255)).max() <= 0.9
    same = augment.choose_colours(np.random.default_rng(3), 0.0)
    np.testing.assert_array_equal(augment.change_colours(frame, same), frame)


def test_colours_are_six_factors_in_their_range():
    """Read off the matrix: contrast from what is added, gain x brightness from what grey becomes,
    saturation from the share of a colour's own channel."""
    luma, found = np.array([0.299, 0.587, 0.114]), []
    for seed in range(2000):
        colours = augment.choose_colours(np.random.default_rng(seed), 0.3)
        matrix, contrast = colours[:, :3], 1 - colours[0, 3] / 127.5
        np.testing.assert_allclose(colours[:, 3], colours[0, 3])
        greys = matrix.sum(axis=1)
        saturation = (np.diag(matrix / greys[:, None]) - luma) / (1 - luma)
        np.testing.assert_allclose(saturation, saturation[0])
        found.append([contrast, saturation[0], *(greys / contrast)])
    low, high = np.min(found, axis=0), np.max(found, axis=0)
    np.testing.assert_allclose(low, [0.7, 0.7, *[0.7**2] * 3], atol=0.03)
    np.testing.assert_allclose(high, [1.3, 1.3, *[1.3**2] * 3], atol=0.05)
    gains = np.array(found)[:, 2:]
    # Brightness is shared by the channels, half of the logarithms' variance; gains are not.
    correlation = np.corrcoef(np.log(gains).T)[[0, 0, 1], [1, 2, 2]]
    np.testing.assert_allclose(correlation, 0.5, atol=0.08)
