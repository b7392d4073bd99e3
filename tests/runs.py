"""A tiny run: its configuration and what the command says of it."""

from types import SimpleNamespace

import pytest
from tiny_run import get_config

from cfbi_jax import main


def tiny(weights):
    config = get_config()
    config.init_from = str(weights)
    return config


def error_of(config, out, monkeypatch) -> str:
    """What the command, in this process, says as it exits with status 1."""
    monkeypatch.setattr(main, "_log_to_screen", lambda: None)
    for flag, value in (("CONFIG", config), ("WORKDIR", str(out)), ("DISTRIBUTED", "")):
        monkeypatch.setattr(main, flag, SimpleNamespace(value=value))
    with pytest.raises(SystemExit) as stopped:
        main.main([])
    assert isinstance(stopped.value.code, str), "a text is printed, and the status is 1"
    assert stopped.value.code.startswith("error: ")
    return stopped.value.code
