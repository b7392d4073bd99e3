"""Checkpoints of a run: everything that its next step depends on, and the best weights so far.

OUT/checkpoints/<step>/variables/   the weights to evaluate (the average, where one is kept)
                       config/      JSON: model, image format, the run's whole configuration
                       training/    step, optimiser state, random key (raw weights, with an average)
OUT/best/                           variables/ and config/ of the best evaluation so far, and
                                    evaluation.json: its step and J&F

Both kinds of folder are what `weights.checkpoint.load_checkpoint` reads. The position in the data
is the step. Folders appear complete or not at all.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cfbi_jax.files import write_file
from cfbi_jax.inference.options import BOUNDS
from cfbi_jax.models.cfbi import CFBI, model_config
from cfbi_jax.models.images import ImageFormat
from cfbi_jax.training.step import TrainState
from cfbi_jax.weights.checkpoint import first_line, save_checkpoint

LOGGER = logging.getLogger(__name__)

BEST_SCORES = "evaluation.json"


class CheckpointError(OSError):
    """A checkpoint could not be written (those before it are whole), or none can be read."""


class Checkpoints:
    """The last few checkpoints of the run in `workdir`, written in the background.

    Args:
      keep: how many are kept.
      model, image_format, config: stored with every checkpoint; `config` are JSON values.
      mesh: where restored arrays go, a copy on every device.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        model: CFBI,
        image_format: ImageFormat,
        config: Mapping[str, Any],
        mesh: Mesh,
    ):
        self.folder = workdir.absolute() / "checkpoints"
        self._keep = keep
        self._config = {
            "model": model_config(model),
            "image_format": dataclasses.asdict(image_format),
            "run": dict(config),
        }
        self._replicated = NamedSharding(mesh, P())
        self._manager = self._open()

    def _open(self):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import LatestN

        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(n=self._keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # of a save that was killed
            ),
            item_handlers={
                "variables": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState) -> None:
        """Starts to write `state`; returns as soon as its arrays are copied to the host.

        Raises CheckpointError if this or the previous one could not be written.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self._manager.all_steps():
            return
        variables, training = _items(state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(variables),
                    training=ocp.args.StandardSave(training),
                    config=ocp.args.JsonSave(self._config),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error

    def check_room(self, state: TrainState) -> None:
        """Raises CheckpointError where the disk has no room for what is still to come at most: the
        checkpoints kept and the next one, the best weights and better ones."""
        size, best = (
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
            for tree in (_items(state), state.evaluated)
        )
        more = max(self._keep + 1 - len(self._manager.all_steps()), 1)
        bests = 1 if (self.folder.parent / "best").exists() else 2
        needed = more * size + bests * best
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: {free >> 20} MiB free; expected {needed >> 20} MiB, room for "
                f"{more} more checkpoints of {size >> 20} MiB (config.keep_checkpoints is "
                f"{self._keep}) and {bests} times the best weights"
            )

    def reached_preemption(self, step: int) -> bool:
        """Whether a process of a distributed run got SIGTERM; the same in all of them."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Until all is written. Raises CheckpointError where it could not be."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        whole = max((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), default=None)
        left = "no checkpoint is whole" if whole is None else f"the one of step {whole} is whole"
        free = shutil.disk_usage(self.folder).free >> 20
        return CheckpointError(
            f"{self.folder}: a checkpoint could not be written ({first_line(error)}; {free} MiB "
            f"free); {left}"
        )

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint that can be read, in the form of `state`; `state` if there is none.

        Newer ones that cannot be read are reported and moved to OUT/damaged. Raises CheckpointError
        if none can be read, and leaves them where they are, as do PermissionError and MemoryError.
        """
        import orbax.checkpoint as ocp

        variables, training = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated),
            _items(state),
        )
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, Exception] = {}
        for step in steps:
            try:
                items = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        variables=ocp.args.StandardRestore(variables),
                        training=ocp.args.StandardRestore(training),
                    ),
                )
                restored = _state(items["variables"], items["training"], state)
            except (PermissionError, MemoryError):  # what they say, and no damage
                raise
            except Exception as error:  # Orbax and TensorStore raise all kinds
                if "RESOURCE_EXHAUSTED" in str(error):  # another process may still have the memory
                    raise MemoryError(f"{self.folder / str(step)}: {first_line(error)}") from error
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                self._set_aside(bad, error, step)
            return restored
        if steps:
            reason = first_line(damaged[steps[0]])
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {steps} can be read ({reason})"
            )
        return state

    def _set_aside(self, step: int, error: Exception, used: int) -> None:
        target = self.folder.parent / "damaged" / str(step)
        LOGGER.warning(
            "checkpoint %d is damaged (%s): moved to %s; using that of step %d",
            *(step, first_line(error), target, used),
        )
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:  # the others look when it is gone
            multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def stored_config(workdir: Path) -> dict[str, Any] | None:
    """`model`, `image_format` and `run` (the configuration) of the newest checkpoint that tells.

    Raises ValueError for one that is of no run.
    """
    folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
        try:
            stored = json.loads((folder / "config" / "metadata").read_text())
        except (OSError, ValueError):  # damaged: `restore` reports it
            continue
        if "run" not in stored:
            raise ValueError(
                f"{folder}: weights alone, of no run; expected them outside of checkpoints/, where "
                "a run keeps its own (config.init_from takes them)"
            )
        return stored
    return None


def _items(state: TrainState) -> tuple[dict, dict]:
    """What is stored of a state: (variables, training)."""
    training = {
        "step": state.step,
        "key": jax.random.key_data(state.key),
        "optimizer": dict(_named_leaves(state.optimizer)),
    }
    if state.ema is not None:
        training["params"] = state.params
    return state.evaluated, training


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with names that say where they are, as optimiser states nest tuples of all kinds."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _state(variables: Mapping, training: Mapping, like: TrainState) -> TrainState:
    leaves = [training["optimizer"][name] for name, _ in _named_leaves(like.optimizer)]
    averaged = like.ema is not None
    return TrainState(
        step=training["step"],
        params=training["params"] if averaged else variables["params"],
        frozen=variables["frozen"],
        optimizer=jax.tree.unflatten(jax.tree.structure(like.optimizer), leaves),
        ema=variables["params"] if averaged else None,
        key=jax.random.wrap_key_data(training["key"]),
        halted=jnp.zeros_like(like.halted),
    )


def save_best(
    workdir: Path,
    model: CFBI,
    variables: dict,
    image_format: ImageFormat,
    evaluation: Mapping[str, Any],
) -> None:
    """Replaces OUT/best by `variables`, whose scores are `evaluation`. The old one is there until
    the new one is.

    Raises CheckpointError where the new one could not be written.
    """
    best, new, old = (workdir / name for name in ("best", "best.new", "best.old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        save_checkpoint(new, model, variables, image_format)
        write_file(new / BEST_SCORES, json.dumps(dict(evaluation)).encode())
    except OSError as error:
        raise CheckpointError(f"{error}; {best} is as it was") from error
    if best.exists():
        shutil.rmtree(old, ignore_errors=True)
        best.rename(old)
    new.rename(best)
    shutil.rmtree(old, ignore_errors=True)


def best_evaluation(workdir: Path) -> dict[str, Any] | None:
    """What `save_best` was told of OUT/best; None where there is no such folder."""
    path = workdir / "best" / BEST_SCORES
    return json.loads(path.read_text()) if path.exists() else None


def mend_best(workdir: Path) -> None:
    """Finishes a replacement that was interrupted between its two renamings."""
    best, old = workdir / "best", workdir / "best.old"
    if old.exists() and not best.exists():
        old.rename(best)


def forget_best(workdir: Path) -> None:
    """Removes what another run left: a run has a checkpoint before it has best weights."""
    for name in ("best", "best.new", "best.old"):
        shutil.rmtree(workdir / name, ignore_errors=True)


# What may change when a run goes on: where things are, how they are computed, what is reported.
FREE_FIELDS = (
    "mode",
    "checkpoint",
    "untrained",
    "overwrite",
    "overlays",
    "compilation_cache",
    "accumulate",
    "remat",
    "workers",
    "threads",
    "records",
    "keep_checkpoints",
    "profile_at_step",
    "init_from",
    *(f"inference.{name}" for name in BOUNDS),
)
FREE_SUFFIXES = ("_every_steps", ".root")
# What is evaluated and how.
EVALUATION = ("data.", "inference.", "evaluated.")


def contradictions(stored: Mapping[str, Any], now: Mapping[str, Any], evaluated: bool) -> list[str]:
    """ "field: A there, B now" for every field of a run that must not change when it goes on.

    `evaluated`: the run has scores; the best of different kinds of them would mean nothing.
    """
    stored, now = flatten(stored), flatten(now)
    return [
        f"{field}: {stored.get(field)!r} in the checkpoint, {now.get(field)!r} now"
        for field in sorted(set(stored) | set(now))
        if stored.get(field) != now.get(field)
        and field not in FREE_FIELDS
        and not field.endswith(FREE_SUFFIXES)
        and (evaluated or not field.startswith(EVALUATION))
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"clips.crop_size": 465, ...}, as JSON would give the values back."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
