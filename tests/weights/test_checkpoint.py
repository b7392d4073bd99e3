"""Checkpoints: what is read back, and what is refused."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import SMALL, random_variables

import cfbi_jax
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import OFFICIAL_FORMAT, ImageFormat
from cfbi_jax.weights.checkpoint import digest


@pytest.fixture(scope="module")
def network():
    model = CFBI(**{**SMALL, "windows": (4, 2)}, instance_background=False)
    return model, random_variables(model, seed=3)


def test_round_trip(tmp_path, network):
    model, variables = network
    image_format = ImageFormat("bgr", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", model, variables, image_format)
    found = cfbi_jax.load_checkpoint(tmp_path / "ckpt")
    assert found.model == model
    assert found.image_format == image_format
    assert jax.tree.structure(found.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert digest(found.variables) == digest(variables)
    changed = jax.tree.map(lambda x: x, variables)
    changed["params"]["background_bias"] = np.float32(1e-9)
    assert digest(changed) != digest(variables)


def test_never_overwrites(tmp_path, network):
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(FileExistsError, match="ckpt"):
        cfbi_jax.save_checkpoint(tmp_path / "ckpt", *network, OFFICIAL_FORMAT)


def test_leftovers_go_although_threads_still_write(tmp_path, network, monkeypatch):
    """As Orbax' do, for a moment after the error: here, once, right after the first removal."""
    import orbax.checkpoint as ocp

    leftovers = tmp_path / "ckpt.orbax-checkpoint-tmp" / "variables"
    remove, removed = shutil.rmtree, []

    def write():
        leftovers.mkdir(parents=True)
        (leftovers / "late").touch()

    def fails(*_, **__):
        write()
        raise ValueError("OUT_OF_RANGE")

    def remove_and_write(folder, **options):
        remove(folder, **options)
        removed.append(folder)
        if len(removed) == 1:
            write()

    monkeypatch.setattr(ocp.Checkpointer, "save", fails)
    monkeypatch.setattr(shutil, "rmtree", remove_and_write)
    with pytest.raises(OSError, match="could not be written"):
        cfbi_jax.save_checkpoint(tmp_path / "ckpt", *network, OFFICIAL_FORMAT)
    assert len(removed) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax' threads
def test_a_full_disk(tmp_path, network, monkeypatch):
    """A limit on the size of files does what a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"ckpt: could not be written \(.* MiB free\)"):
            cfbi_jax.save_checkpoint(tmp_path / "ckpt", *network, OFFICIAL_FORMAT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []

    needed = sum(x.nbytes for x in jax.tree.leaves(network[1]))
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"ckpt: could not be written \(it has \d+ MiB; \d+ MiB free"):
        cfbi_jax.save_checkpoint(tmp_path / "new" / "ckpt", *network, OFFICIAL_FORMAT)
    usage.free += 1
    cfbi_jax.save_checkpoint(tmp_path / "new" / "ckpt", *network, OFFICIAL_FORMAT)


def test_a_folder_that_cannot_be_written_to(tmp_path, network):
    with pytest.raises(ValueError, match=r"run\[1\]/ckpt: checkpoints cannot be written below"):
        cfbi_jax.save_checkpoint(tmp_path / "run[1]" / "ckpt", *network, OFFICIAL_FORMAT)
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", *network, OFFICIAL_FORMAT)
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "ckpt").rename(tmp_path / "run[1]" / "ckpt")
    assert cfbi_jax.load_checkpoint(tmp_path / "run[1]" / "ckpt").model == network[0]


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        cfbi_jax.load_checkpoint(tmp_path / "none")
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.pth is a file.*convert_weights"):
        cfbi_jax.load_checkpoint(tmp_path / "x.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run" / "checkpoints" / "500").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run is no checkpoint.*\(or .*run/checkpoints/500\?\)"):
        cfbi_jax.load_checkpoint(tmp_path / "run")
    (tmp_path / "folder" / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"folder is no checkpoint.*weights\.bin"):
        cfbi_jax.load_checkpoint(tmp_path / "folder")


def test_another_architecture(tmp_path, network):
    """A checkpoint whose config names an architecture that its arrays are not of."""
    model, variables = network
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", model, variables, OFFICIAL_FORMAT)
    config_file = tmp_path / "ckpt" / "config" / "metadata"  # the name that Orbax gives it
    config = json.loads(config_file.read_text())
    config["model"] |= {"windows": [4], "resnet_blocks": [2, 1, 1, 1]}
    config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        cfbi_jax.load_checkpoint(tmp_path / "ckpt")
    assert "missing: params/deeplab/backbone/layer1_1/conv1/kernel (1, 1, 32, 8)" in str(
        error.value
    )
    with pytest.raises(ValueError, match="wrong shape|missing"):
        cfbi_jax.save_checkpoint(tmp_path / "new", CFBI(**SMALL), variables, OFFICIAL_FORMAT)
    config_file.write_text(config_file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"ckpt: damaged checkpoint, its config is no JSON"):
        cfbi_jax.load_checkpoint(tmp_path / "ckpt")
    config["model"] = {"head": "ensembler", "wings": 2}
    config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='unknown model field "wings"'):
        cfbi_jax.load_checkpoint(tmp_path / "ckpt")


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            {"background_bias": np.zeros(3, np.float32)},
            r"wrong shape: .*bias is \(3,\), expected \(\)",
        ),
        ({"unknown": np.zeros(3, np.float32)}, r"extra: params/unknown \(3,\)"),
        ({"background_bias": None}, r"missing: params/background_bias \(\)"),
    ],
)
def test_other_arrays_in_the_file(tmp_path, network, monkeypatch, arrays, message):
    model, variables = network
    params = {k: v for k, v in (variables["params"] | arrays).items() if v is not None}
    with monkeypatch.context() as unchecked:
        unchecked.setattr("cfbi_jax.weights.checkpoint.check_shapes", lambda *_: None)
        cfbi_jax.save_checkpoint(
            tmp_path / "ckpt", model, variables | {"params": params}, OFFICIAL_FORMAT
        )
    with pytest.raises(ValueError, match=rf"ckpt: the arrays are not .*1 problems.*\s+{message}"):
        cfbi_jax.load_checkpoint(tmp_path / "ckpt")


def test_damaged_arrays(tmp_path, network):
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", *network, OFFICIAL_FORMAT)
    files = [p for p in (tmp_path / "ckpt" / "variables").rglob("*") if p.is_file()]
    for path in files:
        if path.stat().st_size > 20_000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="ckpt: damaged checkpoint"):
        cfbi_jax.load_checkpoint(tmp_path / "ckpt")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, network, monkeypatch, error):
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", *network, OFFICIAL_FORMAT)

    def fails(*_):
        raise error

    monkeypatch.setattr("cfbi_jax.weights.checkpoint._read_variables", fails)
    with pytest.raises(type(error)):
        cfbi_jax.load_checkpoint(tmp_path / "ckpt")


ALONE = """
import sys
import jax
import numpy as np
from jax.experimental import multihost_utils

port, index, path = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from small import small_network
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.weights.checkpoint import digest, load_checkpoint, save_checkpoint

if index == "0":
    model, variables = small_network()
    save_checkpoint(path, model, variables, IMAGENET_FORMAT)
    assert digest(load_checkpoint(path).variables) == digest(variables)
assert multihost_utils.broadcast_one_to_all(np.float32(1 + int(index))) == 1
"""


def test_one_of_two_processes_alone(tmp_path):
    """While the other waits, as in an evaluation during training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, str(port), str(index), str(tmp_path / "ckpt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
