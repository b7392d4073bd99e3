"""Paths from a command line, the folder of caches, output folders."""

import argparse
from pathlib import Path

import pytest

from cfbi_jax import files


def test_paths_of_a_command_line(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/someone")
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=files.path_of)

    def found(text):
        return parser.parse_args([f"--output={text}"]).output

    assert found("~/out") == Path("/home/someone/out") and found("out") == Path("out")
    assert found("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    with pytest.raises(SystemExit):
        found("")
    assert "argument --output: expected a path, found nothing" in capsys.readouterr().err


def test_the_folder_of_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert files.cache_folder() == Path("/caches/cfbi_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert files.cache_folder() == Path("/home/someone/.cache/cfbi_jax")

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ValueError, match=r"Could not determine home directory\. Set XDG_CACHE"):
        files.cache_folder()


def test_output_folder_is_made_and_left_empty(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match="cannot write to the output folder") as caught:
            files.check_writable(folder)
        assert str(folder) in str(caught.value)
