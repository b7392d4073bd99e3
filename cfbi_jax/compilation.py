"""Where XLA keeps compiled programs between runs."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

DEFAULT = "default"


def use_compilation_cache(path: str | None = DEFAULT) -> Path | None:
    """Turns the persistent compilation cache on at `path`, or off (None or ""); says where it is.

    "default" is the folder that JAX was already given (`JAX_COMPILATION_CACHE_DIR`, say), else
    `$XDG_CACHE_HOME/cfbi_jax` (`~/.cache/cfbi_jax`).
    """
    compilation_cache.reset_cache()  # else JAX stays with the folder that it first compiled for
    if not path:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if path == DEFAULT:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = jax.config.jax_compilation_cache_dir or Path(home) / "cfbi_jax"
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # All of them: a second run of the same sizes compiles nothing.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(path)


def compiler_options() -> dict[str, str] | None:
    """Options of `jax.jit` for everything that runs the network.

    XLA's CPU backend removes optimisation barriers before it fuses operations, so that chains of
    them are computed once more in every consumer: this pass does it, and is left out.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}
