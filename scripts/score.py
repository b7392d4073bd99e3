"""Scores a folder of predicted masks, ours or another system's.

    python scripts/score.py --dataset davis2017 --root DAVIS --split val --resolution 480p \\
        --results DIR

Writes the CSV tables of the official DAVIS tool into DIR (or --output) and prints them. Everything
is computed anew. Bad input gives a message and exit status 1, and no tables.
"""

import argparse
import sys

from cfbi_jax.data.videos import split_names
from cfbi_jax.evaluation import report
from cfbi_jax.evaluation.davis import score_davis
from cfbi_jax.evaluation.youtube_vos import score_youtube_vos
from cfbi_jax.files import check_writable, name_of, path_of


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", required=True, choices=("davis2016", "davis2017", "youtube_vos")
    )
    parser.add_argument("--root", required=True, type=path_of, help="folder of the data set")
    parser.add_argument(
        "--results", required=True, type=path_of, help="folder with <sequence>/<frame>.png"
    )
    parser.add_argument("--split", type=name_of, help="default: val (DAVIS), train (YouTube-VOS)")
    parser.add_argument(
        "--resolution", type=name_of, help="DAVIS: folder under Annotations; default: 480p"
    )
    parser.add_argument("--sequences", type=split_names, help="score only these: blackswan,dog")
    parser.add_argument(
        "--seen-categories",
        type=split_names,
        help="YouTube-VOS: categories seen in training; default: those of root/train/meta.json",
    )
    parser.add_argument("--output", type=path_of, help="folder of the tables; default: --results")
    parser.add_argument("--threads", type=int, help="default: one per core")
    found = parser.parse_args(arguments)
    if found.sequences is not None and not found.sequences:
        parser.error("--sequences names no sequence")
    if found.threads is not None and found.threads < 1:
        parser.error(f"--threads is {found.threads}; expected 1 or more")
    if found.seen_categories is not None and found.dataset != "youtube_vos":
        parser.error(f"--seen-categories is for youtube_vos; --dataset is {found.dataset}")
    if found.resolution is not None and found.dataset == "youtube_vos":
        parser.error("--resolution is for DAVIS; --dataset is youtube_vos")
    return found


def score(arguments: argparse.Namespace, split: str) -> report.Scores:
    """Errors: those of `score_davis` and `score_youtube_vos`."""
    if arguments.dataset == "youtube_vos":
        return score_youtube_vos(
            arguments.root,
            arguments.results,
            split=split,
            videos=arguments.sequences,
            seen_categories=arguments.seen_categories,
            num_threads=arguments.threads,
        )
    return score_davis(
        arguments.root,
        arguments.results,
        year=int(arguments.dataset.removeprefix("davis")),
        split=split,
        resolution=arguments.resolution or "480p",
        sequences=arguments.sequences,
        num_threads=arguments.threads,
    )


def main(arguments: argparse.Namespace) -> None:
    split = arguments.split or ("train" if arguments.dataset == "youtube_vos" else "val")
    output = arguments.output or arguments.results
    if not arguments.results.is_dir():
        raise FileNotFoundError(f"{arguments.results}: no such folder of predicted masks")
    called = report.subset_name(split) if arguments.sequences else split
    check_writable(output)
    report.remove_tables(output, called)
    try:
        scores = score(arguments, split)
    except FileNotFoundError as error:
        inner = arguments.results / "Annotations"
        if not inner.is_dir():
            raise
        raise FileNotFoundError(f"{error} (or is --results {inner}?)") from error
    written = report.write_tables(scores, output, called)
    report.show(scores, called)  # last: a reader may close the pipe
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
