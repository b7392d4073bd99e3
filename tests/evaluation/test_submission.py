"""Zips for the servers, and the check of what they would reject."""

import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfbi_jax.evaluation.submission import check_submission, write_zip

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_submission.py"


def label(*ids):
    mask = np.zeros((10, 12), np.uint8)
    for i, object_id in enumerate(ids):
        mask[:, 3 * i : 3 * i + 2] = object_id
    return mask


@pytest.fixture
def davis(tmp_path, write_davis, write_results):
    """Two test-dev sequences, of which only the first mask is public, and perfect results."""
    masks = {"a": np.stack([label(1, 2)] * 3), "b": np.stack([label(1, 255)] * 3)}
    root = write_davis(tmp_path / "DAVIS", masks, split="test-dev")
    for path in (root / "Annotations").glob("*/*/*.png"):
        if path.stem != "00000":
            path.unlink()
    masks["b"][masks["b"] == 255] = 0
    return root, write_results(tmp_path / "results", masks)


@pytest.fixture
def youtube_vos(tmp_path, write_youtube_vos, write_results):
    masks = {"v": {"00000": label(2), "00005": label(2, 7), "00010": label(7)}}
    objects = {
        "2": {"category": "dog", "frames": ["00000", "00005"]},
        "7": {"category": "cat", "frames": ["00005", "00010"]},
    }
    root = write_youtube_vos(tmp_path / "YT", masks, {"v": objects}, split="valid")
    return root, write_results(tmp_path / "results", masks)


def check(results, root):
    """The problems of a folder, which must be those of its zip."""
    problems = check_submission(results, root)
    zip_path = results.parent / "plain.zip"
    with zipfile.ZipFile(zip_path, "w") as archive:
        for path in sorted(results.glob("**/*")):
            if path.is_file():
                archive.write(path, path.relative_to(results).as_posix())
    assert check_submission(zip_path, root) == problems
    return problems


def test_davis_zip(davis, tmp_path):
    root, results = davis
    (results / "global_results-val.csv").write_text("left out")
    (results / "a" / ".00001.png.7.tmp").write_text("left out")
    write_zip(results, tmp_path / "sub" / "out.zip")
    with zipfile.ZipFile(tmp_path / "sub" / "out.zip") as archive:
        assert archive.namelist() == [f"{s}/{i:05d}.png" for s in "ab" for i in range(3)]
        assert archive.read("a/00001.png") == (results / "a" / "00001.png").read_bytes()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["out.zip"]
    assert check_submission(tmp_path / "sub" / "out.zip", root) == []
    assert check_submission(results, root) == []


def test_youtube_vos_zip(youtube_vos, tmp_path):
    root, results = youtube_vos
    write_zip(results, tmp_path / "out.zip", layout="youtube_vos")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [f"Annotations/v/{i:05d}.png" for i in (0, 5, 10)]
    assert check_submission(tmp_path / "out.zip", root, "youtube_vos", "valid") == []
    assert check_submission(results, root, "youtube_vos", "valid") == []


