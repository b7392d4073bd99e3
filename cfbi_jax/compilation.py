"""JAX's settings: where compiled programs are kept, and what the network is computed with."""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from cfbi_jax.files import cache_folder

LOGGER = logging.getLogger(__name__)

DEFAULT = "default"
# JAX's own: it keeps what took longer to compile.
MIN_COMPILE_SECONDS = 1.0
# What JAX says when XLA has compiled a program, and for how long, from when on it is a large one.
COMPILED = "/jax/core/compile/backend_compile_duration"
LARGE_SECONDS = 0.1
# XLA's CPU backend removes optimisation barriers before it fuses operations, so that chains of them
# are computed once more in every consumer: this pass does it, and is left out.
CPU_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def use_compilation_cache(path: Path | str | None = DEFAULT) -> Path | None:
    """Turns JAX's persistent compilation cache on at `path`, or off (""), for the whole process,
    as JAX has one; says where it is. None changes nothing.

    "default" is what the process has already, a folder (`JAX_COMPILATION_CACHE_DIR`, say) or none
    at all (`JAX_ENABLE_COMPILATION_CACHE=false`), else `$XDG_CACHE_HOME/cfbi_jax`
    (`~/.cache/cfbi_jax`). Programs are kept however quickly they were compiled, unless the process
    has other limits than JAX's.
    """
    if path is None:
        return None
    compilation_cache.reset_cache()  # else JAX stays with the folder that it first compiled for
    if path == DEFAULT:
        path = _default_folder() if jax.config.jax_enable_compilation_cache else ""
    jax.config.update("jax_enable_compilation_cache", bool(path))
    if not path:
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    if jax.config.jax_persistent_cache_min_compile_time_secs == MIN_COMPILE_SECONDS:
        # All of them: a second run of the same sizes compiles nothing.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(path)


def _default_folder() -> Path | str:
    if given := jax.config.jax_compilation_cache_dir:
        return given
    try:
        return cache_folder()
    except ValueError as error:
        LOGGER.warning("compiled programs are not kept for later runs: %s", error)
        return ""


@functools.cache
def return_memory_after_compiling() -> None:
    """From now on, what compiling a large program took goes back to the system before the program
    runs. The C library would keep it for what this process may need later: hundreds of MiB.

    Nothing changes where the C library cannot do that (others than glibc).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds >= LARGE_SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


@contextlib.contextmanager
def own_settings(device: jax.Device | None = None) -> Iterator[None]:
    """JAX's settings as everything here was tried with, whatever the program around it has set:
    float32, NumPy's promotions, no mesh. Also a decorator: `@own_settings()`.

    `device` becomes the default one: what is traced is for it (`on_cpu`).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.transfer_guard("allow"))
        stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        if device is not None:
            stack.enter_context(jax.default_device(device))
        yield


def default_device() -> jax.Device:
    """Where the network goes: `jax.default_device`, if set, else the first of this process."""
    given = jax.config.jax_default_device
    if isinstance(given, str):  # a platform
        return jax.local_devices(backend=given)[0]
    return given or jax.local_devices()[0]


def on_cpu() -> bool:
    """Whether the network goes to a CPU. Asked when it is traced."""
    return default_device().platform == "cpu"


def compiler_options() -> dict[str, str | bool] | None:
    """Options of `jax.jit` for everything that runs the network."""
    return dict(CPU_OPTIONS) if on_cpu() else None
