"""The run: reads the configuration, checks everything, trains, evaluates, keeps what matters.

OUT/config.json            the run's configuration
OUT/metrics.jsonl          a line per logged step: step, loss, iou, learning_rate, ...
OUT/evaluations.jsonl      a line per evaluation: step, J&F, J, F
OUT/tensorboard/           the same, and pictures
OUT/pictures/              strips of reference, previous, prediction, truth
OUT/checkpoints/  OUT/best/    `training.checkpoints`
OUT/evaluation/            masks and tables of the last evaluation on the way

The same command goes on where the run stopped, and ends as if it had never stopped: clips, dropout
and rates depend on the step alone.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8
from ml_collections import ConfigDict

from cfbi_jax import evaluate
from cfbi_jax.compilation import use_compilation_cache
from cfbi_jax.data import loader
from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.data.image_files import write_file
from cfbi_jax.data.loader import ClipBatch, Clips
from cfbi_jax.data.sources import clip_source, contents
from cfbi_jax.inference import dataset
from cfbi_jax.inference.video import check_writable
from cfbi_jax.models.cfbi import build_model
from cfbi_jax.training import checkpoints, metric_writers, schedule
from cfbi_jax.training.checkpoints import Checkpoints
from cfbi_jax.training.diagnosis import NotFinite, explain
from cfbi_jax.training.reports import Reports, Scores, every, from_primary, memory
from cfbi_jax.training.step import (
    Batch,
    StepOptions,
    TrainState,
    create_state,
    make_train_step,
    pack_rows,
    replicate,
)
from cfbi_jax.weights.calibration import calibrated
from cfbi_jax.weights.checkpoint import Checkpoint, load_checkpoint, stored_image_format
from cfbi_jax.weights.initial import initial_checkpoint

LOGGER = logging.getLogger(__name__)

PROFILED_STEPS = 3
CALIBRATION_CLIPS = 16
AHEAD = 2  # batches that wait on the devices


class Stopped(Exception):
    """SIGTERM came; all is saved."""


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


# ------------------------------------------------------------------------------- before the run


def prepare(config: ConfigDict, workdir: Path) -> Training:
    """Reads and checks all inputs. Raises ValueError or OSError, with what to do, for bad ones."""
    _check_numbers(config)
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
    )
    clip_options = ClipOptions(**config.clips)
    model = build_model(config.model.to_dict())
    plain = _plain(config)
    begun = checkpoints.stored_config(workdir)
    if begun:
        _check_unchanged(begun["run"], plain, workdir)
    with _hold(workdir):  # before anything of a run that is at work there is touched
        pass

    use_compilation_cache(config.compilation_cache)
    if not config.sources:
        raise ValueError("config.sources is empty; expected a source of videos to train on")
    sources = [
        (clip_source(source, config.records, config.clips.max_objects, config.seed), source.weight)
        for source in config.sources.values()
    ]
    plain["videos"] = [contents(source) for source, _ in sources]
    if begun:
        _check_unchanged(begun["run"], plain, workdir)
    clips = Clips(sources, clip_options, config.seed)
    clips.check_objects()
    LOGGER.info(
        "%d videos to train on, %d clips an epoch, %d epochs",
        sum(len(source) for source, _ in sources),
        clips.epoch_length,
        -(-config.batch_size * config.num_train_steps // clips.epoch_length),
    )
    if begun:  # the weights come from the run's own checkpoint
        start = initial_checkpoint(model, "", config.seed)
        image_format = stored_image_format(begun["image_format"])
        start = dataclasses.replace(start, image_format=image_format)
    else:
        start = initial_checkpoint(model, config.init_from, config.seed)
        if config.calibrate and not (config.init_from and Path(config.init_from).is_dir()):
            start = calibrated(start, _pairs_of_frames(clips))
    evaluation = None
    if config.mode == "train_and_eval" and jax.process_index() == 0:
        evaluation = evaluate.prepare(_quick(config), workdir / "evaluation", start)
        _check_results(config, workdir, bool(begun))
    return Training(config, plain, workdir, clips, start, options, mesh, evaluation)


def _pairs_of_frames(clips: Clips) -> UInt8[np.ndarray, "n 2 crop crop 3"]:
    """Reference and previous frame of the first clips."""
    return np.stack([clips[index].frames[:2] for index in range(CALIBRATION_CLIPS)])


def _check_numbers(config: ConfigDict) -> None:
    for name in ("batch_size", "num_train_steps", "accumulate", "keep_checkpoints"):
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}; expected 1 or more")
    for name in ("checkpoint_every_steps", "eval_every_steps", "log_every_steps", "workers"):
        if config[name] < 0:
            raise ValueError(f"config.{name} is {config[name]}; expected 0 or more")
    if config.optimizer not in schedule.OPTIMIZERS:
        raise ValueError(
            f'config.optimizer is "{config.optimizer}"; expected one of {schedule.OPTIMIZERS}'
        )
    for name in ("sequential_start", "mining_end"):
        if not 0 <= config[name] <= 1:
            raise ValueError(f"config.{name} is {config[name]}; expected a share of all steps")


def _share(config: ConfigDict, name: str) -> int:
    return round(config[name] * config.num_train_steps)


def _quick(config: ConfigDict) -> ConfigDict:
    """The evaluation on the way: its results are replaced by those of the next one."""
    quick = config.copy_and_resolve_references()
    quick.overwrite, quick.overlays = True, False
    return quick


def _check_unchanged(begun: dict[str, Any], plain: dict[str, Any], workdir: Path) -> None:
    """Raises ValueError if the run in `workdir` was started with another configuration."""
    # Which videos there are is known later than the rest of `plain`.
    different = checkpoints.contradictions({name: begun.get(name) for name in plain}, plain)
    if different:
        listing = "\n  ".join(different)
        raise ValueError(
            f"{workdir}: the run there was started with another configuration:\n  {listing}\n"
            "go on with the same values, or choose another --workdir"
        )


def _check_results(config: ConfigDict, workdir: Path, begun: bool) -> None:
    """Raises ValueError where the final evaluation would meet results of something else."""
    results = sorted((workdir / "segmented").glob("*.json"))
    if results and not begun and not config.overwrite:
        raise ValueError(
            f"{results[0]}: results of another evaluation; choose another --workdir, or replace "
            "them with --config.overwrite=True"
        )


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


# ----------------------------------------------------------------------------------------- the run


def run(training: Training) -> None:
    """Trains from the newest checkpoint, or from the start, to the end; evaluates the best weights.

    Raises Stopped after SIGTERM, NotFinite for a loss or gradient that is no number,
    CheckpointError where a checkpoint cannot be written or none can be read, Refused where another
    run is at work in the folder.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hold(training.workdir))
        _train(training, stack)
    _evaluate_best(training)
    from_primary(0.0)  # the other processes wait


