"""Before the first import of JAX or of the package."""

import os
import tempfile

import pytest
from jaxtyping import install_import_hook

# Tests build the same small networks again and again: they share compiled programs, within a run.
# The process that starts the others (pytest-xdist) makes the folder and removes it.
EMITTERS = "xla_cpu_use_fusion_emitters"
_cache = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="cfbi_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # XLA's older code generator for CPUs needs half of the time where nothing is optimised.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{EMITTERS}=false".strip()

# Every annotated function of the package then checks the shapes of its arguments.
install_import_hook("cfbi_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request):
    """Most of the tests' time is compiling. Where golden numbers are met, XLA optimises in full,
    and what is compiled with `compiler_options` is what users have."""
    import jax

    from cfbi_jax import compilation

    golden = "golden" in request.module.__name__
    jax.config.update("jax_disable_most_optimizations", not golden)
    with pytest.MonkeyPatch.context() as patch:
        if golden:
            patch.setitem(compilation.CPU_OPTIONS, EMITTERS, True)
        yield


@pytest.fixture
def exact_products():
    """Layers that are tried alone multiply as in the network: on GPUs not in TF32."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


def pytest_unconfigure():
    if _cache is not None:
        _cache.cleanup()
