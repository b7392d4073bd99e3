"""What a tiny run starts from."""

import shutil

import pytest
from ml_collections import ConfigDict
from runs import tiny
from small import random_variables
from tiny_run import MODEL

import cfbi_jax
from cfbi_jax.data import synthetic
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.weights.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "start"
    model = CFBI(**MODEL)
    save_checkpoint(path, model, random_variables(model, 0), IMAGENET_FORMAT)
    return path


@pytest.fixture
def config(weights):
    return tiny(weights)


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "DAVIS"
    for split, seed in (("train", 0), ("val", 1)):
        synthetic.write_davis(root, (seed,), split, num_frames=5, size=(40, 56), num_objects=1)
    return root


@pytest.fixture
def from_davis(config, davis, tmp_path):
    """A run on a folder of files of its own, and that folder."""
    root = tmp_path / "DAVIS"
    shutil.copytree(davis, root)
    config.sources = ConfigDict()
    config.sources.davis = cfbi_jax.config.source(dataset="davis", root=str(root))
    config.records = str(tmp_path / "records")
    return config, root
