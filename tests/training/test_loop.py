"""A tiny run from its configuration to its last file: stopped, gone on with, on other devices."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from runs import STEPS, arrays, assert_same_run, checkpoint_steps, error_of, losses, run, unfinished
from small import random_variables
from tensorboard_events import decoded_events, scalars_and_images
from tiny_run import MODEL

import cfbi_jax
from cfbi_jax.files import BadFile
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training import loop, preparation
from cfbi_jax.training.checkpoints import Checkpoints
from cfbi_jax.training.metric_writers import read_metrics
from cfbi_jax.weights.checkpoint import digest, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick")


def test_half_precision(config, tmp_path):
    """bfloat16 has 8 bits. On the same weights, those of the first step, loss and gradient are near
    those in float32 (later on the runs part); weights and optimiser stay float32.

    A wider network than in the other runs, in which changes of 1e-6 of the weights move the norm of
    the bfloat16 gradient by a quarter.
    """
    wide = dict(decoder_dim=32, embedding_dim=16, matching_dim=16, ensembler_dim=64)
    model = CFBI(**{**MODEL, **wide})
    save_checkpoint(tmp_path / "start", model, random_variables(model, 0), IMAGENET_FORMAT)
    config.init_from = str(tmp_path / "start")
    config.model.update(wide)
    config.num_train_steps = config.checkpoint_every_steps = 2
    for dtype in ("float32", "bfloat16"):
        config.model.compute_dtype = dtype
        run(config, tmp_path / dtype)
    found, expected = (
        {
            name: np.array([line[name] for line in read_metrics(out / "metrics.jsonl")])
            for name in ("loss", "gradient_norm")
        }
        for out in (tmp_path / "bfloat16", tmp_path / "float32")
    )
    for name, values in expected.items():
        np.testing.assert_allclose(found[name][0], values[0], rtol=0.05)
        assert (found[name] != values).all() and np.isfinite(found[name]).all()
        assert len(found[name]) == 2
    found, expected = (
        {x.dtype for x in arrays(tmp_path / dtype, 2).values()} for dtype in ("bfloat16", "float32")
    )
    assert found == expected


def command(config, out, *arguments, code="", env=None):
    """Starts the command on the tiny configuration, with the same changes as in `config`."""
    flags = [*arguments, f"--config.init_from={config.init_from}", f"--config.mode={config.mode}"]
    program = ["-m", "cfbi_jax.main"]
    if code:
        start = "import runpy; runpy.run_module('cfbi_jax.main', run_name='__main__')"
        program = ["-c", f"{code}\n{start}"]
    return subprocess.Popen(
        [sys.executable, *program, "--config=tests/tiny_run.py", f"--workdir={out}", *flags]
        + [f"--config.data.{key}={config.data[key]}" for key in ("dataset", "root") if config.data],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_of(process):
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


# ------------------------------------------------------------------------------- the whole command


def test_command_trains_evaluates_and_keeps_the_best(config, whole, davis, tmp_path):
    out = tmp_path / "out"
    config.mode, config.data.root = "train_and_eval", str(davis)
    status, text = end_of(command(config, out))
    assert status == 0, text

    # Steps are those of the run in this process: nothing depends on the process or evaluations.
    assert_same_run(out, whole)
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({line["loss"] for line in lines}) == STEPS
    assert all(np.isfinite(line["loss"]) and line["data_wait"] >= 0 for line in lines[1:])
    # The rate that the step was made with: a warm-up of 2 steps, then the polynomial's 0.9.
    rates = [1e-5, 0.01, *(0.02 * (1 - done / 7) ** 0.9 for done in range(6))]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-5)
    assert checkpoint_steps(out) == [2, 4, 6, 8] and not unfinished(out)

    evaluations = read_metrics(out / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [4, 8]
    best = max(evaluations, key=lambda line: (line["J&F"], line["step"]))
    assert best["J&F"] == pytest.approx((best["J"] + best["F"]) / 2)
    kept = load_checkpoint(out / "best")
    stored = load_checkpoint(out / "checkpoints" / str(best["step"]))
    assert kept.model == CFBI(**MODEL) and kept.image_format == IMAGENET_FORMAT
    jax.tree.map(np.testing.assert_array_equal, kept.variables, stored.variables)

    # What is in OUT are the best weights' masks.
    name = "synthetic-0001"
    masks = sorted((out / "Annotations" / name).iterdir())
    assert [path.name for path in masks] == [f"{t:05d}.png" for t in range(5)]
    frames = [np.array(Image.open(p)) for p in sorted((davis / "JPEGImages/480p" / name).iterdir())]
    first = np.array(Image.open(davis / "Annotations/480p" / name / "00000.png"))
    segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(out / "best")
    for path, label in zip(masks, segmenter.segment(frames, {0: first}), strict=True):
        assert (np.array(Image.open(path)) != label).mean() < 0.02  # two decoders of JPEG
    table = (out / "global_results-val.csv").read_text().splitlines()
    assert float(table[1].split(",")[0]) == pytest.approx(best["J&F"], abs=1e-3)
    assert (out / "per-sequence_results-val.csv").exists() and (out / "submission.zip").exists()
    assert not (out / "evaluation" / "submission.zip").exists()
    record = json.loads((out / "segmented" / f"{name}.json").read_text())
    assert record["made_by"]["weights"] == digest(kept.variables)

    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["0000004.png", "0000008.png"]
    board = scalars_and_images(decoded_events(out / "tensorboard"))
    assert {step for step, tag in board if tag == "loss"} == set(range(1, STEPS + 1))
    assert {step for step, tag in board if tag == "clip"} == {4, 8}
    board = scalars_and_images(decoded_events(out / "tensorboard" / "evaluations"))
    assert {key: value.simple_value for key, value in board.items()} == {
        (line["step"], name.replace("&", "_")): np.float32(line[name])
        for line in evaluations
        for name in ("J&F", "J", "F")
    }
    overview = (out / "parameters.txt").read_text()
    assert "foreground_bias" in overview and "pixel_embedding/pointwise/kernel" in overview
    assert json.loads((out / "config.json").read_text())["clips"]["crop_size"] == 33


# ------------------------------------------------------------------------------------ going on


def signal_after_line(step, number):
    """Code that sends its own process a signal as soon as a step's line is in metrics.jsonl."""
    return f"""
import os
from cfbi_jax.training.metric_writers import JsonLinesWriter
write = JsonLinesWriter.write_scalars
def write_and_signal(self, step, scalars):
    write(self, step, scalars)
    if step == {step}:
        os.kill(os.getpid(), {number:d})
JsonLinesWriter.write_scalars = write_and_signal
"""


