"""Experiments: one file each, `get_config()`; every field can be set on the command line."""