def test_zip_bytes_depend_on_the_masks_alone(davis, tmp_path):
    _, results = davis
    write_zip(results, tmp_path / "one.zip")
    for path in reversed(sorted(results.glob("*/*.png"))):  # other times, other order
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        path.chmod(0o600)
    write_zip(results, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_zip_refuses_what_is_no_submission(davis, tmp_path):
    _, results = davis
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_zip(results / "nowhere", tmp_path / "out.zip")
    with pytest.raises(FileNotFoundError, match=r"\['c'\]"):
        write_zip(results, tmp_path / "out.zip", sequences=["a", "c"])
    with pytest.raises(ValueError, match="layout is 'zip'"):
        write_zip(results, tmp_path / "out.zip", layout="zip")
    assert not list(tmp_path.glob("*.zip"))


def test_other_files_than_masks_are_not_packed(davis, tmp_path, caplog):
    _, results = davis
    write_zip(results, tmp_path / "before.zip")
    (results / "a" / "Thumbs.db").write_text("")
    (results / "a" / "@eaDir").mkdir()
    (results / "a" / "@eaDir" / "00000.png").write_text("")
    write_zip(results, tmp_path / "after.zip")
    assert (tmp_path / "after.zip").read_bytes() == (tmp_path / "before.zip").read_bytes()
    assert "Thumbs.db: not packed" in caplog.text and "00000.png: not packed" in caplog.text


def test_missing_and_extra(davis):
    root, results = davis
    for path in (results / "b").iterdir():
        path.unlink()
    (results / "a" / "00002.png").rename(results / "a" / "00003.png")
    (results / "a" / "notes.txt").write_text("")
    (results / "c" / "d").mkdir(parents=True)
    Image.fromarray(label(1)).save(results / "c" / "00000.png")
    Image.fromarray(label(1)).save(results / "c" / "d" / "00000.png")
    assert check(results, root) == [
        "a/notes.txt: expected only .png files",
        "c/d/00000.png: expected only <sequence>/<frame>.png",
        "c: not a sequence of this split (1 files)",
        "a: extra frame 00003",
        "a: missing frame 00002",
        "b: missing",
    ]


def test_wrong_content(davis):
    root, results = davis
    Image.new("RGB", (12, 10)).save(results / "a" / "00000.png")
    Image.fromarray(label(1, 3)).save(results / "a" / "00001.png")
    Image.new("L", (10, 12)).save(results / "a" / "00002.png")
    Image.new("L", (12, 10)).save(results / "b" / "00000.png", format="JPEG")
    (results / "b" / "00001.png").write_bytes((results / "b" / "00002.png").read_bytes()[:50])
    Image.fromarray(label(2)).save(results / "b" / "00002.png")
    assert check(results, root) == [
        "a: pixels of type RGB, expected an 8-bit palette or grey PNG of ids (frame 00000)",
        "a: ids [3], expected only [1, 2] (frame 00001)",
        "a: size 12 x 10, expected 10 x 12 (frame 00002)",
        "b: a JPEG file, expected PNG (frame 00000)",
        "b: not a picture, or damaged (frame 00001)",
        "b: ids [2], expected only [1] (frame 00002)",
    ]


def test_the_same_problem_is_told_once(davis):
    root, results = davis
    for path in (results / "b").iterdir():
        Image.fromarray(label(4)).save(path)
    assert check(results, root) == ["b: ids [4], expected only [1] (3 frames, first 00000)"]


def test_wrong_folder_inside_the_archive(davis, youtube_vos, tmp_path):
    root, results = davis
    write_zip(results, tmp_path / "out.zip", layout="youtube_vos", sequences=["a", "b"])
    (problem,) = check_submission(tmp_path / "out.zip", root)
    assert problem.startswith("wrong folder") and "Annotations/a/00000.png" in problem

    root, results = youtube_vos
    write_zip(results, tmp_path / "out.zip", sequences=["v"])
    (problem,) = check_submission(tmp_path / "out.zip", root, "youtube_vos", "valid")
    assert problem.startswith("wrong folder") and "expected Annotations/<sequence>" in problem

    # The folder around the masks, in place of the masks' own.
    (tmp_path / "out").mkdir()
    results.rename(tmp_path / "out" / "Annotations")
    (problem,) = check_submission(tmp_path / "out", root, "youtube_vos", "valid")
    shape = "<sequence>/<frame>.png"
    assert problem == f"wrong folder: expected {shape}, found Annotations/v/00000.png"

    (tmp_path / "empty").mkdir()
    (problem,) = check_submission(tmp_path / "empty", root, "youtube_vos", "valid")
    assert problem.startswith("no mask of this split")


def test_damaged_and_repeated(davis, tmp_path):
    root, results = davis
    write_zip(results, tmp_path / "out.zip")
    with (
        zipfile.ZipFile(tmp_path / "out.zip", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("a/00000.png", (results / "a" / "00000.png").read_bytes())
    (problem,) = check_submission(tmp_path / "out.zip", root)
    assert problem == "a/00000.png is in the archive 2 times"
    with zipfile.ZipFile(tmp_path / "out.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/00000.png", bytes(1000))
    data = bytearray((tmp_path / "out.zip").read_bytes())
    data[30 + len("a/00000.png")] |= 6  # a kind of block that does not exist
    (tmp_path / "out.zip").write_bytes(data)
    problems = check_submission(tmp_path / "out.zip", root)
    assert "a: not a picture, or damaged (frame 00000)" in problems
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/00000.png", bytes(1000))
    lzma = bytearray((tmp_path / "lzma.zip").read_bytes())
    lzma[30 + len("a/00000.png") + 4] = 255  # its properties
    (tmp_path / "lzma.zip").write_bytes(lzma)
    problems = check_submission(tmp_path / "lzma.zip", root)
    assert "a: not a picture, or damaged (frame 00000)" in problems
    for start, signature in ((8, b"PK\x03\x04"), (10, b"PK\x01\x02")):
        at = data.index(signature) + start
        data[at : at + 2] = (9).to_bytes(2, "little")  # Deflate64
    (tmp_path / "out.zip").write_bytes(data)
    problems = check_submission(tmp_path / "out.zip", root)
    assert any("a method that Python cannot read" in problem for problem in problems)
    data[data.index(b"PK\x01\x02") + 6] = 99  # made for a version of zip to come
    (tmp_path / "out.zip").write_bytes(data)
    (problem,) = check_submission(tmp_path / "out.zip", root)
    assert "damaged: zip file version 9.9" in problem
    (tmp_path / "out.zip").write_bytes(b"no zip")
    (problem,) = check_submission(tmp_path / "out.zip", root)
    assert "not a zip" in problem


def test_a_changed_byte_of_a_mask_is_found(davis):
    """Decoders may take it for other pixels."""
    root, results = davis
    path = results / "a" / "00001.png"
    data = path.read_bytes()
    at = data.index(b"IDAT") + 4
    found = {}
    for i in range(at, data.index(b"IEND") + 4):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        found[i] = check_submission(results, root)
    assert len(found) > 20
    assert set(map(tuple, found.values())) == {("a: not a picture, or damaged (frame 00001)",)}
    path.write_bytes(data[:-1])
    assert check_submission(results, root) == ["a: not a picture, or damaged (frame 00001)"]


def test_what_cannot_be_read_is_no_problem_of_the_submission(davis, monkeypatch):
    root, results = davis

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match=r"a.0000\d\.png"):
        patch.setattr(Path, "read_bytes", refuse)
        check_submission(results, root)
    scan = os.scandir

    def scandir(path):
        return refuse(path) if Path(path) == results / "b" else scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="results/b"):
        check_submission(results, root)
    with pytest.raises(PermissionError, match="results/b"):
        write_zip(results, results.parent / "out.zip")


def test_files_elsewhere_are_counted(davis, tmp_path):
    """Those of a Mac's archives, say."""
    root, results = davis
    write_zip(results, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip", "a") as archive:
        for i in range(3):
            archive.writestr(f"__MACOSX/a/._{i:05d}.png", b"")
        archive.writestr("notes.txt", b"")
    shape = "expected only <sequence>/<frame>.png"
    assert check_submission(tmp_path / "out.zip", root) == [
        f"__MACOSX: 3 files, first __MACOSX/a/._00000.png: {shape}",
        f"notes.txt: {shape}",
    ]


def test_davis_2016_takes_any_value_for_its_object(tmp_path, write_davis, write_results):
    root = write_davis(tmp_path / "DAVIS", {"a": np.stack([label(255)] * 2)}, year=2016)
    results = write_results(tmp_path / "results", {"a": np.stack([label(1), label(255)])})
    assert check_submission(results, root, "davis2016", "val") == []
    Image.fromarray(label(1, 2)).save(results / "a" / "00001.png")
    (problem,) = check_submission(results, root, "davis2016", "val")
    assert problem == "a: 2 different ids, expected a single object (frame 00001)"


def test_script(davis, tmp_path, monkeypatch):
    root, results = davis
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, SCRIPT, "--dataset", "davis2017", "--root", *arguments],
            capture_output=True,
            text=True,
        )

    write_zip(results, tmp_path / "out.zip")
    accepted = run(root, tmp_path / "out.zip")
    assert accepted.returncode == 0, accepted.stderr
    assert "2 sequences, 6 masks, no problem" in accepted.stdout
    (results / "a" / "00001.png").unlink()
    rejected = run(root, results)
    assert rejected.returncode == 1
    assert f"{results}: 1 problem\n  a: missing frame 00001" in rejected.stdout
    other = run(root, results, "--dataset", "youtube_vos", "--resolution", "480p")
    assert other.returncode == 2 and "--resolution is for DAVIS" in other.stderr
    empty = run(root, results, "--sequences", "")
    assert empty.returncode == 2 and "--sequences names no sequence" in empty.stderr
    nothing = run(root, tmp_path / "nothing.zip")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith("error: ") and "Traceback" not in nothing.stderr


