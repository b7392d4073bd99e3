"""Training steps on several devices or in two processes, for `training/test_distributed.py`.

python step_worker.py OUT.npz DEVICES [DEVICES ...]        a mesh of each size, in this process
python step_worker.py OUT.npz PORT PROCESS_INDEX           one of two processes with a device each,
                                                           which starts from OUT.npz.checkpoint

Writes losses, gradient norms and final parameters of `STEPS` steps, and the collectives' names.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
from from_scripts import load_script
from jax.sharding import Mesh
from ml_collections import ConfigDict
from small import random_variables
from tiny import QUICK, random_clips, tiny_model, tiny_parts

from cfbi_jax.models.images import OFFICIAL_FORMAT
from cfbi_jax.training import preparation
from cfbi_jax.training.feeding import device_batch
from cfbi_jax.training.preparation import LOCK, check_shared, first_weights, hold
from cfbi_jax.training.processes import join
from cfbi_jax.training.schedule import optimizer
from cfbi_jax.training.step import StepOptions, create_state, make_train_step, replicate

# Half of the clips, and the other half, need other numbers of rows: 8 and 12.
OBJECTS = [0, 1, 0, 2, 1, 2, 3, 0]
STEPS = 2


def train(mesh, shard, start) -> dict[str, np.ndarray]:
    """`shard`: this process' clips of a batch; `start`: model -> variables."""
    options = StepOptions(max_objects=3, mining_step=4)
    tx = optimizer(lambda step: 0.05, 0.01, 0.9, max_gradient_norm=0.5)
    model = tiny_model(dropout=0.2)
    state = replicate(create_state(start(model), tx, seed=0), mesh)
    train_step = make_train_step(model, OFFICIAL_FORMAT, tx, options, mesh)
    program, losses, norms = None, [], []
    for i in range(STEPS):
        clips = random_clips(OBJECTS, num_frames=3, seed=i)
        batch = device_batch({k: v[shard] for k, v in clips.items()}, options, mesh)
        if program is None:
            program = train_step.lower(state, batch).compile(compiler_options=QUICK)
        state, metrics, _ = program(state, batch)
        losses.append(np.asarray(metrics["loss"]))
        norms.append(np.asarray(metrics["gradient_norm"]))
    exchanged = load_script("benchmark").train.collective_rows(program.as_text())
    flat = [np.asarray(x).reshape(-1) for x in jax.tree.leaves(state.params)]
    return {
        "rows": np.array(batch.packing.row.shape),
        "losses": np.array(losses),
        "norms": np.array(norms),
        "params": np.concatenate(flat),
        "collectives": np.array([row["name"] for row in exchanged]),
        "exchanged": np.array([row["mib"] * 2**20 for row in exchanged]),
    }


def random_start(model):
    return random_variables(model, seed=0)


def checkpoint_start(folder):
    config = ConfigDict({"init_from": folder, "seed": 0, "calibrate": True})
    return lambda model: first_weights(config, model, None).variables


def check_work_directories(own, shared):
    """Processes that write to different folders are told, in a second run, too."""
    for folder in (own, shared):
        folder.mkdir(exist_ok=True)
        with hold(folder):
            pass
    preparation.SHARED_SECONDS = 1
    check_shared(shared)
    (own / LOCK).touch()
    try:
        check_shared(own)
    except ValueError as error:
        assert jax.process_index() == 1 and "expected one that all hosts share" in str(error)
    else:
        assert jax.process_index() == 0


def main() -> None:
    out, *numbers = sys.argv[1:]
    results = {}
    if "TWO_PROCESSES" in os.environ:
        port, index = (int(number) for number in numbers)
        join(f"127.0.0.1:{port},{index},2")
        assert jax.process_count() == 2 and len(jax.local_devices()) == 1
        assert jax.config.read("jax_cuda_visible_devices") == "all"  # in a Slurm job, too
        mesh = Mesh(np.array(jax.devices()), ("data",))
        half = len(OBJECTS) // 2
        check_work_directories(Path(f"{out}.own"), Path(out).parent / "shared")
        start = checkpoint_start(f"{out}.checkpoint")
        results["2"] = train(mesh, slice(half * index, half * (index + 1)), start)
    else:
        for number in numbers:
            mesh = Mesh(np.array(jax.devices()[: int(number)]), ("data",))
            results[number] = train(mesh, slice(None), random_start)
    np.savez(out, **{f"{n}/{key}": x for n, result in results.items() for key, x in result.items()})


if __name__ == "__main__":
    with tiny_parts():
        main()
