"""scripts/plot_run.py as a user runs it, and what its figure shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from from_scripts import load_script
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "plot_run.py"


@pytest.fixture(scope="module")
def plot_run():
    return load_script("plot_run")


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def write_lines(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes if axis.axison]


def test_draws_runs_and_picks_the_output(tmp_path):
    steps = range(10, 410, 10)
    write_lines(tmp_path / "a" / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in steps])
    write_lines(tmp_path / "b $9^$" / "metrics.jsonl", [{"step": s, "loss": 2 / s} for s in steps])
    with open(tmp_path / "b $9^$" / "metrics.jsonl", "a") as file:
        file.write('{"step": 410, "lo')  # b still runs
    done = run(tmp_path / "a", tmp_path / "b $9^$")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "b $9^$" / "curves.png").exists()
    both = np.array(Image.open(tmp_path / "a" / "curves.png").convert("RGB"))
    assert str(tmp_path / "a" / "curves.png") in done.stdout

    assert run(tmp_path / "a", "--output", tmp_path / "one.png").returncode == 0
    one = np.array(Image.open(tmp_path / "one.png").convert("RGB"))
    orange = np.array([255, 127, 14])  # the second colour of matplotlib's tab10
    assert (both == orange).all(axis=2).sum() > 50
    assert not (one == orange).all(axis=2).any()


def test_every_panel_as_it_is_meant(plot_run):
    """Eleven runs, more than tab10 has colours."""

    def entries(i):
        steps = [
            {
                "step": step,
                "loss": float(i),
                "learning_rate": float(step == 20),
                "gradient_norm": 1.0 + step,
                "data_wait": 0.1,
            }
            for step in range(40)
        ]
        return [*steps, {"step": 3, "J&F": 0.1}]

    figure = plot_run.draw({f"run {i}": entries(i) for i in range(11)}, 8)
    axes = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert "waiting for data (s per step)" in axes
    assert axes["gradient norm"].get_yscale() == "log"
    assert axes["J&F"].get_lines()[0].get_marker() == "o"  # one point has no line
    lines = axes["learning rate"].get_lines()
    np.testing.assert_array_equal(lines[0].get_ydata(), np.arange(40) == 20)  # not smoothed
    colours = [line.get_color() for line in lines]
    assert len({tuple(colour) for colour in colours}) == 11
    handles = figure.legends[0].legend_handles
    np.testing.assert_array_equal([handle.get_color() for handle in handles], colours)


def test_smooth_and_output_are_heeded(plot_run, tmp_path, monkeypatch):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    draw, windows = plot_run.draw, []

    def seen(runs, window):
        windows.append(window)
        return draw(runs, window)

    monkeypatch.setattr(plot_run, "draw", seen)
    arguments = [str(tmp_path), "--smooth", "7", "--output", str(tmp_path / "c.svg")]
    plot_run.main(plot_run.parse_arguments(arguments))
    assert windows == [7] and b"<svg" in (tmp_path / "c.svg").read_bytes()


def test_panels_are_those_with_data(plot_run):
    entries = [{"step": s, "loss": 1.0 / s, "gradient_norm": 2.0, "iou": None} for s in (1, 2, 3)]
    assert titles(plot_run.draw({"a": entries}, 50)) == ["loss", "gradient norm"]
    evaluated = entries + [{"step": 2, "J&F": 0.8, "J": 0.7}]
    figure = plot_run.draw({"a": entries, "b": evaluated}, 50)
    assert titles(figure) == ["loss", "J&F", "gradient norm"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    everything = {panel.field: 1.0 for panel in plot_run.PANELS}
    assert len(titles(plot_run.draw({"a": [{"step": 1} | everything]}, 50))) == 7
    with pytest.raises(ValueError, match="nothing to draw in a"):
        plot_run.draw({"a": [{"step": 1, "uptime": 3.0}]}, 50)


def test_a_panel_shows_raw_and_smoothed_values_of_each_run(plot_run):
    ramp = [{"step": s, "loss": float(s % 2)} for s in range(40)]
    other = [{"step": s, "loss": 5.0} for s in range(40)]
    axis = plot_run.draw({"a": ramp, "b": other}, 8).axes[0]
    raw, smoothed, *others = axis.get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), np.arange(40) % 2)
    assert np.abs(smoothed.get_ydata()[5:-5] - 0.5).max() < 0.1
    assert raw.get_color() == smoothed.get_color() != others[0].get_color()
    assert others[0].get_color() == others[1].get_color()
    assert raw.get_alpha() < 0.5
    assert all((line.get_ydata() == 5).all() for line in others)
    # Without smoothing, only the values.
    (only,) = plot_run.draw({"a": ramp}, 1).axes[0].get_lines()
    np.testing.assert_array_equal(only.get_ydata(), np.arange(40) % 2)


def test_smoothing_is_a_centred_mean_that_skips_gaps(plot_run):
    values = np.arange(20.0)
    expected = np.r_[0.5, values[1:-1], 18.5]
    np.testing.assert_allclose(plot_run.smooth(values, 3), expected)
    np.testing.assert_array_equal(plot_run.smooth(values, 1), values)
    # Never over more than a quarter of the values: 5 of 20.
    np.testing.assert_allclose(plot_run.smooth(values, 50), plot_run.smooth(values, 5))
    assert plot_run.smooth(values, 5)[0] == 1
    gaps = values.copy()
    gaps[7], gaps[8] = np.nan, np.inf
    np.testing.assert_allclose(plot_run.smooth(gaps, 3)[[6, 7, 8, 9]], [5.5, 6, 9, 9.5])
    assert np.isnan(plot_run.smooth(np.full(9, np.nan), 2)).all()
    spike = np.r_[1e18, np.ones(39)]
    np.testing.assert_array_equal(plot_run.smooth(spike, 4)[3:], 1)


def test_series_are_in_the_order_of_steps(plot_run):
    entries = [{"step": 3, "loss": 1}, {"step": 1, "loss": None}, {"step": 2, "iou": 0.5}]
    steps, values = plot_run.series(entries, "loss")
    assert steps.tolist() == [1, 3] and np.isnan(values[0]) and values[1] == 1
    with pytest.raises(ValueError, match="'loss' at step 4"):
        plot_run.series([{"step": 4, "loss": "high"}], "loss")


def test_evaluations_are_read_and_equal_names_told_apart(plot_run, tmp_path):
    for folder in ("x/run", "y/run"):
        write_lines(tmp_path / folder / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    write_lines(tmp_path / "y/run/evaluations.jsonl", [{"step": 1, "J&F": 0.5}])
    assert plot_run.read_run(tmp_path / "x/run") == [{"step": 1, "loss": 1.0}]
    assert plot_run.read_run(tmp_path / "y/run")[1] == {"step": 1, "J&F": 0.5}
    (tmp_path / "y/run/metrics.jsonl").write_bytes(b"")
    assert plot_run.read_run(tmp_path / "y/run") == [{"step": 1, "J&F": 0.5}]
    folders = [tmp_path / "x/run", tmp_path / "y/run"]
    assert plot_run.run_names(folders) == [str(folder) for folder in folders]
    assert plot_run.run_names(folders[:1]) == ["run"]


def test_bad_input_is_named_and_no_picture_written(plot_run, tmp_path):
    good = tmp_path / "good"
    write_lines(good / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    write_lines(tmp_path / "empty" / "metrics.jsonl", [])
    (tmp_path / "nothing").mkdir()
    damaged = tmp_path / "damaged" / "metrics.jsonl"
    damaged.parent.mkdir()
    damaged.write_bytes(b'{"step": 1}\n{"step\n{"step": 3}\n')
    scores = tmp_path / "scores"
    write_lines(scores / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    (scores / "evaluations.jsonl").write_text("oops\n")

    def error(*arguments):
        with pytest.raises((OSError, ValueError)) as caught:
            plot_run.main(plot_run.parse_arguments([str(argument) for argument in arguments]))
        assert list(tmp_path.rglob("curves.png")) == []
        return str(caught.value)

    assert "absent: no such folder" in error(good, tmp_path / "absent")
    assert "nothing: no metrics.jsonl" in error(good, tmp_path / "nothing")
    assert "empty/metrics.jsonl: no step" in error(good, tmp_path / "empty")
    assert "damaged/metrics.jsonl, line 2: damaged" in error(good, tmp_path / "damaged")
    assert "scores/evaluations.jsonl, line 1: damaged" in error(good, scores)
    assert "--smooth 0" in error(good, "--smooth", 0)
    write_lines(tmp_path / "far" / "metrics.jsonl", [{"step": 10**21, "loss": 1.0}])
    assert "'loss': a step or value is too large" in error(tmp_path / "far")
    deep = tmp_path / "deep" / "metrics.jsonl"
    deep.parent.mkdir()
    deep.write_text('{"step": 1, "loss": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert "deep/metrics.jsonl, line 1: damaged" in error(deep.parent)

    done = run(good, tmp_path / "damaged")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "damaged/metrics.jsonl, line 2" in done.stderr
