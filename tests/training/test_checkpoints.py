"""What a checkpoint holds, which of them are kept, and what may change when a run goes on."""

import resource
import shutil
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from small import random_variables
from tiny_run import MODEL

from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    best_evaluation,
    contradictions,
    mend_best,
    save_best,
    stored_config,
)
from cfbi_jax.training.step import TrainState
from cfbi_jax.weights.checkpoint import load_checkpoint, save_checkpoint

NETWORK = CFBI(**MODEL)
SCORE = {"step": 7, "J&F": 0.5}


@cache
def variables():
    return random_variables(NETWORK, 0)


def state_of(seed, ema, step=7):
    """A state no two arrays of which are equal; nor are they in another one."""
    weights, average, momentum = (
        jax.tree.map(lambda x, i=i: x + np.float32(seed + i), variables()) for i in range(3)
    )
    momentum = momentum["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    like = optimizer.init(momentum)
    leaves = jax.tree.leaves(momentum)
    return TrainState(
        step=jnp.int32(step),
        params=weights["params"],
        frozen=weights["frozen"],
        optimizer=jax.tree.unflatten(jax.tree.structure(like), leaves),
        ema=average["params"] if ema else None,
        key=jax.random.key(seed),
        halted=jnp.array(False),
    )


def opened(tmp_path, keep=3):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return Checkpoints(tmp_path, keep, NETWORK, IMAGENET_FORMAT, {"seed": 3}, mesh)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("ema", [False, True])
def test_everything_comes_back(tmp_path, ema):
    state, other = state_of(0, ema), state_of(10, ema, step=0)
    store = opened(tmp_path)
    assert store.restore(other) is other  # there is none yet
    store.save(state)
    store.wait()
    store.close()
    store = opened(tmp_path)
    assert_equal(store.restore(other), state)
    store.close()

    # Any checkpoint is one that can be evaluated, with the averaged weights where there are any.
    loaded = load_checkpoint(tmp_path / "checkpoints" / "7")
    assert loaded.model == NETWORK and loaded.image_format == IMAGENET_FORMAT
    assert_equal(loaded.variables["params"], state.ema if ema else state.params)
    assert_equal(loaded.variables["frozen"], state.frozen)


def test_the_last_few_are_kept(tmp_path):
    store = opened(tmp_path, keep=2)
    for step in (3, 6, 9, 9, 11):
        store.save(state_of(step, ema=False, step=step))
    store.wait()
    store.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["11", "9"]


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), (MemoryError, "9: RESOURCE_EXHAUSTED")),
        (PermissionError("no"), (PermissionError, "no")),
        (KeyError("params"), None),
    ],
)
def test_what_is_no_damage_sets_nothing_aside(tmp_path, monkeypatch, error, expected):
    store = opened(tmp_path)
    for step in (5, 9):
        store.save(state_of(step, ema=False, step=step))
    store.wait()
    restore = store._manager.restore

    def fails_once(step, **arguments):
        if step == 9:
            raise error
        return restore(step, **arguments)

    monkeypatch.setattr(store._manager, "restore", fails_once)
    like = state_of(0, ema=False, step=0)
    if expected:
        with pytest.raises(expected[0], match=expected[1]):
            store.restore(like)
    else:
        assert int(store.restore(like).step) == 5
    store.close()
    assert (tmp_path / "checkpoints" / "9").is_dir() == bool(expected)
    assert (tmp_path / "damaged" / "9").is_dir() != bool(expected)


