"""A small network, two small videos, and the configuration that evaluates the one on the other."""

import pytest
from evaluating import FRAMES, SIZE
from small import small_network

import cfbi_jax
from cfbi_jax.config import default_config
from cfbi_jax.data import synthetic
from cfbi_jax.models.images import IMAGENET_FORMAT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ckpt"
    cfbi_jax.save_checkpoint(path, *small_network(), IMAGENET_FORMAT)
    return path


@pytest.fixture
def davis(tmp_path):
    """A DAVIS folder of two sequences, and its size on disk kept small."""
    root = tmp_path / "DAVIS"
    synthetic.write_davis(root, (0, 1), num_frames=FRAMES, size=SIZE)
    return root


@pytest.fixture
def config(checkpoint, davis):
    config = default_config()
    config.checkpoint = str(checkpoint)
    config.data.root = str(davis)
    return config
