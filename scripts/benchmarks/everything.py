"""All settings whose figures are published, one process each, into one folder."""

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import Row, make_row
from cfbi_jax.data.image_files import write_file

SCRIPT = Path(__file__).parents[1] / "benchmark.py"


def settings(small: bool) -> dict[str, list[str]]:
    """Name -> arguments of the script. `small`: the same with a small network and small pictures,
    to try the script itself."""
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
    for dtype, remat in itertools.product(dtypes, ["none", "segment", "all"]):
        name = f"train-{dtype}-{remat}"
        found[name] = ["train", "--model", models[0], "--crop", crop, "--batch", "8"]
        found[name] += ["--objects", "2", "--dtype", dtype, "--remat", remat]
    found["score"], found["load"] = ["score"], ["load", "--crop", crop, "--workers", "2"]
    return found


def everything(arguments: argparse.Namespace) -> tuple[list[Row], None]:
    """A row for every setting: whether it ended well, and how long it took. A setting whose
    figures are in the folder already is not measured again."""
    rows = []
    for name, command in settings(arguments.small).items():
        if arguments.only and not any(part in name for part in arguments.only.split(",")):
            continue
        figures = arguments.output / f"{name}.json"
        if figures.exists():
            continue
        started = time.perf_counter()
        command = [*command, "--runs", str(arguments.runs)] if command[0] != "plan" else command
        process = subprocess.run(
            [sys.executable, str(SCRIPT), *command, "--json", str(figures)],
            capture_output=True,
            text=True,
        )
        text = f"$ {' '.join(command)}\n{process.stdout}{process.stderr}"
        write_file(arguments.output / f"{name}.txt", text.encode())
        result = "measured" if process.returncode == 0 else process.stderr.strip().split("\n")[-1]
        rows.append(
            make_row(
                "everything", name, result=result, minutes=(time.perf_counter() - started) / 60
            )
        )
        print(f"{name}: {result}", flush=True)
    return rows, None
