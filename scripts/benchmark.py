"""Measures speed and memory on this machine, next to the machine's own limits.

    python scripts/benchmark.py infer --size 480x854 --objects 2 --model r101 --json infer.json
    python scripts/benchmark.py match --size 480x854 --objects 5 --references 2 --backward --sweep
    python scripts/benchmark.py train --model mbv2 --crop 465 --batch 2 --remat segment --devices 2
    python scripts/benchmark.py score --frames 20 --objects 3
    python scripts/benchmark.py load --crop 465 --batch 8 --workers 2 [--root DAVIS]
    python scripts/benchmark.py plan --size 2160x3840 --objects 10 --references 4 --measure
    python scripts/benchmark.py video --size 96x160 --model quickstart --frames 2000
    python scripts/benchmark.py startup --size 480x854 --model r101
    python scripts/benchmark.py all --output DIR --jobs 8

Weights and videos are random. Every figure is the median of --runs runs (videos from files and
convolutions alone: three at most) after one to warm up, with the least and the largest beside it;
compile times are apart. "limit" is the least time in which the
machine, as measured in the same run, does the stage's products or reads and writes its inputs and
outputs; "share of limit" is that time as a share of the stage's. Shares and ratios can be compared
between machines and noisy hours, seconds cannot.

`match` runs plain versions of the same, in JAX and (where it is installed) in torch, and compares
their numbers before their times. --json writes everything, and details, to a file. Bad input gives
a message and exit status 1.

`all` measures the settings of the published stages, videos, trainings and plans, into
--output/NAME.json and NAME.txt, which takes much more than ten minutes. Repeated with the same
flags, it goes on with what is missing; figures of other flags are measured again, those of another
machine are not: give it another folder.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))  # also where another program loads this file

from benchmarks import (  # noqa: E402
    data,
    everything,
    infer,
    match,
    measure,
    planning,
    report,
    startup,
    train,
    video,
)
from benchmarks.networks import MODELS  # noqa: E402

from cfbi_jax.compilation import use_compilation_cache  # noqa: E402
from cfbi_jax.files import path_of
from cfbi_jax.inference.options import DTYPES  # noqa: E402
from cfbi_jax.training.step import REMAT  # noqa: E402

COMMANDS: dict[str, Callable] = {
    "infer": infer.infer,
    "match": match.match,
    "train": train.train,
    "score": data.score,
    "load": data.load,
    "plan": planning.plan,
    "video": video.video,
    "startup": startup.startup,
    "all": everything.everything,
}
POSITIVE = (
    "objects",
    "references",
    "runs",
    "batch",
    "batches",
    "accumulate",
    "devices",
    "frames",
    "budget_mib",
    "jobs",
)
# What `plan` takes for a video, and for a training step.
OF_A_VIDEO = ("size", "references", "budget_mib", "scales", "flip")
OF_A_STEP = ("crop", "batch", "accumulate", "remat")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Errors: ValueError for values out of range."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--objects", type=int, default=1)
    common.add_argument("--runs", type=int, default=5, help="timed runs, after one to warm up")
    common.add_argument("--json", type=path_of, help="file that gets everything measured")
    sized = argparse.ArgumentParser(add_help=False)
    sized.add_argument("--size", default="480x854", help="of the video, HEIGHTxWIDTH")
    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--model", default="r101", help=", ".join(MODELS))
    network.add_argument("--dtype", default="float32", help=f"of convolutions: {DTYPES}")
    network.add_argument("--matching-dtype", default="float32", help="of distances")
    references = argparse.ArgumentParser(add_help=False)
    references.add_argument("--references", type=int, default=1, help="frames with masks")
    on_off = argparse.BooleanOptionalAction

    def add_comparisons(command: argparse.ArgumentParser, default: bool) -> None:
        command.add_argument(
            "--straightforward", action=on_off, default=default, help="matching in plain JAX"
        )
        command.add_argument(
            "--torch", action=on_off, help="matching in plain torch; default: where installed"
        )
        command.set_defaults(torch_by_default=default)

    def add_training(command: argparse.ArgumentParser) -> None:
        command.add_argument("--crop", type=int, default=465, help="side of the clips, 16 k + 1")
        command.add_argument("--batch", type=int, default=1, help="clips, over all devices")
        command.add_argument("--accumulate", type=int, default=1)
        command.add_argument("--remat", default="none", help=", ".join(REMAT))

    command = commands.add_parser("infer", parents=[common, sized, network, references])
    command.add_argument(
        "--convolutions", action=on_off, default=True, help="also time each convolution alone"
    )
    command.add_argument(
        "--stages", action=on_off, default=True, help="no: whole videos alone, which compiles less"
    )
    add_comparisons(command, default=False)
    command.set_defaults(backward=False)

    command = commands.add_parser("match", parents=[common, sized, network, references])
    command.add_argument("--backward", action="store_true", help="also time our gradient")
    command.add_argument("--sweep", action="store_true", help="ours over objects, references")
    add_comparisons(command, default=True)

    command = commands.add_parser("train", parents=[common, network])
    add_training(command)
    command.add_argument(
        "--devices", type=int, help="use this many; on a CPU they are simulated; default: all"
    )

    command = commands.add_parser("video", parents=[common, sized, network])
    command.add_argument("--frames", type=int, default=2000, help="of the video")

    commands.add_parser("startup", parents=[common, sized, network])

    command = commands.add_parser("all", parents=[common])
    command.add_argument("--output", type=path_of, required=True, help="folder of tables and JSON")
    command.add_argument(
        "--jobs", type=int, default=1, help="compile this many at a time; each measures alone"
    )
    command.add_argument("--small", action="store_true", help="small sizes: tries the script")
    command.add_argument("--only", default="", help="settings with this in their name: train,plan")

    command = commands.add_parser("score", parents=[common, sized])
    command.add_argument("--frames", type=int, default=20)

    command = commands.add_parser("load", parents=[common, sized])
    command.add_argument("--root", type=path_of, help="a DAVIS folder; default: synthetic videos")
    command.add_argument("--resolution", default="480p", help="DAVIS: folder under JPEGImages")
    command.add_argument("--split", default="train", help="DAVIS: list in ImageSets/2017")
    command.add_argument("--crop", type=int, default=465, help="side of the clips, 16 k + 1")
    command.add_argument("--batch", type=int, default=8, help="clips in a batch")
    command.add_argument("--batches", type=int, default=5, help="in each of the runs")
    command.add_argument("--workers", type=int, default=0, help="processes; 0: threads")

    command = commands.add_parser("plan", parents=[common, sized, network, references])
    command.add_argument("--budget-mib", type=int, help="memory that a video may take")
    command.add_argument("--scales", type=float, nargs="+", default=[1.0])
    command.add_argument("--flip", action="store_true")
    command.add_argument("--train", action="store_true", help="a training step instead")
    add_training(command)
    command.add_argument("--measure", action="store_true", help="run it, too, and compare")
    given = parser.parse_args(arguments)
    if given.command == "plan":
        refuse_the_other_kind(given, command)
    return check(given)


def refuse_the_other_kind(given: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """Errors: ValueError for flags of a video in the plan of a step, or the other way round."""
    for name in OF_A_VIDEO if given.train else OF_A_STEP:
        if getattr(given, name) != command.get_default(name):
            flag = name.replace("_", "-")
            planned = "a training step" if given.train else "a video (--train plans a step)"
            raise ValueError(f"--{flag} has no effect on {planned}; expected no --{flag}")


def check(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with sizes as numbers and defaults filled in. Errors: ValueError."""
    given = vars(arguments)
    for name in POSITIVE:
        if given.get(name) is not None and given[name] < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {given[name]}; expected 1 or more")
    if given.get("workers", 0) < 0:
        raise ValueError(f"--workers is {given['workers']}; expected 0 or more")
    choices = {"model": MODELS, "dtype": DTYPES, "matching_dtype": DTYPES, "remat": REMAT}
    for name, expected in choices.items():
        if name in given and given[name] not in expected:
            flag = name.replace("_", "-")
            raise ValueError(f'--{flag} is "{given[name]}"; expected one of {", ".join(expected)}')
    if not given.get("stages", True) and (arguments.torch or arguments.straightforward):
        raise ValueError("--no-stages: whole videos alone; expected no --torch, --straightforward")
    if "size" in given:
        arguments.size = parse_size(given["size"])
    if "torch" in given:
        installed = importlib.util.find_spec("torch") is not None
        if arguments.torch and not installed:
            raise ValueError("--torch: torch is not installed; expected pip install torch")
        if arguments.torch is None:
            arguments.torch = arguments.torch_by_default and installed
    return arguments