def _train(training: Training, stack: contextlib.ExitStack) -> None:
    config, workdir, mesh = training.config, training.workdir, training.mesh
    model, image_format = training.start.model, training.start.image_format
    primary = jax.process_index() == 0
    last_step = config.num_train_steps

    # ---- State: of the newest checkpoint, or new ----
    rate = schedule.learning_rate(
        config.learning_rate, last_step, config.warmup_steps, config.min_learning_rate
    )
    tx = schedule.optimizer(
        rate,
        config.weight_decay,
        config.momentum,
        config.max_gradient_norm,
        config.freeze_backbone,
        config.optimizer,
    )
    state = create_state(training.start.variables, tx, config.seed, config.ema_decay > 0)
    plain = training.plain
    store = Checkpoints(workdir, config.keep_checkpoints, model, image_format, plain, mesh)
    stack.callback(store.close)
    store.check_room(state)
    state = replicate(store.restore(state), mesh)
    first_step = int(state.step)
    if first_step:
        LOGGER.info("going on from step %d of %d", first_step, last_step)
    if primary:
        write_file(workdir / "config.json", json.dumps(plain, indent=1).encode())
        overview = parameter_overview.get_parameter_overview(state.params)
        write_file(workdir / "parameters.txt", overview.encode())
        count = parameter_overview.count_parameters(state.params)
        LOGGER.info("%s parameters: %s", f"{count:,.0f}", workdir / "parameters.txt")
    if first_step == last_step:
        LOGGER.info("all %d steps are done", last_step)

    # ---- Reports ----
    _, periodic_actions = metric_writers.import_clu()
    progress = periodic_actions.ReportProgress(num_train_steps=last_step, every_secs=60)
    reports = Reports(workdir, first_step) if primary else None
    if reports:
        stack.callback(reports.close)
    scores = Scores(config, workdir, training.start, training.evaluation, first_step)
    profile = stack.enter_context(_profiler(workdir, config.profile_at_step))

    # ---- Data: the position is the step ----
    stopping = stack.enter_context(_sigterm(store))
    stream = loader.batches(
        training.clips,
        config.batch_size,
        first_step,
        last_step,
        workers=config.workers,
        threads=config.threads,
        shard=(jax.process_index(), jax.process_count()),
    )
    batches = stack.enter_context(_on_devices(stack.enter_context(stream), training))
    train_step = make_train_step(model, image_format, tx, training.options, mesh)

    def stop(state: TrainState, step: int) -> None:
        _check_finite(training, state)
        store.save(state)
        store.wait()
        raise Stopped(f"SIGTERM: step {step} of {last_step} is saved; repeat the command")

    # ---- Steps ----
    if scores.due(first_step):  # the run was killed during this evaluation
        scores.evaluate(state, first_step)
    waited, steps, since = 0.0, 0, time.perf_counter()
    for step in range(first_step + 1, last_step + 1):
        asked = time.perf_counter()
        try:
            clip_batch, batch = next(batches)
        except Exception:
            if stopping(step - 1):  # the signal may have ended the workers, too
                stop(state, step - 1)
            raise
        waited += time.perf_counter() - asked
        steps += 1
        profile(step, state)
        state, metrics, prediction = train_step(state, batch)
        progress(step)
        if step == first_step + 1:
            jax.block_until_ready(metrics)
            LOGGER.info("first step, with compilation: %.0f s", time.perf_counter() - since)
            waited, steps, since = 0.0, 0, time.perf_counter()

        if every(step, config.log_every_steps) or step == last_step:
            logged = jax.device_get({k: v for k, v in metrics.items() if v.ndim == 0})
            _check_finite(training, state)
            if reports:
                logged |= {"learning_rate": rate(step - 1), "rows": batch.packing.row.size}
                if steps:  # the first step compiles
                    seconds = (time.perf_counter() - since) / steps
                    logged |= {"clips_per_second": config.batch_size / seconds}
                    logged |= {"data_wait": waited / steps}
                reports.log(step, logged | memory())
            waited, steps, since = 0.0, 0, time.perf_counter()
        if reports and every(step, config.picture_every_steps):
            reports.picture(step, clip_batch, prediction)
        if every(step, config.checkpoint_every_steps) or step == last_step or scores.due(step):
            _check_finite(training, state)
            store.save(state)
        if scores.due(step):
            store.wait()  # an evaluation takes long: what comes before it is safe
            scores.evaluate(state, step)
            waited, steps, since = 0.0, 0, time.perf_counter()
        if stopping(step) and step < last_step:
            stop(state, step)
    store.wait()


