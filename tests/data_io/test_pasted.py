import numpy as np
import pytest
from small import GivenVideo

from cfbi_jax.data import pasted
from cfbi_jax.data.clips import ClipOptions, sample_clip
from cfbi_jax.files import BadFile

GREY = 50


class Drawn(GivenVideo):
    """A video of given labels; object i is of colour (100 + i, green, 0)."""

    def __init__(self, name, labels, green):
        labels = np.asarray(labels, np.uint8)
        ids = labels[..., None].astype(int)
        colour = np.concatenate([100 + ids, np.full_like(ids, green), 0 * ids], axis=-1)
        frames = np.where((ids == 0) | (ids == 255), GREY, colour).astype(np.uint8)
        super().__init__(name, frames, labels)


class Videos:
    def __init__(self, *videos):
        self.videos = videos

    def __len__(self):
        return len(self.videos)

    def video(self, index, rng):
        return self.videos[index]


def box(object_id, top, left, height=10, width=8, size=(60, 90)):
    label = np.zeros(size, np.uint8)
    label[top : top + height, left : left + width] = object_id
    return label


COW = Drawn("cow", [box(1, 20, 30)] * 4, green=10)
DOGS = Drawn("dogs", [box(2, 5, 4) | box(3, 5, 14), box(2, 6, 4), box(255, 6, 4)], green=200)


@pytest.mark.parametrize("behind", [False, True])
def test_pasted_where_the_matrix_says(behind):
    matrix = np.array([[1.0, 0, 22], [0, 1, 17]])  # the dogs at (22, 26) and (22, 36)
    video = pasted._PastedVideo(COW, DOGS, start=1, matrix=matrix, behind=behind)
    assert (video.name, len(video)) == ("cow+dogs", 4)

    label, frame = COW.mask(0).copy(), COW.frame(0).copy()
    region = slice(23, 33), slice(26, 34)
    hidden = (label[region] == 1) & behind
    label[region] = np.where(hidden, 1, 129)
    frame[region] = np.where(hidden[..., None], [101, 10, 0], [102, 200, 0])
    np.testing.assert_array_equal(video.mask(0), label)  # frame 1 of the dogs
    np.testing.assert_array_equal(video.frame(0), frame)
    # Then frame 2 of the dogs, nobody's pixels only, and turned round frames 1 and 0.
    np.testing.assert_array_equal(video.mask(1), COW.mask(1))
    np.testing.assert_array_equal(video.frame(1), COW.frame(1))
    np.testing.assert_array_equal(video.mask(2), video.mask(0))
    assert set(np.unique(video.mask(3))) == {0, 1, 129, 130}


def test_pictures_match_masks():
    """Whatever is drawn: pixels of an object have its colour, but for a blended rim."""
    colours = {1: [101, 10, 0], 129: [102, 200, 0], 130: [103, 200, 0]}
    sizes = []
    for seed in range(20):
        video = pasted._random_paste(COW, DOGS, np.random.default_rng(seed))
        for t in range(4):
            label, frame = video.mask(t), video.frame(t).astype(int)
            for object_id, colour in colours.items():
                inside = erode(label == object_id)
                assert (abs(frame[inside] - colour) <= 1).all()
            assert (frame[erode(label == 0)] == GREY).all()
        sizes.append(abs(np.linalg.det(video.matrix[:, :2])) ** 0.5)
    assert 0.6 <= min(sizes) < 0.75 and 0.95 < max(sizes) <= 1.1


def erode(inside):
    padded = np.pad(inside, 2, mode="edge")
    h, w = inside.shape
    return np.all([padded[i : i + h, j : j + w] for i in range(5) for j in range(5)], axis=0)


def test_place_and_mirror():
    one = Drawn("one", [box(1, 5, 4)], green=200)  # centre (7.5, 9.5)
    places, mirrored = [], []
    for seed in range(40):
        matrix = pasted._random_paste(COW, one, np.random.default_rng(seed)).matrix
        places.append(matrix @ [7.5, 9.5, 1])
        mirrored.append(matrix[0, 0] < 0)
        assert matrix[1, 1] > 0
    low, high = np.min(places, axis=0) / [90, 60], np.max(places, axis=0) / [90, 60]
    assert (low >= 0.1).all() and (low < 0.2).all() and (high <= 0.9).all() and (high > 0.8).all()
    assert 8 < sum(mirrored) < 32


def test_every_time_and_both_sides():
    """The object is at the drawn place in the frame that the pasted video starts with."""
    moving = Drawn("moving", [box(1, 5 + 6 * t, 4 + 9 * t) for t in range(8)], green=200)
    starts, behind = set(), 0
    for seed in range(60):
        made = pasted._random_paste(COW, moving, np.random.default_rng(seed))
        starts.add(made.start)
        behind += made.behind
        x, y = made.matrix @ [7.5 + 9 * made.start, 9.5 + 6 * made.start, 1] / [90, 60]
        assert 0.1 <= x <= 0.9 and 0.1 <= y <= 0.9
    assert starts == set(range(8)) and 15 < behind < 45


