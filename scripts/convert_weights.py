"""Official PyTorch weights <-> this project's checkpoints.

    python scripts/convert_weights.py --input X.pth --output CKPT_DIR
    python scripts/convert_weights.py --export --input CKPT_DIR --output X.pth

The architecture (ResNet-101 or MobileNetV2) is read from the file. Every key is accounted for both
ways, or nothing is written. Needs torch: pip install "cfbi_jax[convert]". A file that would run
code when it is loaded is refused.
"""

import argparse
import os
import sys

from cfbi_jax.files import path_of
from cfbi_jax.models.images import OFFICIAL_FORMAT
from cfbi_jax.weights.checkpoint import check_finite, digest, load_checkpoint, save_checkpoint
from cfbi_jax.weights.official import (
    computed_otherwise,
    convert_state_dict,
    export_state_dict,
)
from cfbi_jax.weights.pth import read_pth, write_pth


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, type=path_of)
    parser.add_argument("--output", required=True, type=path_of)
    parser.add_argument("--export", action="store_true", help="from a checkpoint to a .pth file")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    if os.path.lexists(arguments.output):
        raise FileExistsError(f"{arguments.output} exists; choose another --output")
    if arguments.export:
        checkpoint = load_checkpoint(arguments.input)
        if checkpoint.image_format != OFFICIAL_FORMAT:
            print(
                f"note: these weights expect {checkpoint.image_format}; the official code feeds "
                f"{OFFICIAL_FORMAT}"
            )
        for field, (own, official) in computed_otherwise(checkpoint.model).items():
            print(f"note: {field} is {own} here and {official} in the official code")
        write_pth(arguments.output, export_state_dict(checkpoint.model, checkpoint.variables))
        model, variables = checkpoint.model, checkpoint.variables
    else:
        state = read_pth(arguments.input)
        try:
            model, variables = convert_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{arguments.input}: {error}") from error
        check_finite(variables, arguments.input)
        save_checkpoint(arguments.output, model, variables, OFFICIAL_FORMAT)
    print(f"{model.backbone}, weights {digest(variables)}: wrote {arguments.output}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
