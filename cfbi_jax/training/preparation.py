"""Before a run: reads the configuration and all inputs, and checks them."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from cfbi_jax import evaluate, locks, memory
from cfbi_jax.compilation import use_compilation_cache
from cfbi_jax.config import default_config, source
from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.data.loader import Clips
from cfbi_jax.data.sources import clip_source, contents
from cfbi_jax.data.videos import EvaluationVideo
from cfbi_jax.files import check_writable
from cfbi_jax.inference import dataset
from cfbi_jax.models.cfbi import CFBI, build_model
from cfbi_jax.training import checkpoints, metric_writers, schedule
from cfbi_jax.training.processes import from_primary
from cfbi_jax.training.step import StepOptions
from cfbi_jax.weights.calibration import calibrated
from cfbi_jax.weights.checkpoint import (
    Checkpoint,
    check_writable_by_orbax,
    stored_image_format,
)
from cfbi_jax.weights.initial import initial_checkpoint

LOGGER = logging.getLogger(__name__)

SHARED_SECONDS = 60  # until a file of the first process is there on all hosts
LOCK = "train.lock"  # in the work directory; held by the first process, and tells of it
CALIBRATION_CLIPS = 16
BATCHES_PER_WORKER = 4  # in shared memory at a time (measured), one more is being copied

AT_LEAST_0 = ("seed", "workers", "learning_rate", "min_learning_rate", "warmup_steps")
AT_LEAST_0 += ("weight_decay", "checkpoint_every_steps", "eval_every_steps", "log_every_steps")
AT_LEAST_0 += ("picture_every_steps", "profile_at_step")
AT_LEAST_1 = ("batch_size", "num_train_steps", "accumulate", "keep_checkpoints", "threads")
SHARES = ("sequential_start", "mining_end", "mask_errors_start")
# Fields of the configuration, what their numbers have to be, and how an error says it.
RANGES: Sequence[tuple[Sequence[str], Callable[[float], bool], str]] = (
    (AT_LEAST_0, lambda value: 0 <= value < math.inf, "0 or more"),
    (AT_LEAST_1, lambda value: value >= 1, "1 or more"),
    (SHARES, lambda value: 0 <= value <= 1, "a share of all steps"),
    (("seed",), lambda value: value < 2**32, "less than 2**32"),
    (("max_gradient_norm",), lambda value: value > 0, "more than 0 (inf: no limit)"),
    (("momentum",), lambda value: 0 <= value < 1, "0 or more, below 1"),
)


class Refused(OSError):
    """The run cannot begin in this folder."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that was read and checked before the work begins."""

    config: ConfigDict
    plain: dict[str, Any]  # the configuration as JSON, and which videos it names
    workdir: Path
    clips: Clips
    start: Checkpoint
    options: StepOptions
    mesh: Mesh
    evaluation: evaluate.Evaluation | None  # of the first process, unless mode is "train"


