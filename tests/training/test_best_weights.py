"""Evaluations of a tiny run on the way, and the weights that it keeps."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image
from runs import STEPS, assert_same_run, error_of, run

from cfbi_jax import evaluate
from cfbi_jax.training import loop, preparation
from cfbi_jax.training.metric_writers import read_metrics
from cfbi_jax.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def evaluations(config, davis, monkeypatch):
    """Evaluations that score what is put into the list that this returns, and segment nothing. A
    function in it is called instead; `None`, for the last evaluation of all, has no score."""
    config.mode, config.data.root = "train_and_eval", str(davis)
    results = []

    def next_result(evaluation, on_the_way=False):
        result = results.pop(0)
        return result() if callable(result) else result

    monkeypatch.setattr(evaluate, "run", next_result)
    monkeypatch.setattr(evaluate, "summary", lambda score: {"J&F": score} if score else {})
    return results


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_during_an_evaluation(config, whole, evaluations, tmp_path, number):
    """At once, as all is saved; the command goes on with it, and knows the scores before."""
    out = tmp_path / "out"

    before = signal.getsignal(number)

    def send():
        os.kill(os.getpid(), number)
        time.sleep(60)
        raise AssertionError("the signal was not heard")

    evaluations[:] = [0.9, send]
    with pytest.raises(loop.Stopped, match="step 8 of 8 is saved") as stopped:
        run(config, out)
    assert stopped.value.signal == number and signal.getsignal(number) == before
    evaluations[:] = [0.5, None]
    run(config, out)
    assert not evaluations
    lines = read_metrics(out / "evaluations.jsonl")
    assert [(line["step"], line["J&F"]) for line in lines] == [(4, 0.9), (8, 0.5)]
    best, stored = load_checkpoint(out / "best"), load_checkpoint(out / "checkpoints" / "4")
    jax.tree.map(np.testing.assert_array_equal, best.variables, stored.variables)
    assert_same_run(out, whole)


def test_where_the_best_weights_are_gone_the_next_ones_are_kept(config, evaluations, tmp_path):
    out = tmp_path / "out"

    def taken():
        (out / "best").rename(tmp_path / "taken")
        return 0.5

    evaluations[:] = [0.9, taken, None]
    run(config, out)
    assert not evaluations
    newest = load_checkpoint(out / "checkpoints" / str(STEPS)).variables
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(out / "best").variables, newest)

    (out / "best").rename(tmp_path / "taken, too")
    evaluations[:] = [0.5, None]
    run(config, out)
    assert not evaluations
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(out / "best").variables, newest)
    lines = read_metrics(out / "evaluations.jsonl")
    assert [(line["step"], line["J&F"]) for line in lines] == [(4, 0.9), (8, 0.5)]


def test_scores_of_weights_that_are_gone_count_no_more(config, evaluations, tmp_path):
    out = tmp_path / "out"
    config.eval_every_steps = 2

    def taken():
        (out / "best").rename(tmp_path / "taken")
        return 0.4

    evaluations[:] = [0.9, taken, 0.7, 0.5, None]
    run(config, out)
    best, stored = load_checkpoint(out / "best"), load_checkpoint(out / "checkpoints" / "6")
    jax.tree.map(np.testing.assert_array_equal, best.variables, stored.variables)
    assert json.loads((out / "best/evaluation.json").read_text()) == {"step": 6, "J&F": 0.7}


def test_the_best_weights_of_another_run_are_not_taken(config, whole, evaluations, tmp_path):
    """Its checkpoints were deleted, say; its scores would be taken for those of the new one."""
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoints" / "2", out / "best")
    (out / "best" / "evaluation.json").write_text('{"step": 2, "J&F": 0.99}')
    for config.mode in ("train", "train_and_eval"):
        with pytest.raises(ValueError, match="best: the best weights of another run; choose"):
            preparation.prepare(config, out)
    config.overwrite = True
    evaluations[:] = [0.5, 0.4, None]
    run(config, out)
    best, stored = load_checkpoint(out / "best"), load_checkpoint(out / "checkpoints" / "4")
    jax.tree.map(np.testing.assert_array_equal, best.variables, stored.variables)
    assert json.loads((out / "best/evaluation.json").read_text()) == {"step": 4, "J&F": 0.5}


def test_other_videos_to_evaluate_are_refused(config, evaluations, davis, tmp_path, monkeypatch):
    """The best of scores of different videos would mean nothing. The same ones may have moved."""
    out = tmp_path / "out"
    evaluations[:] = [0.9, 0.8, None]
    run(config, out)
    shutil.rmtree(out / "checkpoints" / "8")
    moved = tmp_path / "moved"
    shutil.copytree(davis, moved)
    config.data.root = str(moved)
    preparation.prepare(config, out)
    mask = moved / "Annotations/480p/synthetic-0001/00000.png"
    label = Image.open(mask)
    mirrored = Image.fromarray(np.array(label)[:, ::-1].copy())
    mirrored.putpalette(label.getpalette())
    mirrored.save(mask)
    text = error_of(config, out, monkeypatch)
    (line,) = text.splitlines()[1:-1]
    assert line.startswith("  evaluated.synthetic-0001: ")


def test_equal_scores_keep_the_newer_weights(config, evaluations, tmp_path, caplog):
    caplog.set_level("INFO", "cfbi_jax")
    evaluations[:] = [0.5, 0.5, None]
    run(config, tmp_path / "out")
    best = load_checkpoint(tmp_path / "out" / "best")
    newest = load_checkpoint(tmp_path / "out" / "checkpoints" / str(STEPS))
    jax.tree.map(np.testing.assert_array_equal, best.variables, newest.variables)
    assert f"step {STEPS}: J&F 0.5000; best 0.5000 at step {STEPS}" in caplog.text


def test_without_truth_the_newest_weights_are_the_best(config, evaluations, davis, tmp_path):
    """And nothing is segmented but with them, in the end."""
    root = tmp_path / "DAVIS"
    shutil.copytree(davis, root)
    for path in (root / "Annotations/480p/synthetic-0001").iterdir():
        if path.stem != "00000":
            path.unlink()
    config.data.root = str(root)
    evaluations[:] = [None]
    run(config, tmp_path / "out")
    assert not evaluations
    best = load_checkpoint(tmp_path / "out" / "best")
    newest = load_checkpoint(tmp_path / "out" / "checkpoints" / str(STEPS))
    jax.tree.map(np.testing.assert_array_equal, best.variables, newest.variables)


def test_results_of_something_else_are_not_replaced(config, evaluations, tmp_path):
    out = tmp_path / "out"

    def others():  # come into the folder while the run is at work
        (out / "segmented").mkdir()
        (out / "segmented" / "synthetic-0001.json").write_text('{"made_by": {}}')
        return 0.5

    evaluations[:] = [0.5, others]
    with pytest.raises(preparation.Refused, match="made by something else(.|\n)*best"):
        run(config, out)
