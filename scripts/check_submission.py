"""Says what an evaluation server would reject in a zip, or in a folder to be zipped.

    python scripts/check_submission.py --dataset davis2017 --root DAVIS --split test-dev ZIP_OR_DIR

Exit status 0 with a summary if the submission would be accepted, 1 with the list of problems.
"""

import argparse
import sys

from cfbi_jax.data.videos import split_names
from cfbi_jax.evaluation.submission import DATASETS, check_submission, expected_sequences
from cfbi_jax.files import name_of, path_of


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submission", type=path_of, metavar="ZIP_OR_DIR")
    parser.add_argument("--dataset", required=True, choices=sorted(DATASETS))
    parser.add_argument("--root", required=True, type=path_of, help="folder of the data set")
    parser.add_argument(
        "--split", type=name_of, help="default: test-dev (DAVIS), valid (YouTube-VOS)"
    )
    parser.add_argument(
        "--resolution", type=name_of, help="DAVIS: folder under JPEGImages; default: 480p"
    )
    parser.add_argument("--sequences", type=split_names, help="expect only these: blackswan,dog")
    found = parser.parse_args(arguments)
    if found.sequences is not None and not found.sequences:
        parser.error("--sequences names no sequence")
    if found.resolution is not None and found.dataset == "youtube_vos":
        parser.error("--resolution is for DAVIS; --dataset is youtube_vos")
    return found


def main(arguments: argparse.Namespace) -> int:
    split = arguments.split or ("valid" if arguments.dataset == "youtube_vos" else "test-dev")
    resolution = arguments.resolution or "480p"
    what = (arguments.root, arguments.dataset, split, resolution, arguments.sequences)
    problems = check_submission(arguments.submission, *what)
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        print(f"{arguments.submission}: {count}", *problems, sep="\n  ")
        return 1
    expected = expected_sequences(*what)
    num_frames = sum(len(sequence.frames) for sequence in expected.values())
    print(
        f"{arguments.submission}: {len(expected)} sequences, {num_frames} masks, no problem found"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse_arguments()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