def prepare(config: ConfigDict, workdir: Path) -> Training:
    """Reads and checks all inputs. Raises ValueError or OSError, with what to do, for bad ones."""
    begun = checkpoints.stored_config(workdir)
    _check_config(config, bool(begun))
    check_writable_by_orbax(workdir)
    check_writable(workdir)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    parts = mesh.size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size is {config.batch_size}; expected a multiple of {parts} "
            f"({mesh.size} devices x config.accumulate = {config.accumulate})"
        )
    options = StepOptions(
        max_objects=config.clips.max_objects,
        sequential_step=_share(config, "sequential_start"),
        mining_step=_share(config, "mining_end"),
        accumulate=config.accumulate,
        remat=config.remat,
        ema_decay=config.ema_decay,
        freeze_backbone=config.freeze_backbone,
        mask_errors=config.mask_errors,
        mask_errors_step=_share(config, "mask_errors_start"),
    )
    clip_options = ClipOptions(**config.clips)
    model = build_model(config.model.to_dict())
    plain = _plain(config)
    if begun:
        _check_unchanged(begun["run"], plain, workdir)
    if config.mode == "train_and_eval" and jax.process_index() == 0:
        # The best weights' masks go to the work directory itself.
        evaluate.check_apart(evaluate.videos_of(config), workdir)
    if not begun:
        _check_results(config, workdir)
    with hold(workdir):  # before anything of a run that is at work there is touched
        pass
    check_shared(workdir)

    use_compilation_cache(config.compilation_cache)
    sources = used_sources(config)
    clips = training_clips(config, sources, clip_options)
    plain["videos"] = [contents(source) for source in clips.sources]
    if begun:
        _check_unchanged(begun["run"], plain, workdir)
    clips.check_objects([f"config.sources.{name}" for name in sources])
    _check_shared_memory(config)
    if config.warmup_steps > config.num_train_steps:
        LOGGER.warning(
            "the learning rate rises until step %d, and the run ends at step %d, below %g",
            config.warmup_steps,
            config.num_train_steps,
            config.learning_rate,
        )
    LOGGER.info(
        "%d videos to train on, %d clips an epoch, %d epochs",
        sum(len(source) for source in clips.sources),
        clips.epoch_length,
        -(-config.batch_size * config.num_train_steps // clips.epoch_length),
    )
    if begun:
        start = _going_on(config, model, begun, workdir)
    else:
        start = first_weights(config, model, clips)
    evaluation = None
    if config.mode == "train_and_eval" and jax.process_index() == 0:
        evaluation = evaluate.prepare(_quick(config), workdir / "evaluation", start)
        _check_truth(evaluation.videos)
        plain["evaluated"] = {v.name: dataset.identity(v) for v in evaluation.videos}
        if begun:
            _check_unchanged(begun["run"], plain, workdir)
    return Training(config, plain, workdir, clips, start, options, mesh, evaluation)


def used_sources(config: ConfigDict) -> dict[str, ConfigDict]:
    """`config.sources` without those of weight 0, each with all fields. Raises ValueError where
    there are none, and for one with a weight below 0 or other fields than `config.source`'s."""
    used = {}
    for name, given in config.sources.items():
        try:
            filled = source(**given)
        except (AttributeError, KeyError, TypeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"config.sources.{name}: {said}; expected cfbi_jax.config.source(...)"
            ) from error
        if filled.weight < 0:
            raise ValueError(f"config.sources.{name}.weight is {filled.weight}; expected 0 or more")
        if filled.weight:
            used[name] = filled
    if not used:
        raise ValueError(
            "config.sources is empty, or all weights are 0; expected videos to train on"
        )
    return used


def training_clips(
    config: ConfigDict, sources: Mapping[str, ConfigDict], options: ClipOptions
) -> Clips:
    """The clips of `used_sources`. Errors: those of `clip_source`."""
    drawn = config.clips.max_objects, config.seed
    videos = [
        (clip_source(name, fields, config.records, *drawn), fields.weight)
        for name, fields in sources.items()
    ]
    return Clips(videos, options, config.seed)


def _going_on(config: ConfigDict, model: CFBI, begun: dict[str, Any], workdir: Path) -> Checkpoint:
    """What a run that goes on starts from until its own checkpoint replaces the weights."""
    if begun["run"]["init_from"] != config.init_from:
        LOGGER.warning(
            "%s: the run there goes on with its own weights; it began with config.init_from %r",
            *(workdir, begun["run"]["init_from"]),
        )
    start = initial_checkpoint(model, "", config.seed)
    return dataclasses.replace(start, image_format=stored_image_format(begun["image_format"]))


def first_weights(config: ConfigDict, model: CFBI, clips: Clips) -> Checkpoint:
    """What a training starts from: `config.init_from`, the rest random and calibrated."""
    start = initial_checkpoint(model, config.init_from, config.seed)
    if config.calibrate and not (config.init_from and Path(config.init_from).is_dir()):
        with memory.explained("config.calibrate=False does without the frames for calibration"):
            start = calibrated(start, _pairs_of_frames(clips))
    if jax.process_count() > 1:  # hosts need not calibrate to the same bit
        start = dataclasses.replace(
            start, variables=from_primary(jax.tree.map(np.asarray, start.variables))
        )
    return start


def _pairs_of_frames(clips: Clips) -> UInt8[np.ndarray, "n 2 crop crop 3"]:
    """Reference and previous frame of the first clips."""
    return np.stack([clips[index].frames[:2] for index in range(CALIBRATION_CLIPS)])


def _check_config(config: ConfigDict, begun: bool) -> None:
    for field in ("checkpoint", "untrained"):
        if config[field]:
            raise ValueError(
                f"config.{field} is {config[field]!r}, which is for config.mode=eval, and "
                f"config.mode is {config.mode!r}; config.init_from is what a training starts from"
            )
    if config.init_from and not begun and not Path(config.init_from).exists():
        raise FileNotFoundError(f"{config.init_from}: no such file or folder (config.init_from)")
    if config.freeze_backbone and not config.init_from and not begun:
        raise ValueError(
            "config.freeze_backbone is True and config.init_from is empty: the backbone would stay "
            "random; expected weights of a backbone, or freeze_backbone=False"
        )
    for field in ("compute_dtype", "matching_dtype"):
        if config.model.get(field) == "float16":
            raise ValueError(
                f"config.model.{field} is float16, in which gradients vanish where the loss is not "
                "scaled, and it is not; expected bfloat16 or float32"
            )
    for names, allowed, expected in RANGES:
        for name in names:
            if not allowed(config[name]):
                raise ValueError(f"config.{name} is {config[name]}; expected {expected}")
    if config.learning_rate < config.min_learning_rate:
        raise ValueError(
            f"config.learning_rate is {config.learning_rate}, and config.min_learning_rate "
            f"{config.min_learning_rate}, which no rate is below; expected a smaller one"
        )
    if config.profile_at_step > config.num_train_steps:
        raise ValueError(
            f"config.profile_at_step is {config.profile_at_step}, and config.num_train_steps "
            f"{config.num_train_steps}; expected a step of the run, or 0"
        )
    if config.optimizer not in schedule.OPTIMIZERS:
        raise ValueError(
            f'config.optimizer is "{config.optimizer}"; expected one of {schedule.OPTIMIZERS}'
        )


def _check_truth(videos: Sequence[EvaluationVideo]) -> None:
    """Raises ValueError where some videos have true masks and others do not."""
    without = [video.name for video in videos if not video.truth]
    if len(without) == len(videos):
        LOGGER.warning("nothing to evaluate on has true masks: the newest weights will be the best")
    elif without:
        raise ValueError(
            f"{len(without)} of the {len(videos)} videos to evaluate on have no true masks but the "
            f"first: {', '.join(without[:5])}; expected those of all frames (or name the others: "
            "config.data.sequences)"
        )


def _check_shared_memory(config: ConfigDict) -> None:
    """Raises OSError where the batches of the worker processes do not fit into shared memory."""
    folder = Path("/dev/shm")
    if not config.workers or not folder.is_dir():
        return
    pixels = config.clips.crop_size**2 * (2 + config.clips.num_current)
    batch = config.batch_size // jax.process_count() * pixels * 4  # RGB and labels
    # Other processes of this run on this host have workers, too: as many as Slurm says, in the
    # form 8(x2),4.
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1") if jax.process_count() > 1 else "1"
    processes = max(int(part.split("(")[0]) for part in tasks.split(","))
    needed = (BATCHES_PER_WORKER * config.workers + 1) * batch * processes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} (shared memory) has {free >> 20} MiB left; {config.workers * processes} "
            f"worker processes need {-(-needed >> 20)} MiB for their batches: a larger one (for "
            "containers --shm-size), or --config.workers=0"
        )


