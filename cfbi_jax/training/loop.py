"""The run: trains, evaluates, keeps what matters.

OUT/config.json            the run's configuration
OUT/metrics.jsonl          a line per logged step: step, loss, iou, learning_rate, ...
OUT/evaluations.jsonl      a line per evaluation: step and, where there is truth, J&F (DAVIS: J, F)
OUT/tensorboard/           the same, and pictures
OUT/pictures/              strips of reference, previous, prediction, truth
OUT/checkpoints/  OUT/best/    `training.checkpoints`
OUT/evaluation/            masks and tables of the last evaluation on the way

The same command goes on where the run stopped, and ends as if it had never stopped: clips, dropout
and rates depend on the step alone.
"""

import contextlib
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from clu import parameter_overview

from cfbi_jax import evaluate, memory
from cfbi_jax.data import loader
from cfbi_jax.files import write_file
from cfbi_jax.inference import dataset
from cfbi_jax.training import metric_writers, schedule
from cfbi_jax.training.checkpoints import Checkpoints, forget_best
from cfbi_jax.training.diagnosis import NotFinite, explain
from cfbi_jax.training.feeding import on_devices
from cfbi_jax.training.preparation import Refused, Training, hold
from cfbi_jax.training.processes import end_at_sigterm, from_primary
from cfbi_jax.training.reports import Evaluations, Pace, Reports, every, peak_memory
from cfbi_jax.training.step import TrainState, create_state, make_train_step, replicate
from cfbi_jax.weights.checkpoint import load_checkpoint

LOGGER = logging.getLogger(__name__)

PROFILED_STEPS = 3
# Steps after which a training that is no number any more ends, even where nothing is logged.
CHECK_EVERY = 100
LESS_MEMORY = (
    "less memory: config.remat=segment or all, config.accumulate (a device's clips in parts, one "
    "after the other), config.model.compute_dtype=bfloat16, a smaller config.batch_size, "
    "config.clips.crop_size or config.clips.max_objects (scripts/benchmark.py plan --train "
    "--objects N says what a step takes where all clips have N; the repeated command meets these "
    "clips again)"
)


class Stopped(Exception):
    """`signal` came, SIGTERM or SIGINT; all is saved."""

    signal = signal.SIGTERM


