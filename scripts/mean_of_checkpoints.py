"""The mean of several networks' weights, as a checkpoint.

    python scripts/mean_of_checkpoints.py CKPT CKPT ... --output MEAN

Networks that went on from the same weights, with other seeds or clips, are near enough to one
another for it: in docs/real_video.md their mean segments better than each of them. Not part of the
paper. All need the same architecture and image format.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cfbi_jax.files import path_of
from cfbi_jax.models.cfbi import model_config
from cfbi_jax.weights.checkpoint import Checkpoint, digest, load_checkpoint, save_checkpoint


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=path_of, metavar="CKPT")
    parser.add_argument("--output", required=True, type=path_of)
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    if os.path.lexists(arguments.output):
        raise FileExistsError(f"{arguments.output} exists; choose another --output")
    mean = mean_of(arguments.checkpoints)
    save_checkpoint(arguments.output, mean.model, mean.variables, mean.image_format)
    print(f"{mean.model.backbone}, weights {digest(mean.variables)}: wrote {arguments.output}")


def mean_of(paths: Sequence[Path]) -> Checkpoint:
    """Errors: ValueError for fewer than two, and for networks that differ by more than weights."""
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} checkpoint; expected two or more")
    networks = [load_checkpoint(path) for path in paths]
    first, *others = (
        {**model_config(x.model), **dataclasses.asdict(x.image_format)} for x in networks
    )
    for path, other in zip(paths[1:], others, strict=True):
        different = [f"{k}: {v!r} and {other[k]!r}" for k, v in first.items() if v != other[k]]
        if different:
            raise ValueError(f"{paths[0]} and {path} are other networks: {', '.join(different)}")
    variables = jax.tree.map(
        lambda *arrays: sum(map(np.asarray, arrays)) / np.float32(len(arrays)),
        *(network.variables for network in networks),
    )
    return dataclasses.replace(networks[0], variables=variables)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
