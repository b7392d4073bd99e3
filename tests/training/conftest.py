"""What a tiny run starts from."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from runs import remembering, run, tiny
from small import random_variables
from tiny_run import MODEL

import cfbi_jax
from cfbi_jax.data import synthetic
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training import loop, preparation, schedule
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


@pytest.fixture(scope="module")
def quick():
    """One tracing and one compilation, without optimisation, serve all runs of this process."""
    flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the commands that are started
        for module, name in (
            (schedule, "learning_rate"),
            (schedule, "optimizer"),
            (loop, "make_train_step"),
        ):
            patch.setattr(module, name, remembering(module, name))
        read = remembering(preparation, "initial_checkpoint")

        def initial_checkpoint(*arguments):
            start = read(*arguments)  # copied, as the first step gives its memory away
            return dataclasses.replace(start, variables=jax.tree.map(np.array, start.variables))

        patch.setattr(preparation, "initial_checkpoint", initial_checkpoint)
        yield


@pytest.fixture(scope="module")
def whole(quick, weights, tmp_path_factory):
    """A run that nothing disturbs. Read only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny(weights), out)
    return out


@pytest.fixture
def begun(whole, tmp_path):
    """The same, stopped after step 6, with checkpoints of 2, 4 and 6."""
    out = tmp_path / "begun"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "8")
    return out
