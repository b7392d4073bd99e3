"""Where compiled programs are kept, and the options that programs of the network take."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh
from small import mask_of, random_video, small_network
from tiny import batch_of, random_clips

from cfbi_jax import compilation
from cfbi_jax.compilation import compiler_options, use_compilation_cache
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.programs import Programs
from cfbi_jax.inference.state import state_shapes
from cfbi_jax.memory import Chunks
from cfbi_jax.models import matching_global, matching_kernel
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training.schedule import optimizer
from cfbi_jax.training.step import StepOptions, create_state, make_train_step
from cfbi_jax.weights.checkpoint import save_checkpoint

TWICE = """
import sys, os, jax, jax.numpy as jnp
from cfbi_jax.compilation import use_compilation_cache
print(use_compilation_cache(sys.argv[1]))
for n in (3, 4):
    jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((n, n))).block_until_ready()
print(len([name for name in os.listdir(sys.argv[1]) if name.endswith("-cache")]))
"""


def test_every_program_is_kept(tmp_path, monkeypatch):
    """However quickly it was compiled; a second run adds none."""
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    command = [sys.executable, "-c", TWICE, str(tmp_path / "cache")]
    first, second = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        for _ in range(2)
    )
    assert first == second
    assert first[0] == str(tmp_path / "cache") and int(first[1]) >= 2


VIDEO = """
import sys
import jax, numpy as np
import cfbi_jax

compiled = 0
def listen(event, **_):
    global compiled
    compiled += event.endswith("compile_requests_use_cache") - event.endswith("cache_hits")
jax.monitoring.register_event_listener(listen)
checkpoint, video, cache = sys.argv[1:]
segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(checkpoint, compilation_cache=cache)
given = np.load(video)
for _ in segmenter.segment(given["frames"], {0: given["mask"], 2: given["mask"]}):
    pass
print(compiled)
"""


def test_a_second_run_of_a_video_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    save_checkpoint(tmp_path / "checkpoint", *small_network(), IMAGENET_FORMAT)
    mask = mask_of({1: (2, 2, 20, 20), 2: (22, 22, 40, 40)})
    np.savez(tmp_path / "video.npz", frames=random_video(4), mask=mask)
    names = (str(tmp_path / name) for name in ("checkpoint", "video.npz", "cache"))
    command = [sys.executable, "-c", VIDEO, *names]
    first, second = (
        int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert first >= 4 and second == 0  # embedding, two predictions, resizing labels, ...


KEPT = """
import ctypes, mmap
import jax
from cfbi_jax.compilation import COMPILED, return_memory_after_compiling

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE / 2**20

return_memory_after_compiling()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [c.malloc(100_000) for _ in range(4000)]  # 381 MiB
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last one keeps all before it
    c.free(block)
sizes = [resident()]
for seconds in (0.01, 2.0):
    jax.monitoring.record_event_duration_secs(COMPILED, seconds)
    sizes.append(resident())
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: events.append(event))
events = []
jax.jit(lambda x: x + 1)(0)
print(*sizes, events.count(COMPILED))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide themselves")
def test_memory_is_returned_after_compiling():
    """Freed blocks below one that is in use stay with the process until a large program, and not a
    small one, has been compiled; and JAX still calls that by the name that is listened to."""
    done = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True)
    freed, after_small, after_large, heard = map(float, done.stdout.split())
    assert freed > 380 and after_small > freed - 30 and after_large < freed - 350
    assert heard == 1