def test_sizes_are_those_of_the_video_that_it_goes_into():
    large = Drawn("large", [box(1, 10, 8, size=(120, 180))], green=200)
    for other, low, high in ((COW, 0.6, 1.1), (large, 0.3, 0.55)):
        scales = [
            pasted._random_paste(COW, other, np.random.default_rng(seed)).matrix[1, 1]
            for seed in range(60)
        ]
        assert low <= min(scales) < low + 0.1 and high - 0.1 < max(scales) <= high


def test_a_video_that_starts_without_its_object():
    late = Drawn("late", [box(1, 5, 4) * 0, box(1, 5, 4)], green=200)
    made = [pasted._random_paste(COW, late, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.isfinite(one.matrix).all() for one in made)
    assert sum((one.mask(1 - one.start) == 128).any() for one in made) > 10  # some are outside


def test_share_and_doubles():
    videos = Videos(COW, DOGS)
    for share, expected in ((0.0, 0), (1.0, 400), (0.5, 200)):
        source = pasted.PastedVideos(videos, share)
        assert len(source) == 2
        names = [source.video(0, np.random.default_rng(seed)).name for seed in range(400)]
        assert abs(sum("+" in name for name in names) - expected) <= 40 * (share == 0.5)
        if share == 1:  # a quarter on purpose, and half of the others by chance
            assert 200 < names.count("cow+cow") < 300
    for doubles, least, most in ((0.0, 160, 240), (0.6, 290, 350), (1.0, 400, 400)):
        source = pasted.PastedVideos(videos, 1.0, doubles)
        names = [source.video(0, np.random.default_rng(seed)).name for seed in range(400)]
        assert least <= names.count("cow+cow") <= most


def test_clips_of_several_objects_from_single_ones():
    source = pasted.PastedVideos(Videos(COW), 1.0)
    options = ClipOptions(
        crop_size=49, short_edge=60, min_object_pixels=4, min_reference_pixels=8, max_gap=1
    )
    counts = []
    for seed in range(30):
        one, same = (
            sample_clip(source.video(0, rng), rng, options)
            for rng in (np.random.default_rng(seed), np.random.default_rng(seed))
        )
        np.testing.assert_array_equal(one.frames, same.frames)
        counts.append(one.num_objects)
    assert counts.count(2) > 10


def test_errors():
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"paste = {share}; expected a share from 0 to 1"):
            pasted.PastedVideos(Videos(COW), share)
        with pytest.raises(ValueError, match=f"paste_doubles = {share}; expected a share"):
            pasted.PastedVideos(Videos(COW), 0.5, share)
    highest = Drawn("highest", [box(127, 5, 4)], green=0)
    made = pasted._PastedVideo(COW, highest, 0, np.eye(2, 3), behind=False)
    assert set(np.unique(made.mask(0))) == {0, 1, 254}
    high = Drawn("high", [box(128, 5, 4)], green=0)
    for video, other in ((COW, high), (high, COW)):
        made = pasted._PastedVideo(video, other, 0, np.eye(2, 3), behind=False)
        with pytest.raises(BadFile, match="high: object 128; expected ids up to 127"):
            made.mask(0)


def test_a_quarter_are_doubles():
    source = pasted.PastedVideos(Videos(COW, *[DOGS] * 19), 1.0)
    names = [source.video(0, np.random.default_rng(seed)).name for seed in range(400)]
    expected = 400 * (0.25 + 0.75 / 20)  # some by chance; the standard error is 9
    assert abs(names.count("cow+cow") - expected) < 40


def test_no_ids_but_those_of_the_two_videos():
    for seed in range(20):
        video = pasted._random_paste(COW, DOGS, np.random.default_rng(seed))
        for t in range(4):
            assert set(np.unique(video.mask(t))) <= {0, 1, 129, 130}


def test_a_frame_without_object_is_placed_by_its_centre():
    late = Drawn("late", [box(1, 5, 4) * 0, box(1, 5, 4)], green=200)
    made = [pasted._random_paste(COW, late, np.random.default_rng(seed)) for seed in range(40)]
    places = np.array([one.matrix @ [45, 30, 1] / [90, 60] for one in made if one.start == 0])
    assert len(places) > 10 and (places >= 0.1).all() and (places <= 0.9).all()


@pytest.mark.parametrize("behind", [False, True])
def test_nobodys_pixels_hide_nothing(behind):
    road = Drawn("road", [box(255, 0, 0, 30, 60)] * 2, green=0)
    made = pasted._PastedVideo(road, DOGS, 0, np.eye(2, 3), behind=behind)
    expected = np.where(box(1, 5, 4) > 0, 129, np.where(box(1, 5, 14) > 0, 130, road.mask(0)))
    np.testing.assert_array_equal(made.mask(0), expected)
    assert made.frame(0)[8, 6].tolist() == [102, 200, 0]


def test_time_turns_round_at_both_ends():
    made = pasted._PastedVideo(COW, DOGS, 1, np.eye(2, 3), behind=False)
    assert [made._time(t) for t in range(9)] == [1, 2, 1, 0, 1, 2, 1, 0, 1]