def test_the_best_is_replaced_as_a_whole(tmp_path):
    first, second = state_of(0, ema=True), state_of(10, ema=True)
    save_best(tmp_path, NETWORK, first.evaluated, IMAGENET_FORMAT, SCORE)
    (tmp_path / "best.new").mkdir()  # of a run that was killed
    save_best(tmp_path, NETWORK, second.evaluated, IMAGENET_FORMAT, SCORE)
    assert_equal(load_checkpoint(tmp_path / "best").variables["params"], second.ema)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]

    # Killed between the two renamings.
    (tmp_path / "best").rename(tmp_path / "best.old")
    mend_best(tmp_path)
    assert_equal(load_checkpoint(tmp_path / "best").variables["params"], second.ema)
    mend_best(tmp_path)  # nothing to mend
    assert best_evaluation(tmp_path) == SCORE


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax' threads
def test_a_best_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """A limit on the size of files does what a full disk does."""
    first, second = ({"params": state_of(n, False).params} for n in (0, 1))
    first["frozen"] = second["frozen"] = variables()["frozen"]
    save_best(tmp_path, NETWORK, first, IMAGENET_FORMAT, SCORE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"could not be written \(.* MiB free\); .*best is"
        ):
            save_best(tmp_path, NETWORK, second, IMAGENET_FORMAT, SCORE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_equal(load_checkpoint(tmp_path / "best").variables, first)
    save_best(tmp_path, NETWORK, second, IMAGENET_FORMAT, SCORE)
    assert_equal(load_checkpoint(tmp_path / "best").variables, second)


def test_room_is_for_all_checkpoints_and_the_best(tmp_path, monkeypatch):
    state = state_of(0, ema=True)
    weights = sum(x.nbytes for x in jax.tree.leaves(state.params))
    evaluated = weights + sum(x.nbytes for x in jax.tree.leaves(state.frozen))
    key = jax.random.key_data(state.key).nbytes
    store = opened(tmp_path, keep=3)

    def needed(more, bests):
        return more * (evaluated + 2 * weights + 4 + key) + bests * evaluated

    def check(free):
        usage = SimpleNamespace(total=10**9, used=0, free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            store.check_room(state)

    check(needed(4, 2))
    with pytest.raises(CheckpointError, match=r"room for 4 more .*keep_checkpoints is 3\) and 2"):
        check(needed(4, 2) - 1)
    store.save(state)
    store.wait()
    save_best(tmp_path, NETWORK, state.evaluated, IMAGENET_FORMAT, SCORE)
    check(needed(3, 1))
    with pytest.raises(CheckpointError, match="room for 3 more .* and 1 times"):
        check(needed(3, 1) - 1)
    store.close()


def test_weights_alone_are_no_checkpoint_of_a_run(tmp_path):
    """As scripts/convert_weights.py writes them."""
    save_checkpoint(tmp_path / "checkpoints/5", NETWORK, variables(), IMAGENET_FORMAT)
    with pytest.raises(ValueError, match="checkpoints/5: weights alone, of no run; expected them"):
        stored_config(tmp_path)


def test_contradictions():
    stored = {
        "mode": "train_and_eval",
        "seed": 0,
        "workers": 2,
        "log_every_steps": 20,
        "model": {"windows": [1, 2], "head": "ensembler"},
        "clips": {"crop_size": 33},
        "sources": {"a": {"root": "x", "weight": 1}},
        "data": {"dataset": "davis", "root": "x"},
        "inference": {"flip": False, "memory_mib": None},
    }
    now = {
        "mode": "train_and_eval",
        "seed": 0,
        "workers": 0,
        "log_every_steps": 1,
        "model": {"windows": (1, 2), "head": "feelvos"},
        "clips": {"crop_size": 49},
        "sources": {"a": {"root": "y", "weight": 1}, "b": {"root": "z", "weight": 2}},
        "data": {"dataset": "synthetic", "root": "y"},
        "inference": {"flip": True, "memory_mib": 100},
    }
    assert contradictions(stored, now, evaluated=True) == [
        "clips.crop_size: 33 in the checkpoint, 49 now",
        "data.dataset: 'davis' in the checkpoint, 'synthetic' now",
        "inference.flip: False in the checkpoint, True now",
        "model.head: 'ensembler' in the checkpoint, 'feelvos' now",
        "sources.b.weight: None in the checkpoint, 2 now",
    ]
    assert contradictions(stored, stored, evaluated=True) == []
    fields = [line.split(":")[0] for line in contradictions(stored, now, evaluated=False)]
    assert fields == ["clips.crop_size", "model.head", "sources.b.weight"]
