"""The same step on 1, 2 and 8 devices, and in two processes, on simulated devices.

Tolerances: sums over clips and devices in another order, in float32 (1e-7 of the largest term).
The parameters' is absolute: they are of order 1, and two updates of 0.05 x a gradient of norm
0.5 carry the gradient's relative error of 1e-5 at most.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small import random_variables
from tiny import tiny_model, tiny_parts

from cfbi_jax.models.images import OFFICIAL_FORMAT
from cfbi_jax.weights.checkpoint import save_checkpoint

TESTS = Path(__file__).parents[1]
# What Slurm tells the first task on a host.
SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "host", "SLURM_NTASKS": "2"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TIMEOUT = 300  # for machines that do much else; a process alone takes half a minute


def start(devices: int, *arguments, **environment) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, TESTS / "step_worker.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            **environment,
        },
    )


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.wait()


JOINED = """
import socket, time
from cfbi_jax.training.processes import join
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
join(f"localhost:{port},0,1")
print("joined", flush=True)
time.sleep(100)
"""


def test_sigterm_ends_a_process_that_joined_no_other():
    """JAX would catch it and tell nobody."""
    with subprocess.Popen(
        [sys.executable, "-c", JOINED],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
    ) as process:
        try:
            assert process.stdout.readline() == "joined\n"
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM
        finally:
            process.kill()


def results(path) -> dict[str, dict[str, np.ndarray]]:
    """Number of devices -> name -> array."""
    found = {}
    with np.load(path) as file:
        for key in file:
            devices, name = key.split("/")
            found.setdefault(devices, {})[name] = file[key]
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "results.npz"
    finish([start(8, path, 1, 2, 8)])
    return results(path)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [folder / f"{index}.npz" for index in range(2)]
    with tiny_parts():
        model = tiny_model(dropout=0.2)
        variables = random_variables(model, seed=0)
        for index, path in enumerate(paths):  # the second process finds something else
            other = jax.tree.map(lambda x, index=index: x + index, variables)
            save_checkpoint(f"{path}.checkpoint", model, other, OFFICIAL_FORMAT)
    environment = {"TWO_PROCESSES": "1", **SLURM}
    finish([start(1, path, port, index, **environment) for index, path in enumerate(paths)])
    return [results(path)["2"] for path in paths]


def assert_same(found, expected):
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-6)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-5)
    np.testing.assert_allclose(found["params"], expected["params"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("devices", ["2", "8"])
def test_number_of_devices_changes_nothing(one_process, devices):
    """Eight clips of 0 to 3 objects, so every device computes other rows."""
    expected = one_process["1"]
    assert expected["losses"].min() > 0.1 and expected["norms"].min() > 0.5  # it is clipped
    assert_same(one_process[devices], expected)
    rows = {name: tuple(result["rows"]) for name, result in one_process.items()}
    assert rows == {"1": (1, 24), "2": (2, 12), "8": (8, 4)}


def test_all_that_devices_exchange_is_a_sum(one_process):
    """Of the gradient, the loss and the counts of the IoU, once: float32, and a few scalars."""
    for devices in ("2", "8"):
        found = one_process[devices]
        assert found["collectives"].tolist() == ["all-reduce"]
        (exchanged,) = found["exchanged"]
        assert 0 <= exchanged - 4 * found["params"].size <= 4 * 3


def test_two_processes_are_as_two_devices(one_process, two_processes):
    """Each loads its half of the batch; they cannot know the other's rows and compute all. The
    weights that they start from are the first one's."""
    for result in two_processes:
        assert_same(result, one_process["2"])
        assert tuple(result["rows"]) == (2, 16)
    for name in ("losses", "norms", "params"):  # not a bit apart, or they would drift
        np.testing.assert_array_equal(two_processes[0][name], two_processes[1][name])
