"""scripts/score.py as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "score.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def davis(tmp_path, write_davis, write_results):
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[:, 4:10, 4:10] = 1
    root = write_davis(tmp_path / "DAVIS", {"a": masks})
    results = write_results(tmp_path / "results", {"a": masks})
    return results, ("--dataset", "davis2017", "--root", root, "--results", results)


def test_scores_anew_every_time_and_leaves_no_stale_table(davis):
    results, arguments = davis
    table = results / "global_results-val.csv"
    perfect = run(*arguments)
    assert perfect.returncode == 0, perfect.stderr
    assert table.read_text().splitlines()[1].startswith("1.000,")
    assert "a_1" in perfect.stdout and str(table) in perfect.stdout

    Image.new("L", (16, 16)).save(results / "a" / "00001.png")
    assert run(*arguments).returncode == 0
    assert table.read_text().splitlines()[1].startswith("0.500,")

    Image.fromarray(np.full((16, 16), 2, np.uint8)).save(results / "a" / "00001.png")
    wrong = run(*arguments)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
    assert "00001.png" in wrong.stderr and "id 2" in wrong.stderr
    assert list(results.glob("*.csv")) == []


def test_tables_are_there_whoever_reads_what_is_printed(davis):
    """As `score.py | head` may not."""
    results, arguments = davis
    command = [sys.executable, ROOT / "scripts" / "score.py", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, stdout=writer, stderr=subprocess.DEVNULL, env=environment)
    os.close(writer)
    assert (results / "global_results-val.csv").read_text().splitlines()[1].startswith("1.000,")
    assert len(list(results.glob("*_results-val.csv"))) == 3


def test_the_folder_of_an_evaluation(davis, tmp_path):
    """Its masks are one folder further in."""
    results, arguments = davis
    (tmp_path / "out").mkdir()
    results.rename(tmp_path / "out" / "Annotations")
    done = run(*arguments[:-1], tmp_path / "out")
    assert done.returncode == 1
    assert f"(or is --results {tmp_path / 'out' / 'Annotations'}?)" in done.stderr


def test_output_elsewhere(davis, tmp_path):
    results, arguments = davis
    done = run(*arguments, "--output", tmp_path / "tables", "--sequences", "a", "--split", "val")
    assert done.returncode == 0, done.stderr
    tables = [path.name for path in (tmp_path / "tables").glob("*_results-val-subset.csv")]
    assert len(tables) == 3  # not the split's
    assert list(results.glob("*.csv")) == []


def test_youtube_vos(tmp_path, write_youtube_vos, write_results):
    masks = np.zeros((3, 16, 16), np.uint8)
    masks[:, 4:10, 4:10] = 3
    named = {"v": dict(zip(("00000", "00005", "00010"), masks, strict=True))}
    objects = {"v": {"3": {"category": "dog", "frames": list(named["v"])}}}
    root = write_youtube_vos(tmp_path / "YT", named, objects)
    results = write_results(tmp_path / "results", named)
    done = run("--dataset", "youtube_vos", "--root", root, "--results", results)
    assert done.returncode == 0, done.stderr
    assert (results / "global_results-train.csv").read_text() == (
        "Overall,J-Seen,F-Seen\n1.000,1.000,1.000\n"
    )
    assert "Assumed" in done.stdout


def test_no_sequence_is_an_error_that_leaves_the_tables(davis):
    """An empty shell variable, say."""
    results, arguments = davis
    assert run(*arguments).returncode == 0
    before = sorted(results.glob("*.csv"))
    done = run(*arguments, "--sequences", "")
    assert done.returncode == 2 and "--sequences names no sequence" in done.stderr
    assert before and sorted(results.glob("*.csv")) == before
    for flag in ("--split", "--resolution"):
        done = run(*arguments, flag, "")
        assert done.returncode == 2 and f"{flag}: expected a name, found nothing" in done.stderr
    assert sorted(results.glob("*.csv")) == before


def test_long_names_are_shown_whole(tmp_path, write_davis, write_results):
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[:, 4:10, 4:10] = 1
    name = "a-sequence-whose-name-is-longer-than-a-column-of-a-narrow-terminal-can-be"
    root = write_davis(tmp_path / "DAVIS", {name: masks})
    results = write_results(tmp_path / "results", {name: masks})
    done = run("--dataset", "davis2017", "--root", root, "--results", results)
    assert done.returncode == 0, done.stderr
    cells = [
        line.split("\u2502")[1].strip() for line in done.stdout.splitlines() if "\u2502" in line
    ]
    assert f"{name}_1" in "".join(cells)


def test_categories_are_for_youtube_vos(davis):
    done = run(*davis[1], "--seen-categories", "dog")
    assert done.returncode == 2 and "--seen-categories is for youtube_vos" in done.stderr


def test_a_misspelt_folder_is_not_made(davis):
    results, arguments = davis
    done = run(*arguments[:-1], results.with_name("typo"))
    assert done.returncode == 1 and "typo: no such folder of predicted masks" in done.stderr
    assert not results.with_name("typo").exists()


def test_resolutions_are_for_davis(tmp_path):
    data = ("--dataset", "youtube_vos", "--root", tmp_path, "--results", tmp_path)
    done = run(*data, "--resolution", "480p")
    assert done.returncode == 2 and "--resolution is for DAVIS" in done.stderr


def test_evaluation_imports_without_jax():
    """A machine that only scores need not wait for JAX."""
    code = (
        "import json, sys\n"
        "import cfbi_jax.evaluation.report, cfbi_jax.evaluation.submission\n"
        "print(json.dumps('jax' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is False