def parse_size(text: str) -> tuple[int, int]:
    """Errors: ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    size = tuple(int(side) for side in found.groups()) if found else (0, 0)
    if min(size) < 32:
        raise ValueError(
            f'--size is "{text}"; expected HEIGHTxWIDTH of 32 or more, such as 480x854'
        )
    return size


def main(arguments: argparse.Namespace, command: list[str]) -> None:
    if arguments.command == "train" and arguments.devices:
        simulate_devices(arguments.devices)
    if arguments.command == "all":  # leave the accelerator's memory to the processes it starts
        jax.config.update("jax_platforms", "cpu")
    if arguments.command == "plan":  # what tuning on a GPU takes is no part of a run
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    use_compilation_cache("")  # a program that is read from a file took no time to compile
    machine = measure.machine()
    rows, limits = COMMANDS[arguments.command](arguments)
    machine["peak_memory"] = measure.peak_memory()
    report.print_report(arguments.command, machine, limits, rows)
    if arguments.json:
        report.write_json(arguments.json, command, machine, limits, rows)
        print(f"wrote {arguments.json}")
    failed = [row["name"] for row in rows if row.get("result") == everything.FAILED]
    if failed:
        raise ValueError(f"{', '.join(failed)}: failed; {arguments.output}/NAME.txt says why")


def simulate_devices(count: int) -> None:
    """Makes a CPU as many devices; other devices stay as they are."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX has begun, in another program's hands
        if len(jax.devices()) < count:
            raise ValueError(f"--devices is {count}: {error}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends those that `all` has started
    try:
        main(parse_arguments(), sys.argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")
