"""A data set's results on disk: which video they are of."""

import dataclasses

from cfbi_jax.data import synthetic
from cfbi_jax.data.davis import evaluation_videos
from cfbi_jax.inference import dataset


def test_what_a_video_is_known_by(tmp_path):
    """Masks of another one are not taken for its own."""
    synthetic.write_davis(tmp_path, (0, 1), num_frames=3, size=(40, 56))
    video, other = evaluation_videos(tmp_path)
    known = dataset.identity(video)
    assert dataset.identity(video) == known != dataset.identity(other)
    for changes in (
        dict(save=video.save[1:]),
        dict(reading="binary"),
        dict(starts={1: 0}),
        dict(frames=video.frames[1:]),
        dict(given={1: video.given[0]}),
        dict(given={0: other.given[0]}),
    ):
        assert dataset.identity(dataclasses.replace(video, **changes)) != known
    with open(video.frames[1], "ab") as file:
        file.write(b"\0")
    assert dataset.identity(video) != known
