"""This project's checkpoints of a network: an Orbax folder that says what it holds.

CKPT/variables/   all arrays: `params` and `frozen`
CKPT/config/      JSON: the model's fields, and the image format it was trained on
"""

import dataclasses
import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from cfbi_jax.compilation import default_device, own_settings
from cfbi_jax.models.cfbi import CFBI, build_model, model_config, parameter_shapes
from cfbi_jax.models.images import ImageFormat

# How long threads of a writing that failed may go on with what they have begun.
REMOVAL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network and what its input looks like. `variables` is `{"params": ..., "frozen": ...}`."""

    model: CFBI
    variables: dict
    image_format: ImageFormat


def save_checkpoint(
    path: str | Path, model: CFBI, variables: Mapping, image_format: ImageFormat
) -> None:
    """Writes a checkpoint folder; Orbax renames it into place when it is complete.

    Raises FileExistsError where `path` exists, OSError where it cannot be written (a full disk,
    say), and ValueError where `variables` do not fit `model` and for a path that Orbax cannot write
    to.
    """
    import orbax.checkpoint as ocp  # takes a second to import

    path = Path(path).absolute()
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; a checkpoint is never overwritten")
    check_writable_by_orbax(path)
    check_shapes(variables, model, path)
    needed = sum(x.nbytes for x in jax.tree.leaves(variables))
    if free_bytes(path) < needed:
        raise not_written(path, f"it has {needed >> 20} MiB")
    config = {"model": model_config(model), "image_format": dataclasses.asdict(image_format)}
    options = _options()
    handlers = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(**options),
        variables=ocp.StandardCheckpointHandler(**options),
        config=ocp.JsonCheckpointHandler(**options),
    )
    items = ocp.args.Composite(
        variables=ocp.args.StandardSave(dict(variables)), config=ocp.args.JsonSave(config)
    )
    try:
        with ocp.Checkpointer(handlers, **options) as checkpointer:
            checkpointer.save(path, args=items)
    except Exception as error:  # Orbax and TensorStore raise all kinds
        # Orbax' name; a killed process leaves it, and the next one begins by removing it.
        _remove(path.with_name(f"{path.name}.orbax-checkpoint-tmp"))
        raise not_written(path, first_line(error)) from error


def _remove(folder: Path) -> None:
    """Removes a folder into which threads may still be writing for a moment."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)  # what comes meanwhile is gone with the next turn


def not_written(path: Path, why: str) -> OSError:
    """The error to raise for a file or folder that could not be written."""
    return OSError(f"{path}: could not be written ({why}; {free_bytes(path) >> 20} MiB free)")


