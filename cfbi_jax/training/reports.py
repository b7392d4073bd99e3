"""What a run tells: metrics, pictures, and evaluations on the way with the best weights."""

import logging
import os
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cfbi_jax import evaluate
from cfbi_jax.data.loader import ClipBatch
from cfbi_jax.training import checkpoints, metric_writers, pictures
from cfbi_jax.training.processes import from_primary
from cfbi_jax.training.step import FIRST_CURRENT, TrainState
from cfbi_jax.weights.checkpoint import Checkpoint

LOGGER = logging.getLogger(__name__)

# Share of the time in waiting for data from which on a warning comes, once, unless the device is
# this many steps behind: then it works while the host waits.
STARVING, BEHIND = 0.5, 2
NO_TRUTH = -1.0  # J&F where no truth is public: the newest weights count as the best


def every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def peak_memory() -> dict[str, float]:
    """Peak memory so far in MiB: of the first device, where it tells, and of this process."""
    found = {"host_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["device_memory_mib"] = stats["peak_bytes_in_use"] / 2**20
    return found


class Pace:
    """How fast the steps since the last `restart` were; warns once if the device starves."""

    def __init__(self, config: ConfigDict):
        self._clips, self._workers = config.batch_size, config.workers
        self._told = False
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()
        self._steps, self._waited = 0, 0.0

    def step(self, waited: float) -> None:
        """Counts a step for whose clips the host waited so many seconds."""
        self._steps += 1
        self._waited += waited

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since

    def metrics(self, behind: float) -> dict[str, float]:
        """Clips per second, and seconds per step of waiting; nothing where there was no step.

        behind: seconds that the device still took for the last of these steps.
        """
        if not self._steps:
            return {}
        seconds = self.seconds
        busy = behind > BEHIND * seconds / self._steps
        if self._waited > STARVING * seconds and not busy and not self._told:
            self._told = True
            LOGGER.warning(
                "%.0f %% of the time goes into waiting for clips; more config.workers than %d help "
                "where there are cores for them (here %d)",
                *(100 * self._waited / seconds, self._workers, os.cpu_count()),
            )
        return {
            "clips_per_second": self._clips * self._steps / seconds,
            "data_wait": self._waited / self._steps,
        }


class Reports:
    """What a person follows the run with."""

    def __init__(self, workdir: Path, first_step: int):
        self._writer = metric_writers.create_writer(workdir, first_step + 1)
        self._folder = workdir / "pictures"

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        metrics = {name: np.asarray(value).item() for name, value in metrics.items()}
        self._writer.write_scalars(step, metrics)
        speed = ""
        if "data_wait" in metrics:
            wait = 1000 * metrics["data_wait"]
            speed = f", {metrics['clips_per_second']:.2f} clips/s, {wait:.0f} ms waiting for data"
        LOGGER.info("step %d: loss %.4f, IoU %.3f%s", step, metrics["loss"], metrics["iou"], speed)

    def picture(self, step: int, clips: ClipBatch, prediction: jax.Array) -> None:
        """The first clip's current frames: reference, previous, prediction, truth."""
        predicted = np.asarray(prediction.addressable_shards[0].data)[0]
        frames, labels = clips["frames"][0], clips["labels"][0]
        strips = [
            pictures.strip(
                *(frames[0], labels[0]),
                *(frames[t - 1], labels[t - 1]),
                *(frames[t], predicted[t - FIRST_CURRENT], labels[t]),
            )
            for t in range(FIRST_CURRENT, len(frames))
        ]
        pictures.write_strips(self._folder / f"{step:07d}.png", strips)
        self._writer.write_images(step, {"clip": pictures.stack(strips)[None]})

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from there does not write these steps again."""
        self._writer.flush()

    def close(self) -> None:
        _close(self._writer)


def _close(writer: Any) -> None:
    """The run is over, and its weights are safe: why it ended is not to give way to an error."""
    try:
        writer.flush()
        writer.close()
    except OSError as error:
        LOGGER.error("the last metrics are not written: %s", error)


class Evaluations:
    """Evaluations on the way, by the first process: which are due, and the best so far."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        start: Checkpoint,
        evaluation: evaluate.Evaluation | None,
        first_step: int,
    ):
        """`evaluation`: what to do, in the first process; `start`: of the network evaluated."""
        self._config, self._workdir = config, workdir
        self._start, self._evaluation = start, evaluation
        done: set[int] = set()
        if evaluation is not None:
            checkpoints.mend_best(workdir)
            # Where the best weights are gone, those at hand are evaluated again.
            kept = first_step if checkpoints.best_evaluation(workdir) else first_step - 1
            names = metric_writers.EVALUATIONS_FILE, metric_writers.TENSORBOARD_EVALUATIONS
            self._writer = metric_writers.create_writer(workdir, kept + 1, *names)
            done = {line["step"] for line in metric_writers.read_metrics(workdir / names[0])}
        # The other processes need to know whether an evaluation was interrupted, and no more.
        self._first_is_done = bool(from_primary(first_step in done))
        self._first_step = first_step

    def due(self, step: int) -> bool:
        config = self._config
        wanted = config.mode == "train_and_eval"
        wanted &= every(step, config.eval_every_steps) or step == config.num_train_steps
        done = step == 0 or (step == self._first_step and self._first_is_done)
        return wanted and not done

    def evaluate(self, state: TrainState, step: int) -> None:
        """Scores the weights to evaluate, and keeps them in OUT/best if none were better."""
        if self._evaluation is not None:
            self._evaluate(jax.tree.map(np.asarray, state.evaluated), step)
        from_primary(0)  # the others wait

    def close(self) -> None:
        if self._evaluation is not None:
            _close(self._writer)

    def _evaluate(self, variables: dict, step: int) -> None:
        means = {}
        if all(video.truth for video in self._evaluation.videos):
            LOGGER.info("evaluation at step %d", step)
            evaluation = evaluate.use_weights(self._evaluation, variables)
            means = evaluate.summary(evaluate.run(evaluation, on_the_way=True))
        found = {"step": step, "J&F": means.get("J&F", NO_TRUTH)}
        best = checkpoints.best_evaluation(self._workdir)
        if best is None or found["J&F"] >= best["J&F"]:
            best, start = found, self._start
            checkpoints.save_best(self._workdir, start.model, variables, start.image_format, best)
        self._writer.write_scalars(step, means)
        self._writer.flush()
        if means:
            message = "step %d: J&F %.4f; best %.4f at step %d"
            LOGGER.info(message, step, found["J&F"], best["J&F"], best["step"])