def run(training: Training) -> None:
    """Trains from the newest checkpoint, or from the start, to the end; evaluates the best weights.

    Raises Stopped after SIGTERM and the first Ctrl-C, NotFinite for a loss or gradient that is no
    number, CheckpointError where a checkpoint cannot be written or none can be read, Refused where
    another run is at work in the folder, MemoryError for what the device's memory does not hold.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(training.workdir))
        stack.enter_context(memory.explained(LESS_MEMORY))
        _train(training, stack)
    if jax.process_count() > 1:  # nobody asks any more whether it came
        end_at_sigterm()
    _evaluate_best(training)
    from_primary(0)  # the other processes wait


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
    state = replicate(store.restore(state), mesh)
    first_step = int(state.step)
    if first_step < last_step:
        store.check_room(state)
    if first_step:
        LOGGER.info("going on from step %d of %d", first_step, last_step)
    if primary:
        if not first_step:
            forget_best(workdir)
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
    evaluations = Evaluations(config, workdir, training.start, training.evaluation, first_step)
    stack.callback(evaluations.close)
    profile = stack.enter_context(_profiler(workdir, config.profile_at_step))

    # ---- Data: the position is the step ----
    stopping = stack.enter_context(_Signals(store))
    stream = loader.batches(
        training.clips,
        config.batch_size,
        first_step,
        last_step,
        workers=config.workers,
        threads=config.threads,
        shard=(jax.process_index(), jax.process_count()),
    )
    batches = stack.enter_context(on_devices(stack.enter_context(stream), training.options, mesh))
    train_step = make_train_step(model, image_format, tx, training.options, mesh)

    def stopped(step: int) -> Stopped:
        return Stopped(f"step {step} of {last_step} is saved; repeat the command")

    def save(state: TrainState) -> None:
        _check_finite(training, state)
        if reports:
            reports.flush()
        store.save(state)

    def stop(state: TrainState, step: int) -> None:
        save(state)
        store.wait()
        raise stopping.by_signal(stopped(step))

    # ---- Steps ----
    if evaluations.due(first_step):  # the run was stopped during this evaluation
        with stopping.at_once(stopped(first_step)):
            evaluations.evaluate(state, first_step)
    pace, sizes = Pace(config), set()
    for step in range(first_step + 1, last_step + 1):
        asked = time.perf_counter()
        try:
            clip_batch, batch = next(batches)
        except Exception:
            if stopping(step - 1):  # the signal may have ended workers that were just starting
                stop(state, step - 1)
            # The data can be mended, and the run goes on from here. Other processes have their part
            # of the batch: they wait in the step, and do not come to a save.
            if step > 1 and jax.process_count() == 1:
                save(state)
                store.wait()
            raise
        pace.step(waited=time.perf_counter() - asked)
        rows = batch.packing.row.size
        if sizes and rows not in sizes:  # perhaps minutes, perhaps thousands of steps in
            LOGGER.info("step %d: compiling for batches of %d rows", step, rows)
        sizes.add(rows)
        profile(step, state)
        state, metrics, prediction = train_step(state, batch)
        progress(step)
        if step == first_step + 1:
            jax.block_until_ready(metrics)
            LOGGER.info("first step, with compilation: %.0f s", pace.seconds)
            pace.restart()

        logs = every(step, config.log_every_steps) or step == last_step
        if logs:
            dispatched = time.perf_counter()
            logged = jax.device_get(metrics)
            behind = time.perf_counter() - dispatched
            _check_finite(training, state)
            if reports:
                logged |= {"learning_rate": rate(step - 1), "rows": rows}
                reports.log(step, logged | pace.metrics(behind) | peak_memory())
        elif every(step, CHECK_EVERY):
            _check_finite(training, state)
        if reports and every(step, config.picture_every_steps):
            reports.picture(step, clip_batch, prediction)
        if every(step, config.checkpoint_every_steps) or step == last_step or evaluations.due(step):
            save(state)
        if evaluations.due(step):
            store.wait()  # an evaluation takes long: what comes before it is safe
            with stopping.at_once(stopped(step)):
                evaluations.evaluate(state, step)
        if logs or evaluations.due(step):
            pace.restart()
        if stopping(step):
            stop(state, step)
    store.wait()


def _check_finite(training: Training, state: TrainState) -> None:
    if bool(state.halted):
        batch_size = training.config.batch_size
        raise NotFinite(
            explain(training.start, training.clips, training.options, state, batch_size)
        )


def _evaluate_best(training: Training) -> None:
    """Masks, tables and submission of the best weights, in the work directory itself."""
    if training.evaluation is None or jax.process_index():
        return
    best = training.workdir / "best"
    LOGGER.info("evaluation of %s", best)
    config, workdir = training.config, training.workdir
    evaluation = evaluate.use_weights(training.evaluation, load_checkpoint(best).variables)
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


class _Signals:
    """Whether SIGTERM or Ctrl-C came, so that the run is to save and stop; a second Ctrl-C does not
    wait for that.

    Among several processes JAX catches SIGTERM, and all of them agree on a step.
    """

    def __init__(self, store: Checkpoints):
        self._store = store
        self._alone = jax.process_count() == 1
        self._received = 0  # the signal's number
        self._saved: Stopped | None = None

    def __enter__(self) -> "_Signals":
        if self._alone:
            numbers = signal.SIGTERM, signal.SIGINT
            self._before = {n: signal.signal(n, self._receive) for n in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self._alone:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if self._received and kind is None:  # after the last step
            raise self.by_signal(Stopped("all steps are saved; repeat the command"))

    def __call__(self, step: int) -> bool:
        return bool(self._received) if self._alone else self._store.reached_preemption(step)

    @contextlib.contextmanager
    def at_once(self, stopped: Stopped) -> Iterator[None]:
        """While all is saved: the signal raises `stopped` wherever the process is."""
        self._saved = stopped
        try:
            if self._received:
                raise self.by_signal(stopped)
            yield
        finally:
            self._saved = None

    def by_signal(self, stopped: Stopped) -> Stopped:
        stopped.signal = self._received or signal.SIGTERM
        return stopped

    def _receive(self, number: int, _) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if self._saved is not None:
            raise self.by_signal(self._saved)


@contextlib.contextmanager
def _profiler(workdir: Path, first: int) -> Iterator[Callable[[int, TrainState], None]]:
    """Yields a function to call before every step: it writes a profile (XProf, Perfetto) of step
    `first` and the next ones. 0: none. (clu's periodic `Profile` left no files when tried.)"""
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
