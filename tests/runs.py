"""A tiny run: its configuration, what the command says of it, and what it leaves."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_run import get_config

from cfbi_jax import main
from cfbi_jax.training import loop, preparation
from cfbi_jax.training.metric_writers import read_metrics


@functools.cache
def remembering(module, name):
    """That function of the module, which does not do the same thing twice in this process."""
    return functools.cache(getattr(module, name))


def tiny(weights):
    config = get_config()
    config.init_from = str(weights)
    return config


def error_of(config, out, monkeypatch) -> str:
    """What the command, in this process, says as it exits with status 1."""
    monkeypatch.setattr(main, "_log_to_screen", lambda: None)
    for flag, value in (("CONFIG", config), ("WORKDIR", str(out)), ("DISTRIBUTED", "")):
        monkeypatch.setattr(main, flag, SimpleNamespace(value=value))
    with pytest.raises(SystemExit) as stopped:
        main.main([])
    assert isinstance(stopped.value.code, str), "a text is printed, and the status is 1"
    assert stopped.value.code.startswith("error: ")
    return stopped.value.code


STEPS = 8
PARTS = ("variables", "training")
SPEED = ("clips_per_second", "data_wait", "host_memory_mib", "device_memory_mib")


def run(config, out):
    loop.run(preparation.prepare(config, out))


def losses(out):
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl")}


def numbers(out):
    """Every logged number that does not depend on the clock."""
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def checkpoint_steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def unfinished(out):
    return [p.name for p in (out / "checkpoints").iterdir() if not p.name.isdigit()]


def arrays(out, step=STEPS):
    """Everything in a checkpoint, by name."""
    with ocp.StandardCheckpointer() as reader:
        trees = {part: reader.restore(out / f"checkpoints/{step}/{part}") for part in PARTS}
    flat, _ = jax.tree_util.tree_flatten_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same_run(out, whole):
    assert numbers(out) == numbers(whole)
    found, expected = arrays(out), arrays(whole)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
