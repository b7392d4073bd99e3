"""PyTorch's `.pth` files. The only module that imports torch (extra `convert`)."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cfbi_jax.files import replacing
from cfbi_jax.weights.checkpoint import first_line, not_written

_SCALAR = np.float64(0).__reduce__()[0]
# What trainers put beside the weights: the best score, as a number of NumPy, and the arguments.
_HARMLESS = [
    argparse.Namespace,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name before NumPy 2
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]


def _torch():
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            'reading and writing .pth files needs torch: pip install "cfbi_jax[convert]"'
        ) from error
    return torch


def read_pth(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict of a `.pth` as NumPy arrays, whatever lies around it.

    Reads the zip container and the one before PyTorch 1.6, CUDA storages, `{'state_dict': ...}`
    with an optimiser, a score or a command line's arguments beside it, or the bare state dict. Half
    precision becomes float32. Only tensors, numbers and plain containers are unpickled: a file that
    would run code raises ValueError, as does one that differs from its own checksums (which the
    older container has not).
    """
    torch = _torch()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weight file: {path}")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = _member_with_wrong_checksum(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}, which could run code" if found else "it is no .pth file"
        raise ValueError(
            f"{path} was refused: {what}; expected tensors, numbers and plain containers"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # torch's unpickler fails in many ways on bytes that are no pickle
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged or no .pth file: {reason}") from error
    if damaged:
        raise ValueError(
            f"{path} is damaged: the checksum of {damaged} in it is another one (or there is none: "
            "torch.serialization.set_crc32_options)"
        )
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        found = f"a {type(content).__name__}{' without weights' if state is not None else ''}"
        raise ValueError(f"{path} holds {found}; expected a state dict")
    strange = [key for key in state if not isinstance(key, str)]
    if strange:
        raise ValueError(f"{path}: expected names as keys of the state dict; found {strange[:5]}")
    wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(f"{path}: these entries of the state dict are no tensors: {wrong[:5]}")
    half = (torch.float16, torch.bfloat16)
    arrays = {}
    for key, value in state.items():
        try:
            arrays[key] = (value.float() if value.dtype in half else value).detach().numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised, 8 bits, without values
            raise ValueError(
                f"{path}: {key} is {value.dtype}, {value.layout}, on {value.device}; expected "
                "plain numbers"
            ) from error
    return arrays


def _member_with_wrong_checksum(path: Path) -> str | None:
    """The first damaged part of a zip container, which torch reads without a word."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def write_pth(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes `{'state_dict': ...}` as the official code reads it (under a temporary name first)."""
    torch = _torch()
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"state_dict": tensors}, file)
        except RuntimeError as error:  # torch's own, for a full disk
            raise not_written(Path(path), first_line(error)) from error
