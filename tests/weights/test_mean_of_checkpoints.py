"""scripts/mean_of_checkpoints.py."""

import jax
import numpy as np
import pytest
from from_scripts import load_script
from small import random_variables, small_network

from cfbi_jax.models.images import IMAGENET_FORMAT, OFFICIAL_FORMAT
from cfbi_jax.weights.checkpoint import load_checkpoint, save_checkpoint

MODEL = small_network()[0]


@pytest.fixture(scope="module")
def script():
    return load_script("mean_of_checkpoints")


def run(script, *arguments):
    script.main(script.parse_arguments([str(argument) for argument in arguments]))


def test_mean(script, tmp_path, capsys):
    networks = [random_variables(MODEL, seed) for seed in range(3)]
    paths = [tmp_path / str(seed) for seed in range(3)]
    for path, variables in zip(paths, networks, strict=True):
        save_checkpoint(path, MODEL, variables, OFFICIAL_FORMAT)
    run(script, *paths, "--output", tmp_path / "mean")
    found = load_checkpoint(tmp_path / "mean")
    assert (found.model, found.image_format) == (MODEL, OFFICIAL_FORMAT)
    jax.tree.map(
        lambda mean, *each: np.testing.assert_allclose(
            mean, np.mean(each, axis=0, dtype=np.float64), rtol=1e-6, atol=1e-7
        ),
        found.variables,
        *networks,
    )
    assert f"wrote {tmp_path / 'mean'}" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="mean exists; choose another --output"):
        run(script, *paths, "--output", tmp_path / "mean")


def test_other_networks(script, tmp_path):
    one, wider, other_format = (tmp_path / name for name in ("one", "wider", "other"))
    save_checkpoint(one, MODEL, random_variables(MODEL, 0), IMAGENET_FORMAT)
    wide = MODEL.clone(ensembler_dim=2 * MODEL.ensembler_dim)
    save_checkpoint(wider, wide, random_variables(wide, 0), IMAGENET_FORMAT)
    save_checkpoint(other_format, MODEL, random_variables(MODEL, 0), OFFICIAL_FORMAT)
    out = tmp_path / "out"
    dim = MODEL.ensembler_dim
    with pytest.raises(ValueError, match=f"one and .*wider .*: ensembler_dim: {dim} and {2 * dim}"):
        run(script, one, wider, "--output", out)
    with pytest.raises(ValueError, match="one and .*other are other networks: .*'rgb' and 'bgr'"):
        run(script, one, one, other_format, "--output", out)
    with pytest.raises(ValueError, match="1 checkpoint; expected two or more"):
        run(script, one, "--output", out)
    assert not out.exists()
