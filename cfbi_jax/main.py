"""The command. `python -m cfbi_jax.main --config=configs/davis.py --workdir=OUT`"""

import logging
import sys
from pathlib import Path

import rich
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from rich.logging import RichHandler

from cfbi_jax import evaluate

CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, configs/*.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that is written.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_) -> None:
    _log_to_screen()
    config = CONFIG.value
    if config.mode != "eval":
        sys.exit(f'error: config.mode is "{config.mode}"; expected "eval"')
    try:
        evaluation = evaluate.prepare(config, Path(WORKDIR.value))
    except (ValueError, OSError) as error:  # bad input, known before any long work
        sys.exit(f"error: {error}")
    evaluate.run(evaluation)


def _log_to_screen() -> None:
    """Our own messages from INFO on, those of the libraries from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    if rich.get_console().is_terminal:
        handler = RichHandler(show_path=False)  # goes well with a progress bar
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("cfbi_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    app.run(main)
