"""Shapes annotated in the package are checked in every test, and shared fixtures."""

from jaxtyping import install_import_hook

# Before the first import of the package: every annotated function then checks its arguments.
install_import_hook("cfbi_jax", "beartype.beartype")
