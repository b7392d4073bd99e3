"""All settings whose figures are published, one process each, into one folder."""

import argparse
import itertools
import sys
from pathlib import Path

from benchmarks import turns
from benchmarks.report import Row, make_row

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
# Of a GPU's memory (80 GB), what a process of several gets.
SHARE = 0.1
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
    for model, size, count, dtype in itertools.product(models, sizes, objects, dtypes):
        name = f"infer-{model}-{size}-{count}-{dtype}"
        found[name] = ["infer", "--model", model, "--size", size, "--objects", str(count)]
        found[name] += ["--dtype", dtype, "--no-stages"]
    common = ["--model", models[0], "--size", sizes[0]]
    for dtype in dtypes:
        found[f"stages-{dtype}"] = ["infer", *common, "--dtype", dtype]
    found["stages-float32"] += ["--torch", "--straightforward"]
    found["match"] = ["match", *common, "--objects", "5", "--sweep", "--backward"]
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


def everything(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """A row for every setting: whether it ended well, and how long it took. A setting whose
    figures are in the folder already is not measured again."""
    commands = []
    for name, (flags, share) in settings(arguments.small).items():
        chosen = not arguments.only or any(part in name for part in arguments.only.split(","))
        figures = arguments.output / f"{name}.json"
        if not chosen or figures.exists():
            continue
        if flags[0] != "plan":
            flags = [*flags, "--runs", str(arguments.runs)]
        program = [sys.executable, str(SCRIPT), *flags, "--json", str(figures)]
        commands.append(turns.Command(name, program, share, arguments.output / f"{name}.txt"))
    rows = []
    for command in turns.run(commands, arguments.jobs):
        printed = command.output.read_text().strip().split("\n")
        result = "measured" if command.returncode == 0 else printed[-1]
        rows.append(make_row("everything", command.name, result=result, minutes=command.minutes))
        print(f"{command.name}: {result}", flush=True)
    return rows, None