def test_zip_of_some_sequences(davis, tmp_path):
    root, results = davis
    write_zip(results, tmp_path / "out.zip", sequences=["b"])
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [f"b/{i:05d}.png" for i in range(3)]
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o644}
    assert check_submission(tmp_path / "out.zip", root, sequences=["b"]) == []


def test_another_resolution(davis):
    root, results = davis
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p").rename(root / kind / "240p")
    assert check_submission(results, root, resolution="240p") == []


def test_some_videos_of_youtube_vos(tmp_path, write_youtube_vos, write_results):
    masks = {name: {"00000": label(2), "00005": label(2)} for name in "vw"}
    objects = {"2": {"category": "dog", "frames": ["00000", "00005"]}}
    root = write_youtube_vos(tmp_path / "YT", masks, {n: objects for n in "vw"}, split="test")
    results = write_results(tmp_path / "results", {"w": masks["w"]})
    assert check_submission(results, root, "youtube_vos", "test") == ["v: missing"]
    assert check_submission(results, root, "youtube_vos", "test", sequences=["w"]) == []


def test_zips_of_other_tools(davis, tmp_path):
    """Folders have entries of their own there; some are encrypted."""
    root, results = davis
    write_zip(results, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip", "a") as archive:
        archive.mkdir("a")
        archive.mkdir("b")
    assert check_submission(tmp_path / "out.zip", root) == []
    data = bytearray((tmp_path / "out.zip").read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "out.zip").write_bytes(data)
    assert check_submission(tmp_path / "out.zip", root) == ["out.zip is encrypted"]


def test_pictures_of_one_bit_and_of_far_too_many_pixels(davis):
    root, results = davis
    Image.fromarray(label(1) > 0).save(results / "b" / "00001.png")
    assert Image.open(results / "b" / "00001.png").mode == "1"
    path = results / "b" / "00002.png"
    data = bytearray(path.read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    assert check(results, root) == [
        "b: pixels of type 1, expected an 8-bit palette or grey PNG of ids (frame 00001)",
        "b: a picture far too large (frame 00002)",
    ]
