"""Before the first import of JAX or of the package."""

import os
import tempfile

import pytest
from jaxtyping import install_import_hook

# Tests build the same small networks again and again: they share compiled programs, within a run.
_CACHE = tempfile.TemporaryDirectory(prefix="cfbi_jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Every annotated function of the package then checks the shapes of its arguments.
install_import_hook("cfbi_jax", "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _remove_cache():
    yield
    _CACHE.cleanup()
