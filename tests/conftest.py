"""Before the first import of JAX or of the package."""

import os
import tempfile

from jaxtyping import install_import_hook

# Tests build the same small networks again and again: they share compiled programs, within a run.
# The process that starts the others (pytest-xdist) makes the folder and removes it.
_cache = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="cfbi_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Every annotated function of the package then checks the shapes of its arguments.
install_import_hook("cfbi_jax", "beartype.beartype")


def pytest_unconfigure():
    if _cache is not None:
        _cache.cleanup()