def _share(config: ConfigDict, name: str) -> float:
    """The step at that share of all; may lie between two, as half of an odd number does."""
    return float(config[name] * config.num_train_steps)


def _quick(config: ConfigDict) -> ConfigDict:
    """The evaluation on the way: its results are replaced by those of the next one."""
    quick = config.copy_and_resolve_references()
    quick.overwrite, quick.overlays = True, False
    return quick


def _check_unchanged(begun: dict[str, Any], plain: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError if the run in `workdir` was started with another configuration. A field
    that is newer than the run has its default there."""
    defaults = default_config().to_dict()
    defaults["sources"] = {name: source().to_dict() for name in begun.get("sources") or {}}
    if "evaluated" not in begun:  # an older run, or one without evaluations so far
        defaults["evaluated"] = plain.get("evaluated", {})
    stored = checkpoints.flatten(defaults) | checkpoints.flatten(begun)
    # Which videos there are is known later than the rest of `plain`.
    stored = {field: value for field, value in stored.items() if field.split(".")[0] in plain}
    scores = workdir / metric_writers.EVALUATIONS_FILE
    evaluated = scores.is_file() and scores.stat().st_size > 0
    different = checkpoints.contradictions(stored, plain, evaluated)
    if different:
        listing = "\n  ".join(different)
        raise ValueError(
            f"{workdir}: the run there was started with another configuration:\n  {listing}\n"
            "go on with the same values, or choose another --workdir"
        )


def _check_results(config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError where a new run would meet weights or results of something else."""
    if config.overwrite:
        return
    best = [path for path in (workdir / "best", workdir / "best.old") if path.exists()]
    if best and not list((workdir / "checkpoints").glob("[0-9]*")):
        raise ValueError(
            f"{best[0]}: the best weights of another run; choose another --workdir, or delete them "
            "with --config.overwrite=True"
        )
    results = sorted((workdir / "segmented").glob("*.json"))
    results += sorted(workdir.glob("Annotations/*/*.png"))
    if results and config.mode == "train_and_eval":
        raise ValueError(
            f"{results[0]}: results of another evaluation; choose another --workdir, or replace "
            "them with --config.overwrite=True"
        )


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def check_shared(workdir: Path) -> None:
    """Raises ValueError where this host's folder is not the one that the first process wrote to."""
    lock = workdir / LOCK

    def seen() -> np.uint32:
        return np.uint32(zlib.crc32(lock.read_bytes() if lock.exists() else b""))

    expected = from_primary(seen())
    for _ in range(SHARED_SECONDS):  # network file systems show a new file late
        if seen() == expected:
            return
        list(workdir.glob("*"))  # some look anew then
        time.sleep(1)
    raise ValueError(
        f"{workdir} is not the first process' folder; expected one that all hosts share"
    )


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the folder. Raises Refused where one is at work in it."""
    if jax.process_index():
        yield
        return
    with open(workdir / LOCK, "a+") as file:
        if not locks.take(file):
            file.seek(0)
            raise Refused(f"{workdir}: in use by another run ({file.read().strip()})")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
