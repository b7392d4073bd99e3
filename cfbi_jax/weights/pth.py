"""PyTorch's `.pth` files. The only module that imports torch (extra `convert`)."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cfbi_jax.data.image_files import replacing


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
    with an optimiser beside it, or the bare state dict. Only tensors and plain containers are
    unpickled: a file that would run code raises ValueError.
    """
    torch = _torch()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weight file: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it holds more than tensors and would run code on loading, or is "
            f"no .pth file. {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # torch's unpickler fails in many ways on bytes that are no pickle
        raise ValueError(f"{path} is damaged or no .pth file: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict")
    strange = [key for key in state if not isinstance(key, str)]
    if strange:
        raise ValueError(f"{path}: expected names as keys of the state dict; found {strange[:5]}")
    wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(f"{path}: these entries of the state dict are no tensors: {wrong[:5]}")
    half = [key for key, value in state.items() if value.dtype == torch.bfloat16]
    if half:
        raise ValueError(f"{path}: bfloat16 tensors, expected float32: {half[:5]}")
    return {key: value.detach().numpy() for key, value in state.items()}


def write_pth(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes `{'state_dict': ...}` as the official code reads it (under a temporary name first)."""
    torch = _torch()
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"state_dict": tensors}, file)