def kill_before_rename(end):
    """Code that kills its own process when it would rename anything to a path of this end."""
    return f"""
import os, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("{end}"):
        os.kill(os.getpid(), 9)
sys.addaudithook(hook)
"""


def test_a_run_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(config, whole, tmp_path):
    out = tmp_path / "out"
    status, text = end_of(command(config, out, code=signal_after_line(3, signal.SIGKILL)))
    assert status == -signal.SIGKILL, text
    assert list(losses(out)) == [1, 2, 3]

    # When a checkpoint is complete but for its name.
    steps = checkpoint_steps(out)  # that of step 2 may have been half written
    last = steps[-1] if steps else 0
    code = kill_before_rename(f"checkpoints/{last + 2}")
    status, text = end_of(command(config, out, code=code))
    assert status == -signal.SIGKILL, text
    assert ("going on from step" in text) == (last > 0)
    assert checkpoint_steps(out) == steps and unfinished(out)
    board = scalars_and_images(decoded_events(out / "tensorboard"))
    for step in range(1, last + 3):  # no gap before the checkpoint
        assert (step, "loss") in board

    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "lo')  # half a line
    status, text = end_of(command(config, out, code=signal_after_line(5, signal.SIGTERM)))
    assert status == 128 + signal.SIGTERM, text
    assert "step 5 of 8 is saved; repeat the command" in text
    assert checkpoint_steps(out) == [2, 4, 5] and list(losses(out)) == [1, 2, 3, 4, 5]

    run(config, out)
    assert_same_run(out, whole)
    assert not unfinished(out)


