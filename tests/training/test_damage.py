"""A tiny run whose checkpoints are damaged, or do not fit on the disk."""

import logging
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from runs import assert_same_run, checkpoint_steps, error_of, run, unfinished

from cfbi_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick")


def cut_short(folder):
    data = [path for path in folder.rglob("d/*") if path.is_file()]
    path = max(data, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(folder):
    (folder / "training" / "manifest.ocdbt").unlink()


def garbage(folder):
    for path in folder.rglob("d/*"):
        if path.is_file():
            size = path.stat().st_size
            path.write_bytes(np.random.default_rng(0).bytes(size))


def no_folder(folder):
    shutil.rmtree(folder / "variables")


@pytest.mark.parametrize("damage", [cut_short, delete, garbage, no_folder])
def test_a_damaged_checkpoint_is_set_aside(config, whole, begun, caplog, damage):
    damage(begun / "checkpoints" / "6")
    with caplog.at_level(logging.INFO, "cfbi_jax"):
        run(config, begun)
    assert "checkpoint 6 is damaged" in caplog.text and "going on from step 4" in caplog.text
    assert (begun / "damaged" / "6").is_dir()
    assert checkpoint_steps(begun) == [2, 4, 6, 8]
    assert_same_run(begun, whole)


def test_nothing_but_damaged_checkpoints(config, begun, monkeypatch):
    for step in (2, 4, 6):
        delete(begun / "checkpoints" / str(step))
    text = error_of(config, begun, monkeypatch)
    assert "none of the checkpoints [6, 4, 2] can be read" in text
    assert "none of the checkpoints [6, 4, 2] can be read" in error_of(config, begun, monkeypatch)


def test_a_full_disk(config, whole, tmp_path, monkeypatch):
    """A limit on the size of files does to the second checkpoint what a full disk does."""
    out = tmp_path / "out"
    save = Checkpoints.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, state):
        small = 50_000 if int(state.step) >= 4 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
        save(self, state)
        self._manager.wait_until_finished() if small == limits[0] else None

    monkeypatch.setattr(Checkpoints, "save", limited)
    try:
        text = error_of(config, out, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out / 'checkpoints'}: a checkpoint could not be written" in text
    assert "the one of step 2 is whole" in text
    assert checkpoint_steps(out) == [2]

    monkeypatch.setattr(Checkpoints, "save", save)
    run(config, out)
    assert_same_run(out, whole)
    assert not unfinished(out)


def test_no_room_is_known_before_the_first_step(config, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9, free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = error_of(config, tmp_path / "out", monkeypatch)
    assert "0 MiB free; expected" in text and str(tmp_path / "out" / "checkpoints") in text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["run[1]", "a[b/out"])
def test_a_folder_that_checkpoints_cannot_be_written_to(config, tmp_path, monkeypatch, name):
    text = error_of(config, tmp_path / name, monkeypatch)
    assert f"{name}: checkpoints cannot be written below a folder with [" in text
    assert list(tmp_path.iterdir()) == []
