"""Draws the curves of one or more training runs.

    python scripts/plot_run.py OUT [OUT2 ...] [--output curves.png] [--smooth 50]

Reads OUT/metrics.jsonl and, if there, OUT/evaluations.jsonl, and writes OUT/curves.png of the first
run. A run may still be going on. Bad input gives a message and exit status 1, and no picture.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from cfbi_jax.files import path_of, write_file
from cfbi_jax.training.metric_writers import EVALUATIONS_FILE, METRICS_FILE, read_metrics


class Panel(NamedTuple):
    title: str
    field: str  # of the JSON objects
    kind: str = "noisy"  # averaged; "exact": often the same in all runs; "sparse": few values
    logarithmic: bool = False


PANELS = (
    Panel("loss", "loss"),
    Panel("IoU of the training clips", "iou"),
    Panel("J&F", "J&F", kind="sparse"),
    Panel("learning rate", "learning_rate", kind="exact"),
    Panel("gradient norm", "gradient_norm", logarithmic=True),
    Panel("clips per second", "clips_per_second"),
    Panel("waiting for data (s per step)", "data_wait"),
)
MAX_COLUMNS = 4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=path_of, metavar="OUT", help="folder of a run")
    parser.add_argument("--output", type=path_of, help="default: curves.png in the first OUT")
    parser.add_argument(
        "--smooth",
        type=int,
        default=50,
        help="logged steps to average over, at most a quarter of a run's; 1: none (default: 50)",
    )
    return parser.parse_args(arguments)


def read_run(folder: Path) -> list[dict[str, Any]]:
    """All that a run logged.

    Errors: FileNotFoundError for a missing folder or file; ValueError for a damaged or empty file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the output of a training run")
    path = folder / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {METRICS_FILE}; expected the output of training")
    entries = read_metrics(path)
    evaluations = folder / EVALUATIONS_FILE
    if evaluations.is_file():
        entries += read_metrics(evaluations)
    if not entries:
        raise ValueError(f"{path}: no step in it yet")
    return entries


def series(entries: list[dict[str, Any]], field: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a field in the order of the steps; null is NaN."""
    points = [(e["step"], e[field]) for e in entries if field in e]
    for step, value in points:
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{field!r} at step {step} is {value!r}; expected a number")
    points.sort(key=lambda point: point[0])
    try:
        steps = np.array([step for step, _ in points], np.int64)
        return steps, np.array([value for _, value in points], np.float64)
    except OverflowError as error:
        raise ValueError(f"{field!r}: a step or value is too large ({error})") from error


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Means over about `window` values around each, fewer at the ends; only of the finite ones.

    NaN stays where there is no finite value at all.
    """
    half = min(window, len(values) // 4) // 2
    values = np.where(np.isfinite(values), values, np.nan)
    parts = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


def run_names(folders: list[Path]) -> list[str]:
    """The folders' names; whole paths where two names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def draw(runs: dict[str, list[dict[str, Any]]], window: int) -> plt.Figure:
    """One panel per quantity that some run has, one colour per run."""
    panels = [
        panel
        for panel in PANELS
        if any(np.isfinite(series(entries, panel.field)[1]).any() for entries in runs.values())
    ]
    if not panels:
        known = ", ".join(panel.field for panel in PANELS)
        raise ValueError(f"nothing to draw in {', '.join(runs)}; expected some of {known}")
    rows = -(-len(panels) // MAX_COLUMNS)
    columns = -(-len(panels) // rows)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(4.4 * columns, 6), 3.3 * rows + 0.3),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    if len(runs) <= 10:
        colours = plt.get_cmap("tab10").colors
    else:
        colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(runs)))
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, entries in enumerate(runs.values()):
            steps, values = series(entries, panel.field)
            if panel.kind == "noisy" and window > 1:
                axis.plot(steps, values, color=colours[i], linewidth=0.7, alpha=0.25)
            if panel.kind == "noisy":
                values = smooth(values, window)
            # Equal curves show one around the other.
            width = 1.6 + min(2 * (len(runs) - 1 - i), 6) * (panel.kind == "exact")
            # A line through one or few points is hard to see or invisible.
            marker = "o" if len(steps) == 1 or panel.kind == "sparse" else None
            axis.plot(steps, values, color=colours[i], linewidth=width, marker=marker, markersize=4)
        _finish_axis(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(
        [Line2D([], [], color=colours[i], linewidth=3) for i in range(len(runs))],
        [name.replace("$", r"\$") for name in runs],  # no formulas
        loc="outside upper left",
        ncols=2 * columns,
        frameon=False,
    )
    return figure


def _finish_axis(axis: plt.Axes, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=9, labelbottom=True)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")  # powers of 10 are enough if a few are in sight
        low, high = axis.get_ylim()
        if high < 100 * low:
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(labelsize=9, which="minor")


def main(arguments: argparse.Namespace) -> None:
    if arguments.smooth < 1:
        raise ValueError(f"--smooth {arguments.smooth}; expected 1 or more")
    output = arguments.output or arguments.runs[0] / "curves.png"
    names = run_names(arguments.runs)
    runs = {name: read_run(folder) for name, folder in zip(names, arguments.runs, strict=True)}
    figure = draw(runs, arguments.smooth)
    encoded = io.BytesIO()
    figure.savefig(encoded, format=output.suffix.removeprefix(".") or "png", dpi=130)
    write_file(output, encoded.getvalue())
    print(f"wrote {output}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