def free_bytes(path: Path) -> int:
    """On the disk of a path, of which only the first folders need be there."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(there).free


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_writable_by_orbax(path: Path) -> None:
    """Raises ValueError for a path with `[`: Orbax 0.11 would look for its own parts with the path
    as a pattern, find none and leave a checkpoint that cannot be read; a backslash it takes for a
    slash."""
    for bad in "[\\":
        if bad in str(path.absolute()):
            raise ValueError(
                f"{path.absolute()}: checkpoints cannot be written below a folder with {bad} in "
                "its name; expected another folder"
            )


@own_settings()
def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint folder onto JAX's default device, else the first of this process.

    Raises FileNotFoundError where there is none, and ValueError for another kind of file or
    folder, or where the arrays are not those of the architecture that the checkpoint names or hold
    NaN or infinity. PermissionError and MemoryError are what they say, and no damage.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.is_file():
        raise ValueError(
            f"{path} is a file; expected a checkpoint folder. Official .pth files are turned into "
            f"one by: python scripts/convert_weights.py --input {path} --output CKPT_DIR"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {path}")
    if not (path / "config").is_dir() or not (path / "variables").is_dir():
        found = sorted(p.name for p in path.iterdir())[:8]
        inside = [*path.glob("best"), *path.glob("[0-9]*"), *path.glob("checkpoints/[0-9]*")]
        hint = f" (or {inside[0]}?)" if inside else ""
        raise ValueError(
            f"{path} is no checkpoint of this project: expected the folders config and variables, "
            f"found {found}{hint}"
        )
    with _damage_named(path), _no_garbage_collection():
        with _reader(ocp.JsonCheckpointHandler) as (reader, _):
            config = reader.restore(path / "config", args=ocp.args.JsonRestore())
        model = build_model(config["model"])
        image_format = stored_image_format(config["image_format"])
        variables = _read_variables(path / "variables", model)
        check_shapes(variables, model, path)
    check_finite(variables, path)
    return Checkpoint(model, jax.device_put(variables, default_device()), image_format)


def _read_variables(folder: Path, model: CFBI) -> dict:
    """NumPy arrays: with JAX's own, Orbax would take half as long again."""
    import orbax.checkpoint as ocp

    shapes = parameter_shapes(model)
    restore = ocp.args.PyTreeRestore(
        shapes,
        restore_args=jax.tree.map(
            lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), shapes
        ),
    )
    with _reader(ocp.PyTreeCheckpointHandler) as (reader, handler):
        try:
            return reader.restore(folder, args=restore)
        except (KeyError, ValueError):  # Orbax says that something differs; we say what
            check_shapes(handler.metadata(folder).tree, model, folder.parent)
            raise


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing and restoring make a million objects that stay: looking for garbage among them would
    take a fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Orbax and TensorStore raise all kinds of exceptions on damaged files; ours pass."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged checkpoint, its config is no JSON: {error}") from error
    except (ValueError, PermissionError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: damaged checkpoint: {first_line(error)}") from error


@contextmanager
def _reader(handler_type: type) -> Iterator[tuple]:
    """(an Orbax checkpointer of one item, its handler)."""
    import orbax.checkpoint as ocp

    handler = handler_type(**_options())
    with ocp.Checkpointer(handler, **_options()) as checkpointer:
        yield checkpointer, handler


def _options() -> dict:
    """Any process may read these alone, the first one write; Orbax would wait for the others."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return {}
    process = jax.process_index()
    return {
        "multiprocessing_options": ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"process{process}",
        )
    }


def digest(variables: Mapping) -> str:
    """Identifies the weights: a hash of every path and value."""
    state = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        state.update(jax.tree_util.keystr(path).encode())
        state.update(np.ascontiguousarray(leaf))
    return state.hexdigest()


def stored_image_format(config: Mapping) -> ImageFormat:
    """An image format as a checkpoint's JSON holds it."""
    return ImageFormat(config["channel_order"], tuple(config["mean"]), tuple(config["std"]))


def check_finite(variables: Mapping, path: Path) -> None:
    """Raises ValueError, naming `path` and the arrays, where one holds NaN or infinity."""
    bad = [
        f"{jax.tree_util.keystr(key, simple=True, separator='/')} ({wrong} of {array.size})"
        for key, array in jax.tree_util.tree_flatten_with_path(variables)[0]
        if (wrong := array.size - np.count_nonzero(np.isfinite(array)))
    ]
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} arrays hold NaN or infinity, the first: {', '.join(bad[:5])}; "
            "expected numbers"
        )


def check_shapes(variables, model: CFBI, path: Path) -> None:
    def shapes(tree):
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in flat}

    found, expected = shapes(variables), shapes(parameter_shapes(model))
    problems = [f"missing: {key} {expected[key]}" for key in sorted(set(expected) - set(found))]
    problems += [f"extra: {key} {found[key]}" for key in sorted(set(found) - set(expected))]
    problems += [
        f"wrong shape: {key} is {found[key]}, expected {expected[key]}"
        for key in sorted(set(found) & set(expected))
        if tuple(found[key]) != tuple(expected[key])
    ]
    if problems:
        listing = "\n  ".join(problems[:20])
        raise ValueError(
            f"{path}: the arrays are not those of its architecture ({model.backbone}); "
            f"{len(problems)} problems, the first:\n  {listing}"
        )
