"""Matching written plainly, in JAX and in torch: what the package's own has to beat.

As the authors' code does it: global matching computes the distances of a part of the queries to all
reference pixels and then, per object, a copy in which all other pixels are far away; local matching
computes the distance at every offset of the largest window and masks it per object and window.
The torch versions take and return NumPy arrays or tensors of one video, `[h, w, ...]`.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from cfbi_jax.models.resizing import resize, resize_labels

FAR = 5e4
NOBODY = 255
CHUNKS = 4  # per reference frame


def import_torch() -> ModuleType | None:
    try:
        import torch
    except ImportError:
        return None
    return torch


def torch_device() -> str:
    """Where torch computes what JAX does. Errors: ValueError where JAX has a GPU, and torch not."""
    if jax.default_backend() != "gpu":
        return "cpu"
    if not import_torch().cuda.is_available():
        raise ValueError("--torch: JAX has a GPU and torch has none; expected --no-torch")
    return "cuda"


# ------------------------------------------------------------------------------------------- JAX


def global_matching(
    query: Float[Array, "h w c"],
    reference: Float[Array, "r h w c"],
    label: UInt8[Array, "r h w"],
    bias: Float[Array, " rows"],
) -> Float[Array, "h w rows"]:
    height, width, channels = query.shape
    pixels, label = reference.reshape(-1, channels), label.reshape(-1)
    pixel_norm = jnp.sum(jnp.square(pixels), axis=-1)
    chunks = CHUNKS * reference.shape[0]
    queries = query.reshape(-1, channels)
    queries = jnp.pad(queries, ((0, -len(queries) % chunks), (0, 0)))

    def one_chunk(query):
        norm = jnp.sum(jnp.square(query), axis=-1)
        distances = norm[:, None] + pixel_norm - 2 * query @ pixels.T
        nearest = [
            jnp.min(jnp.where(label == row, distances, FAR), axis=-1) for row in range(len(bias))
        ]
        return jnp.stack(nearest, axis=-1)

    squared = jax.lax.map(one_chunk, queries.reshape(chunks, -1, channels))
    squared = squared.reshape(-1, len(bias))[: height * width].reshape(height, width, -1)
    return 2 * (jax.nn.sigmoid(squared.astype(jnp.float32) + bias) - 0.5)


def local_matching(
    query: Float[Array, "h w c"],
    previous: Float[Array, "h w c"],
    label: UInt8[Array, "h w"],
    bias: Float[Array, " rows"],
    windows: tuple[int, ...],
    downsample: bool,
    dtype: str,
) -> Float[Array, "h w rows windows"]:
    full = query.shape[:2]
    height, width = (full[0] // 2 + 1, full[1] // 2 + 1) if downsample else full
    query = resize(query[None], (height, width))[0].astype(dtype)
    previous = resize(previous[None], (height, width))[0].astype(dtype)
    reach = max(windows)
    margin = ((reach, reach), (reach, reach))
    previous = jnp.pad(previous, (*margin, (0, 0)))
    label = jnp.pad(resize_labels(label, (height, width)), margin, constant_values=NOBODY)
    steps = jnp.arange(2 * reach + 1)
    tops, lefts = (x.reshape(-1) for x in jnp.meshgrid(steps, steps, indexing="ij"))

    def at_offset(offset):
        window = jax.lax.dynamic_slice(previous, (*offset, 0), query.shape)
        distance = jnp.sum(jnp.square(query - window), axis=-1)
        return distance, jax.lax.dynamic_slice(label, offset, (height, width))

    distances, labels = jax.lax.map(at_offset, (tops, lefts))
    farthest = jnp.maximum(jnp.abs(tops - reach), jnp.abs(lefts - reach))[:, None, None]
    nearest = [
        jnp.min(jnp.where((labels == row) & (farthest <= window), distances, FAR), axis=0)
        for row in range(len(bias))
        for window in windows
    ]
    squared = jnp.stack(nearest, axis=-1).reshape(height, width, len(bias), -1)
    biased = 2 * (jax.nn.sigmoid(squared.astype(jnp.float32) + bias[:, None]) - 0.5)
    biased = resize(biased.reshape(1, height, width, -1), full)[0]
    return biased.reshape(*full, len(bias), len(windows))


# ----------------------------------------------------------------------------------------- torch


def torch_global_matching(query, reference, label, bias):
    torch = import_torch()
    height, width, channels = query.shape
    queries, pixels = query.reshape(-1, channels), reference.reshape(-1, channels)
    masks = [label.reshape(-1) == row for row in range(len(bias))]
    pixel_norm = pixels.square().sum(-1)
    nearest = []
    for part in queries.chunk(CHUNKS * len(reference)):
        distances = part.square().sum(-1, keepdim=True) + pixel_norm - 2 * part @ pixels.T
        copies = [torch.where(mask, distances, FAR).amin(-1) for mask in masks]
        nearest.append(torch.stack(copies, -1))
    squared = torch.cat(nearest).reshape(height, width, -1)
    return 2 * (torch.sigmoid(squared.float() + bias) - 0.5)


def torch_local_matching(query, previous, label, bias, windows, downsample, dtype):
    torch = import_torch()
    pad, interpolate = torch.nn.functional.pad, torch.nn.functional.interpolate
    full = tuple(query.shape[:2])
    height, width = (full[0] // 2 + 1, full[1] // 2 + 1) if downsample else full

    def resized(x, size):  # [h, w, c]
        x = x.permute(2, 0, 1)[None]
        x = interpolate(x, size, mode="bilinear", align_corners=True)
        return x[0].permute(1, 2, 0)

    query = resized(query, (height, width)).to(getattr(torch, dtype))
    previous = resized(previous, (height, width)).to(getattr(torch, dtype))
    label = interpolate(label[None, None].float(), (height, width), mode="nearest")[0, 0]
    reach = max(windows)
    previous = pad(previous, (0, 0, reach, reach, reach, reach))
    label = pad(label, (reach,) * 4, value=NOBODY)
    offsets = range(2 * reach + 1)
    distances, labels = [], []
    for top in offsets:
        for left in offsets:
            window = previous[top : top + height, left : left + width]
            distances.append((query - window).square().sum(-1))
            labels.append(label[top : top + height, left : left + width])
    shape = (len(offsets), len(offsets), height, width)
    distances, labels = torch.stack(distances).view(shape), torch.stack(labels).view(shape)
    nearest = []
    for row in range(len(bias)):
        masked = torch.where(labels == row, distances, FAR)
        for window in windows:
            inner = slice(reach - window, reach + window + 1)
            nearest.append(masked[inner, inner].amin((0, 1)))
    squared = torch.stack(nearest, -1).view(height, width, len(bias), -1)
    biased = 2 * (torch.sigmoid(squared.float() + bias[:, None]) - 0.5)
    return resized(biased.view(height, width, -1), full).reshape(*full, len(bias), len(windows))