def test_barriers_last_on_cpus():
    """Without the option a chain of sums is fused into every later one, in one computation."""
    products = jnp.ones((4, 8, 8))

    def chain(x):
        for matrix in products:
            x = jax.lax.optimization_barrier(x + x @ matrix)
        return x

    def barriers(options):
        compiled = jax.jit(chain, compiler_options=options).lower(jnp.ones((8, 8))).compile()
        return compiled.as_text().count("opt-barrier(")

    assert barriers(None) == 0 and barriers(compiler_options()) == 4


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What depends on the kind of device is chosen as for GPUs; matching as for those that the
    kernel is not for."""
    monkeypatch.setattr(compilation, "default_device", lambda: SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(matching_global, "blocks_here", lambda *_: None)


def check_for_gpus(jitted, *arguments, **static):
    """That it can be handed to a GPU's compiler: no operation is known to CPUs alone, no product is
    in TF32, which is what none but the highest precision means there, and no sum in half precision,
    in which GPUs would add."""
    lowered = jitted.trace(*arguments, **static).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "custom_call" not in text
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > 10
    assert not [line for line in products if "HIGHEST" not in line]
    sums = re.findall(r"stablehlo\.reduce\(.*applies stablehlo\.add.*", text)
    assert sums and not [line for line in sums if re.search("tensor<b?f16>", line)]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_video_is_ready_for_gpus(on_a_gpu, dtype):
    size = (40, 56)
    options = Options(compute_dtype=dtype, matching_dtype=dtype)
    programs = Programs(*small_network(), IMAGENET_FORMAT, options)
    views = programs.views_of(size)
    frame, label, count = (jnp.zeros(s, np.uint8) for s in ((*size, 3), size, ()))
    features = check_for_gpus(programs.embed, programs.variables, frame, views=views)
    rows, probabilities = check_for_gpus(
        *(programs.predict, programs.variables, state_shapes(features, 1), features, label),
        count.astype(np.int32),
        views=views,
        num_rows=3,
        with_probabilities=True,
        chunks=Chunks(),
    )
    assert rows.shape == size and probabilities.shape == (3, *size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernel_of_global_matching_is_ready_for_gpus(on_a_gpu, monkeypatch, dtype):
    """It becomes one program of Triton, as long for many rows as for few, and the gradient needs no
    other product."""
    blocks = matching_kernel.blocks_for(dtype, 100, 227)
    monkeypatch.setattr(matching_global, "blocks_here", lambda *_: blocks)
    shape = jax.ShapeDtypeStruct
    arrays = shape((300, 100), dtype), shape((700, 100), dtype), shape((700,), np.uint8)

    def lowered(num_rows):
        def gradients(query, reference, label):
            def total(query, reference):
                nearest = matching_global.nearest_squared_distance
                return nearest(query, reference, label, num_rows).sum()

            return jax.grad(total, (0, 1))(query, reference)

        device = AbstractDevice("NVIDIA H200", 132, "gpu")  # newer versions of JAX have to know it
        with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            return jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",))

    few, many = lowered(3), lowered(200)
    assert [x.shape for x in few.out_info] == [(300, 100), (700, 100)]
    few, many = few.as_text(), many.as_text()
    for text in (few, many):
        assert re.findall(r"custom_call @(\S+?)\(", text) == ["__gpu$xla.gpu.triton"]
        assert "stablehlo.dot_general" not in text
    assert len(many) < 1.1 * len(few)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_training_step_is_ready_for_gpus(on_a_gpu, dtype):
    model, variables = small_network()
    tx = optimizer(lambda step: 0.1, 1e-4, 0.9, 5.0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    options = StepOptions(2, sequential_step=1, mining_step=2, remat="all")
    step = make_train_step(model.clone(compute_dtype=dtype), IMAGENET_FORMAT, tx, options, mesh)
    batch = batch_of(random_clips([1, 2], num_frames=3, seed=0), 2)
    state = jax.eval_shape(lambda: create_state(variables, tx, 0, True))
    check_for_gpus(step, state, batch)


FOLDERS = """
import sys, os, jax, jax.numpy as jnp
from cfbi_jax.compilation import use_compilation_cache
for n, folder in enumerate(sys.argv[1:], 3):
    use_compilation_cache(folder)
    jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((n, n))).block_until_ready()
    folders = [name for name in sys.argv[1:] if name]
    print([len(os.listdir(name)) if os.path.exists(name) else 0 for name in folders], flush=True)
"""


SETTINGS = """
import jax
from cfbi_jax.compilation import use_compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
folder = use_compilation_cache()
print(folder, use_compilation_cache(None), jax.config.jax_enable_compilation_cache)
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"JAX_COMPILATION_CACHE_DIR": "/given"}, "/given None True"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None None False"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/cfbi_jax None True"),
        ({"HOME": "/home"}, "/home/.cache/cfbi_jax None True"),
    ],
)
def test_the_default_is_what_the_process_has(environment, expected, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", SETTINGS]
    environment = os.environ | environment
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert lines.stdout.splitlines() == [expected, "5.0"]


def test_a_user_without_a_home_keeps_no_programs(monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert use_compilation_cache() is None
    finally:
        use_compilation_cache(before)
    assert "not kept for later runs: no folder for caches: Could not determine home" in caplog.text


def test_the_cache_moves_and_turns_off(tmp_path, monkeypatch):
    """Within a process; nothing goes to a folder that is no longer used."""
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    folders = ["", str(tmp_path / "a"), "", str(tmp_path / "b")]
    command = [sys.executable, "-c", FOLDERS, *folders]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    off, first, off_again, second = (json.loads(line) for line in lines[:4])
    assert off == [0, 0] and first[0] > 0 and off_again == first
    assert second[0] == first[0] and second[1] > 0
