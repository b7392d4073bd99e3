"""Where compiled programs are kept, and the options that programs of the network take."""

import subprocess
import sys

import jax
import jax.numpy as jnp

from cfbi_jax.compilation import compiler_options

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
