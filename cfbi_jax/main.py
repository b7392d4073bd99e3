"""The command. `python -m cfbi_jax.main --config=configs/davis.py --workdir=OUT`"""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path

import rich
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from rich.logging import RichHandler

from cfbi_jax import evaluate
from cfbi_jax.files import BadFile, path_of
from cfbi_jax.training import loop, preparation, processes

LOGGER = logging.getLogger("cfbi_jax.main")
MODES = ("train", "eval", "train_and_eval")

CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, configs/*.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that is written.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "",
    "Several hosts, one process each: auto (Slurm, TPU, ...), or HOST:PORT,NUMBER,COUNT with the "
    "first process' address, this process' number from 0, and how many there are.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:  # "--" or "=" forgotten, or a space too many
        found = " ".join(arguments[1:])
        sys.exit(f"error: {found}: no argument; expected --config.FIELD=VALUE, without spaces")
    try:
        _main()
    except KeyboardInterrupt:  # a training catches the first one, and saves
        sys.exit(128 + signal.SIGINT)


def _main() -> None:
    _log_to_screen()
    config = CONFIG.value
    if not WORKDIR.value:  # a shell's variable that is not set
        sys.exit("error: --workdir is empty; expected a folder")
    try:
        _expand_home(config)
    except OSError as error:  # no such file; ml_collections says so when it is first used
        sys.exit(f"error: {error}")
    if config.mode not in MODES:
        sys.exit(f'error: config.mode is "{config.mode}"; expected one of {MODES}')
    evaluating = config.mode == "eval"
    prepare = evaluate.prepare if evaluating else preparation.prepare
    try:
        if DISTRIBUTED.value:
            processes.join(DISTRIBUTED.value)
            if evaluating:  # what is finished is kept
                processes.end_at_sigterm()
        prepared = prepare(config, path_of(WORKDIR.value))
    except (ValueError, OSError, ImportError, MemoryError) as error:  # before any long work
        sys.exit(f"error: {error}")
    try:
        (evaluate if evaluating else loop).run(prepared)
    except loop.Stopped as stopped:
        LOGGER.warning("%s", stopped)
        sys.exit(128 + stopped.signal)
    except (loop.NotFinite, BadFile, MemoryError, OSError) as error:  # a full disk, say
        sys.exit(f"error: {error}")


def _expand_home(config: ConfigDict) -> None:
    """Shells leave `~` after `=` as it is."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            config[name] = os.path.expanduser(value)


def _log_to_screen() -> None:
    """Our own messages from INFO on, those of the libraries from WARNING on."""
    if rich.get_console().is_terminal:
        handler = RichHandler(show_path=False)  # goes well with a progress bar
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("cfbi_jax", "absl"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # Libraries log through absl, too; of theirs, clu's progress alone is news.
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno >= logging.WARNING or "clu" in Path(record.pathname).parts
    )


def _parse(arguments: list[str]) -> list[str]:
    """absl's parser; what ml_collections makes of a field or file that there is not becomes one
    line. `--config=~/mine.py` is what the shell leaves of a home folder's file."""
    home = "--config=~/"
    arguments = [
        f"--config={os.path.expanduser('~/')}{x.removeprefix(home)}" if x.startswith(home) else x
        for x in arguments
    ]
    try:
        return app.parse_flags_with_usage(arguments)
    except OSError as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "get_config" for frame in frames):  # a mistake in the file itself
            raise
        said = error
        while isinstance(said, Exception):  # one in the other
            said = said.args[0]
        given = " ".join(x for x in arguments if x.startswith("--config."))
        said = " ".join(str(said).split())
        if "no attribute 'get_config'" in said:
            file = next((x for x in arguments if x.startswith("--config=")), "--config")
            sys.exit(f"error: {file}: no get_config() in it; expected one: see configs/davis.py")
        sys.exit(f"error: {said}: no field of the configuration that {given} could set")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