def _check_finite(training: Training, state: TrainState) -> None:
    if bool(state.halted):
        raise NotFinite(explain(training.start, training.clips, state, training.config.batch_size))


def _evaluate_best(training: Training) -> None:
    """Masks, tables and submission of the best weights, in the work directory itself."""
    if training.evaluation is None or jax.process_index():
        return
    best = training.workdir / "best"
    LOGGER.info("evaluation of %s", best)
    config, workdir = training.config, training.workdir
    evaluation = evaluate.with_weights(training.evaluation, load_checkpoint(best).variables)
    if not config.overwrite:
        try:
            dataset.check_made_by(evaluation.videos, workdir, evaluation.made_by)
        except ValueError as error:
            raise Refused(f"{error}\nthe weights are in {best}") from error
    overwrite, overlays = config.overwrite, config.overlays
    evaluate.run(
        dataclasses.replace(evaluation, workdir=workdir, overwrite=overwrite, overlays=overlays)
    )


# ------------------------------------------------------------------------------------------ parts


@contextlib.contextmanager
def _hold(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the folder. Raises Refused where one is at work in it."""
    if jax.process_index():
        yield
        return
    with open(workdir / "train.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise Refused(f"{workdir}: in use by another run ({file.read().strip()})") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _sigterm(store: Checkpoints) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether to save and stop."""
    if jax.process_count() > 1:  # JAX catches the signal, and all processes agree on a step
        yield store.reached_preemption
        return
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _on_devices(
    stream: Iterator[ClipBatch], training: Training
) -> Iterator[Iterator[tuple[ClipBatch, Batch]]]:
    """A thread moves batches to the devices ahead of their use."""
    ready: queue.Queue = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for clips in stream:
                if not put((clips, device_batch(clips, training.options, training.mesh))):
                    return
            put(StopIteration("the stream of clips ended"))
        except BaseException as error:  # raised where the batch is asked for
            put(error)

    def take() -> Iterator[tuple[ClipBatch, Batch]]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()


def device_batch(clips: ClipBatch, options: StepOptions, mesh: Mesh) -> Batch:
    """This host's clips as its part of the batch that is spread over the mesh."""
    several = jax.process_count() > 1
    parts = len(mesh.local_devices) * options.accumulate
    # Hosts cannot know how many rows the others need, and all need the same shapes.
    packing = pack_rows(clips["num_objects"], parts, options.max_objects, full=several)
    local = Batch(**clips, packing=packing)
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), local)


@contextlib.contextmanager
def _profiler(workdir: Path, first: int) -> Iterator[Callable[[int, TrainState], None]]:
    """Yields a function to call before every step: it writes a profile (XProf, Perfetto) of step
    `first` and the next ones. 0: none."""
    tracing = False

    def stop() -> None:
        nonlocal tracing
        jax.profiler.stop_trace()
        tracing = False
        LOGGER.info("wrote a profile to %s", workdir / "profile")

    def at(step: int, state: TrainState) -> None:
        nonlocal tracing
        if not tracing and step == first:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(workdir / "profile")
            tracing = True
        elif tracing and step == first + PROFILED_STEPS:
            jax.block_until_ready(state.step)
            stop()

    try:
        yield at
    finally:
        if tracing:
            stop()
