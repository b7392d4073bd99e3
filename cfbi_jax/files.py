"""Files and folders of any kind: paths from a command line, outputs that appear complete."""

import argparse
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path


class BadFile(ValueError):
    """A file, or an array in its place, that is not what it should be; the message names it."""


def path_of(text: str) -> Path:
    """A path as it is written on a command line, for argparse: shells leave the ~ of
    `--output=~/OUT`.

    Errors: ArgumentTypeError for no text, which would be the current folder: a shell's variable not
    set.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(os.path.expanduser(text))


def name_of(text: str) -> str:
    """A name as it is written on a command line, for argparse.

    Errors: ArgumentTypeError for no text, which is not to stand for a default.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a name, found nothing")
    return text


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cfbi_jax`, or `~/.cache/cfbi_jax`.

    Errors: ValueError for a user without a home.
    """
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "cfbi_jax"
    try:
        return Path.home() / ".cache" / "cfbi_jax"
    except RuntimeError as error:
        raise ValueError(f"no folder for caches: {error} Set XDG_CACHE_HOME.") from error


def write_file(path: Path | str, data: bytes) -> None:
    """Writes a file (and its folder); it appears complete or not at all, even if we are killed."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields where to write what will be the file at `path` when all is written; makes its
    folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique among threads and processes; hidden and without the suffix, so that no one reads it; no
    # longer than names may be.
    start = path.name.encode()[:100].decode(errors="ignore")
    temporary = path.with_name(f".{start}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path | str) -> None:
    """Makes an output folder if need be and tries to write there, before any long work.

    Errors: OSError that names the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writable-", dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        message = f"cannot write to the output folder: {reason}"
        raise OSError(error.errno, message, str(folder)) from error