def test_nothing_depends_on_what_is_reported_and_kept(config, whole, tmp_path, monkeypatch):
    """Nor on worker processes, nor on threads."""
    config.log_every_steps, config.checkpoint_every_steps, config.keep_checkpoints = 3, 1, 2
    config.picture_every_steps, config.workers, config.threads = 0, 1, 1
    config.profile_at_step = 3
    run(config, tmp_path / "out")
    assert list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))
    expected = losses(whole)
    assert losses(tmp_path / "out") == {step: expected[step] for step in (3, 6, 8)}
    assert checkpoint_steps(tmp_path / "out") == [7, 8]
    found, expected = arrays(tmp_path / "out"), arrays(whole)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    assert not (tmp_path / "out" / "pictures").exists()


def test_the_host_waits_for_the_device_only_to_log_and_save(config, tmp_path, monkeypatch):
    events = ""

    def read(function):
        def noted(*arguments):
            nonlocal events
            events += "r"
            return function(*arguments)

        return noted

    class Metric:
        """What the step returns; NumPy's and JAX's ways to its value are noted, others fail."""

        def __init__(self, value):
            self.__array__ = read(lambda *_: np.asarray(value))

    make = loop.make_train_step

    def noting(*arguments):
        train_step = make(*arguments)

        def step(state, batch):
            nonlocal events
            events += "s"
            state, metrics, prediction = train_step(state, batch)
            return state, {name: Metric(value) for name, value in metrics.items()}, prediction

        return step

    monkeypatch.setattr(loop, "make_train_step", noting)
    monkeypatch.setattr(loop, "_check_finite", read(loop._check_finite))
    monkeypatch.setattr(jax, "block_until_ready", read(jax.block_until_ready))
    config.log_every_steps, config.checkpoint_every_steps, config.picture_every_steps = 3, 7, 0
    run(config, tmp_path / "out")
    after = [bool(reads) for reads in events.partition("s")[2].split("s")]
    # The first step is waited for, as it is compiled; 3, 6 and the last are logged, 7 is saved.
    assert after == [True, False, True, False, False, True, True, True]


def test_allowed_changes_go_on(config, whole, begun, caplog):
    config.log_every_steps, config.keep_checkpoints, config.threads = 2, 1, 3
    config.records, config.sources.drawn.root = "elsewhere", "elsewhere"
    config.init_from = ""
    run(config, begun)
    assert "goes on with its own weights; it began with config.init_from " in caplog.text
    expected = losses(whole)
    assert losses(begun) == {step: expected[step] for step in (1, 2, 3, 4, 5, 6, 8)}
    assert checkpoint_steps(begun) == [8]


