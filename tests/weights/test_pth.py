"""`.pth` files of every kind that is around. Needs torch: pip install "cfbi_jax[convert]"."""

import argparse
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import recipe

from cfbi_jax.weights.official import convert_state_dict
from cfbi_jax.weights.pth import read_pth, write_pth

torch = pytest.importorskip("torch", reason="needs the extra [convert]")

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "convert_weights.py"


@pytest.fixture(scope="module")
def tensors():
    state = recipe.recipe_state_dict("mbv2_cfbi")
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def assert_is_recipe(state):
    expected = recipe.recipe_state_dict("mbv2_cfbi")
    assert {k.removeprefix("module.") for k in state} == set(expected)
    for key, value in state.items():
        np.testing.assert_array_equal(value, expected[key.removeprefix("module.")])


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("wrapping", ["bare", "wrapped", "with_optimizer"])
def test_containers(tmp_path, tensors, container, wrapping):
    content = {f"module.{k}": v for k, v in tensors.items()}
    if wrapping != "bare":
        content = {"state_dict": content}
    if wrapping == "with_optimizer":
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        weight.grad = torch.ones(3)
        optimizer.step()
        content |= {"optimizer": optimizer.state_dict(), "epoch": 5}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    assert_is_recipe(read_pth(path))


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_what_trainers_put_beside_the_weights(tmp_path, container):
    """The best score is a number of NumPy, the arguments are those of a command line."""
    content = {
        "epoch": 50,
        "state_dict": {"a": torch.arange(3.0)},
        "best_pred": np.float64(0.78),
        "step": np.int64(3),
        "args": argparse.Namespace(lr=0.1, backbone="resnet"),
    }
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    np.testing.assert_array_equal(read_pth(path)["a"], [0, 1, 2])
    if container == "legacy":  # as NumPy 1 named it
        data = path.read_bytes()
        assert b"numpy._core.multiarray" in data
        path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        np.testing.assert_array_equal(read_pth(path)["a"], [0, 1, 2])


def test_half_precision(tmp_path):
    halves = torch.tensor([1 / 3, 1e-7, 65504.0])
    state = {"a": halves.half(), "b": halves.bfloat16()}
    torch.save(state, tmp_path / "x.pth")
    found = read_pth(tmp_path / "x.pth")
    for key, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[key].double().numpy())


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_storages_saved_on_a_gpu(tmp_path, monkeypatch, container):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = tmp_path / "x.pth"
    zipped = container == "zip"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA"):  # the file really says so
        torch.load(path, weights_only=True)
    np.testing.assert_array_equal(read_pth(path)["a"], [0, 1, 2])


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.marker),)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_file_that_would_run_code_is_refused(tmp_path, container):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    zipped = container == "zip"
    torch.save({"state_dict": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth was refused: it holds \S+, which could run"):
        read_pth(path)
    assert not marker.exists()


def test_bad_files(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_pth(tmp_path / "none.pth")
    path = tmp_path / "x.pth"
    path.write_bytes(b"this is no pickle at all")
    with pytest.raises(ValueError, match=r"x\.pth"):
        read_pth(path)
    torch.save({"state_dict": tensors}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"x\.pth"):
        read_pth(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_pth(path)
    torch.save({"state_dict": {1: torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match=r"expected names as keys .*\[1\]"):
        read_pth(path)
    torch.save({"state_dict": {"a": 3}}, path)
    with pytest.raises(ValueError, match="no tensors: .*'a'"):
        read_pth(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="holds a dict without weights"):
        read_pth(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no \.pth file: \S"):
        read_pth(path)
    torch.save({"a": torch.eye(3).to_sparse(), "b": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"x\.pth: a is torch.float32, torch.sparse_coo"):
        read_pth(path)


def test_a_changed_byte_is_found(tmp_path):
    """torch reads it without a word."""
    path = tmp_path / "x.pth"
    value = torch.full((8,), 0.0789)
    torch.save({"a": value}, path)
    data = path.read_bytes()
    at = data.index(value.numpy().tobytes())
    path.write_bytes(data[: at + 3] + bytes([data[at + 3] ^ 4]) + data[at + 4 :])
    assert torch.load(path)["a"][0] != value[0]
    with pytest.raises(ValueError, match=r"x\.pth is damaged: the checksum of \S+/data/0 in it"):
        read_pth(path)


def test_script_converts_and_exports(tmp_path, tensors):
    def run(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    source = tmp_path / "official.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, source)
    first = run("--input", source, "--output", tmp_path / "ckpt")
    assert first.returncode == 0, first.stderr
    assert "mobilenet_v2" in first.stdout
    back = run("--export", "--input", tmp_path / "ckpt", "--output", tmp_path / "new" / "back.pth")
    assert back.returncode == 0, back.stderr
    loaded = torch.load(tmp_path / "new" / "back.pth", weights_only=True)["state_dict"]
    assert_is_recipe({key: value.numpy() for key, value in loaded.items()})

    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in ("ckpt", "link"):
        again = run("--input", source, "--output", tmp_path / output)
        assert again.returncode == 1
        assert again.stderr.startswith("error: ") and "exists" in again.stderr

    key = "feature_extracter.decoder.conv1.weight"
    torch.save(tensors | {key: tensors[key] / 0}, source)
    endless = run("--input", source, "--output", tmp_path / "endless")
    assert endless.returncode == 1 and not (tmp_path / "endless").exists()
    assert f"{source}: 1 arrays hold NaN or infinity, the first: params/deeplab" in endless.stderr
    torch.save({key: value for key, value in tensors.items() if key != "bg_bias"}, source)
    lacking = run("--input", source, "--output", tmp_path / "lacking")
    assert lacking.stderr.startswith(f"error: {source}: the weights do not fit (1 problems)")


def test_write_keeps_nothing_half_done(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pth(tmp_path / "x.pth", {"a": np.zeros(3, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path):
    """A limit on the size of files does what a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.pth: could not be written \(.* MiB free\)"):
            write_pth(tmp_path / "x.pth", {"a": np.zeros(3000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_read_and_convert(tmp_path, tensors):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": tensors}, path)
    model, variables = convert_state_dict(read_pth(path))
    expected = recipe.recipe_state_dict("mbv2_cfbi")["bg_bias"].item()
    assert model.backbone == "mobilenet_v2"
    assert variables["params"]["background_bias"] == np.float32(expected)


def test_what_is_written_can_be_read_by_others(tmp_path, tensors):
    write_pth(tmp_path / "a.pth", {key: value.numpy() for key, value in tensors.items()})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "plain"]
