"""A data set's results on disk: which video they are of."""

import dataclasses
import shutil

import numpy as np
from PIL import Image

from cfbi_jax.data import synthetic
from cfbi_jax.data.davis import evaluation_videos
from cfbi_jax.data.image_files import read_frame
from cfbi_jax.inference import dataset
from cfbi_jax.inference.video import overlay


def test_a_strip_is_of_the_whole_video(tmp_path):
    synthetic.write_davis(tmp_path, (0,), num_frames=9, size=(40, 56))
    (video,) = evaluation_videos(tmp_path)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "Annotations/480p", out / "Annotations")
    dataset._write_overlay(out, video)
    masks = out / "Annotations" / video.name
    pictures = [
        overlay(read_frame(video.frames[i]), np.array(Image.open(masks / f"{i:05d}.png")))
        for i in (0, 3, 5, 8)
    ]
    found = np.array(Image.open(out / f"overlays/{video.name}.png"))
    np.testing.assert_array_equal(found, np.concatenate(pictures, axis=1))


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