def test_a_finished_run_does_nothing(config, whole, tmp_path, monkeypatch):
    """Not even with a full disk."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    usage = SimpleNamespace(total=10**9, used=10**9, free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run(config, out)
    assert_same_run(out, whole)


def test_a_signal_after_the_last_step_is_heard(config, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    wait = Checkpoints.wait

    def signalled(self):
        wait(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", signalled)
        with pytest.raises(loop.Stopped, match="all steps are saved; repeat") as stopped:
            run(config, out)
    assert stopped.value.signal == signal.SIGTERM
    run(config, out)
    assert_same_run(out, whole)


def test_another_configuration_is_refused(config, begun, monkeypatch):
    before = (begun / "metrics.jsonl").read_bytes(), (begun / "config.json").read_bytes()
    config.learning_rate, config.clips.crop_size, config.model.resnet_width = 0.01, 17, 8
    config.workers = 1  # may change
    text = error_of(config, begun, monkeypatch)
    assert text.splitlines()[1:-1] == [
        "  clips.crop_size: 33 in the checkpoint, 17 now",
        "  learning_rate: 0.02 in the checkpoint, 0.01 now",
        "  model.resnet_width: 4 in the checkpoint, 8 now",
    ]
    assert before == ((begun / "metrics.jsonl").read_bytes(), (begun / "config.json").read_bytes())


def test_a_run_with_scores_keeps_to_what_they_are_of(config, begun, monkeypatch):
    """Even if it goes on without evaluations for a while."""
    (begun / "evaluations.jsonl").write_text('{"step": 4, "J&F": 0.5}\n')
    config.data.split = "train"
    assert config.mode == "train"
    text = error_of(config, begun, monkeypatch)
    assert text.splitlines()[1:-1] == ["  data.split: 'val' in the checkpoint, 'train' now"]


def test_other_numbers_of_devices_and_processes_go_on(config, whole, begun, tmp_path):
    """In two processes, until the first one, which alone writes lines, gets a SIGTERM; all stop at
    the same step. Then in one, on two devices."""
    shutil.rmtree(begun / "checkpoints" / "6")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    code = signal_after_line(5, signal.SIGTERM)
    both = [command(config, begun, f"--distributed={place},{i},2", code=code) for i in range(2)]
    try:
        for status, text in map(end_of, both):
            assert status == 128 + signal.SIGTERM, text
            assert "going on from step 4 of 8" in text
    finally:
        for process in both:
            process.kill()
    stopped = checkpoint_steps(begun)[-1]
    assert 5 <= stopped < STEPS and list(losses(begun)) == list(range(1, stopped + 1))

    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    status, text = end_of(command(config, begun, env={"XLA_FLAGS": flags}))
    assert status == 0, text
    assert f"going on from step {stopped} of 8" in text
    found, expected = losses(begun), losses(whole)
    assert list(found) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(found[5], expected[5], rtol=1e-4)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=0.05)


def test_a_damaged_file_in_mid_run_ends_in_a_line(config, tmp_path, monkeypatch):
    def read(training):
        raise BadFile("00003.png: damaged picture")

    monkeypatch.setattr(loop, "run", read)
    assert error_of(config, tmp_path / "out", monkeypatch) == "error: 00003.png: damaged picture"


def test_a_data_error_loses_no_step(config, whole, tmp_path, monkeypatch):
    on_devices = loop.on_devices

    @contextlib.contextmanager
    def failing(*arguments):
        with on_devices(*arguments) as batches:

            def first_three():
                for _ in range(3):
                    yield next(batches)
                raise ValueError("00003.png: damaged picture")

            yield first_three()

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="damaged picture"):
        patch.setattr(loop, "on_devices", failing)
        run(config, tmp_path / "out")
    assert checkpoint_steps(tmp_path / "out") == [2, 3]
    run(config, tmp_path / "out")
    assert_same_run(tmp_path / "out", whole)


# ----------------------------------------------------------------------------- others, other data


def test_one_run_at_a_time(config, begun, davis, monkeypatch):
    config.mode, config.data.dataset = "train_and_eval", "synthetic"
    before = {p: p.stat().st_mtime_ns for p in begun.rglob("*") if p.is_file()}
    with preparation.hold(begun):
        text = error_of(config, begun, monkeypatch)
    assert f"{begun}: in use by another run (process {os.getpid()} on" in text
    after = {p: p.stat().st_mtime_ns for p in begun.rglob("*") if p.is_file()}
    before.pop(begun / "train.lock"), after.pop(begun / "train.lock")
    assert after == before  # not even the videos to evaluate are drawn again
    config.mode = "train"
    training = preparation.prepare(config, begun)
    with preparation.hold(begun), pytest.raises(preparation.Refused, match="in use by another run"):
        loop.run(training)  # the other one came between the checks and the first step


def test_a_folder_of_files_trains(from_davis, tmp_path):
    config, root = from_davis
    config.num_train_steps = STEPS  # the same program: nothing is compiled
    run(config, tmp_path / "out")
    assert list(losses(tmp_path / "out")) == list(range(1, STEPS + 1))
