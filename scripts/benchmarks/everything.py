"""All settings whose figures are published, one process each, into one folder."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.report import Row, make_row
from benchmarks.straightforward import import_torch
from cfbi_jax.data.videos import split_names

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
# Of a GPU's memory (80 GB), what a process of several gets.
SHARE = 0.1
FAILED = "failed"
SLOW = ("startup", "load")  # a run takes ten seconds or more
TRAINING_SHARES = {
    ("float32", "none"): 0.9,
    ("float32", "segment"): 0.7,
    ("float32", "all"): 0.5,
    ("bfloat16", "none"): 0.5,
    ("bfloat16", "segment"): 0.4,
    ("bfloat16", "all"): 0.3,
}


def settings(small: bool) -> dict[str, tuple[list[str], float]]:
    """Name -> arguments of the script, and its share of the memory. `small`: the same with a small
    network and small pictures, to try the script itself."""
    models = ["quickstart"] if small else ["r101", "mbv2"]
    sizes = ["97x129"] if small else ["480x854", "720x1280"]
    objects, dtypes = [1, 3, 10], ["float32", "bfloat16"]
    crop = "81" if small else "465"
    found = {}
    asked = [
        *itertools.product(models, sizes, objects, dtypes),
        (models[0], sizes[0], 5, "float32"),
    ]
    for model, size, count, dtype in asked:
        name = f"infer-{model}-{size}-{count}-{dtype}"
        found[name] = ["infer", "--model", model, "--size", size, "--objects", str(count)]
        found[name] += ["--dtype", dtype, "--no-stages"]
    common = ["--model", models[0], "--size", sizes[0]]
    for dtype in dtypes:
        found[f"stages-{dtype}"] = ["infer", *common, "--dtype", dtype]
    found["stages-float32"] += ["--straightforward", _torch_flag()]
    found["match"] = ["match", *common, "--objects", "5", "--sweep", "--backward", _torch_flag()]
    found["plan"] = ["plan", *common, "--objects", "5", "--measure"]
    large = sizes[-1] if small else "2160x3840"
    found["plan-large"] = ["plan", "--model", models[0], "--size", large, "--objects", "20"]
    found["plan-large"] += ["--measure"]
    frames = "40" if small else "2000"
    found["video"] = ["video", "--model", "quickstart", "--size", "97x129", "--frames", frames]
    found["startup"] = ["startup", *common]
    found["score"], found["load"] = ["score"], ["load", "--crop", crop, "--workers", "2"]
    with_shares = {name: (arguments, SHARE) for name, arguments in found.items()}
    for (dtype, remat), share in TRAINING_SHARES.items():
        arguments = ["train", "--model", models[0], "--crop", crop, "--batch", "8"]
        arguments += ["--objects", "2", "--dtype", dtype, "--remat", remat]
        with_shares[f"train-{dtype}-{remat}"] = arguments, share
    return with_shares


def _torch_flag() -> str:
    """Torch is compared with where it computes on the same device. (JAX is not asked for GPUs here,
    as it would take their memory.)"""
    torch, gpus = import_torch(), any(Path("/dev").glob("nvidia[0-9]*"))
    return "--torch" if torch and (torch.cuda.is_available() or not gpus) else "--no-torch"


def everything(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """A row for every setting: how it ended, and how long it took. A setting whose figures are in
    the folder already, measured with the same flags, is not measured again.

    Errors: ValueError for a part of --only that is in no setting's name.
    """
    commands, rows = [], []
    for name, (flags, share) in chosen(settings(arguments.small), arguments.only).items():
        figures = arguments.output / f"{name}.json"
        if flags[0] in SLOW:
            flags = [*flags, "--runs", str(min(arguments.runs, 3))]
        elif flags[0] != "plan":
            flags = [*flags, "--runs", str(arguments.runs)]
        if figures.exists() and _flags(figures) == flags:
            rows.append(make_row("everything", name, result="measured before"))
            continue
        program = [sys.executable, str(SCRIPT), *flags, "--json", str(figures)]
        commands.append(turns.Command(name, program, share, arguments.output / f"{name}.txt"))
    for command in turns.run(commands, arguments.jobs):
        result = "measured" if command.returncode == 0 else FAILED
        rows.append(make_row("everything", command.name, result=result, minutes=command.minutes))
        last_line = command.output.read_text().strip().split("\n")[-1]
        print(f"{command.name}: {result if result == 'measured' else last_line}", flush=True)
    return rows, None


def _flags(figures: Path) -> list[str]:
    """That a file of figures was measured with, without its own name."""
    return json.loads(figures.read_text())["command"][1:-2]


def chosen(settings: dict[str, Any], only: str) -> dict[str, Any]:
    """Those with one of the parts of `only` in their names. Errors: ValueError."""
    parts = split_names(only)
    for part in parts:
        if not any(part in name for name in settings):
            raise ValueError(f'--only: no setting has "{part}" in its name; {", ".join(settings)}')
    return {k: v for k, v in settings.items() if not parts or any(part in k for part in parts)}
