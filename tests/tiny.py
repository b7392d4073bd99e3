"""CFBI with a backbone and a head of three layers each, and clips for it.

The training step meets the whole network in the golden tests. Here it is the step that is tested,
many times over, and the real backbone and ensembler are most of what has to be compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cfbi_jax.models import cfbi
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.layers import Conv, FrozenBatchNorm, dropout
from cfbi_jax.training.step import Batch, pack_rows

SIZE = (33, 49)
TINY = dict(decoder_dim=16, embedding_dim=8, matching_dim=8, ensembler_dim=16, windows=(2, 1))
# Compilation takes most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class TinyBackbone(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = Conv(12, 3, stride=2, padding=1, name="conv1")(images)
        return Conv(12, 3, stride=2, padding=1, name="conv2")(
            nn.relu(FrozenBatchNorm(name="bn")(x))
        )


class TinyDeepLab(nn.Module):
    backbone: str
    resnet_blocks: tuple
    resnet_width: int
    features: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, images, dropout_keys=None):
        low_level = nn.relu(TinyBackbone(name="backbone")(images))
        x = low_level if dropout_keys is None else dropout(low_level, self.dropout, dropout_keys)
        return nn.relu(Conv(self.features, 3, use_bias=True, name="conv3")(x)), low_level


class TinyHead(nn.Module):
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, features, low_level, vector):
        x = jnp.concatenate([features, low_level], axis=-1)
        x = nn.relu(Conv(self.features, 3, use_bias=True, name="conv1")(x))
        x = x * (1 + jnp.tanh(nn.Dense(self.features, name="gate")(vector)))[:, None, None]
        x = Conv(2, use_bias=True, name="conv2")(x)
        return x[..., 0], x[..., 1]


@contextmanager
def tiny_parts() -> Iterator[None]:
    """Within it, `CFBI` is made of the parts above."""
    with (
        mock.patch.object(cfbi, "DeepLab", TinyDeepLab),
        mock.patch.object(cfbi, "CollaborativeEnsembler", TinyHead),
    ):
        yield


def tiny_model(**fields) -> CFBI:
    return CFBI(**TINY, **{"dropout": 0.0, **fields})


def random_clips(num_objects: list[int], num_frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What the loader gives: clips of noise whose labels are blocks; some pixels are ignored."""
    rng = np.random.default_rng(seed)
    shape = (len(num_objects), num_frames)
    blocks = (*shape, -(-SIZE[0] // 6), -(-SIZE[1] // 6))
    rows = 1 + np.array(num_objects)[:, None, None, None]
    labels = rng.integers(0, 10**6, blocks) % rows
    labels = labels.repeat(6, axis=2).repeat(6, axis=3)[:, :, : SIZE[0], : SIZE[1]]
    labels[rng.random(labels.shape) < 0.03] = 255
    return {
        "frames": rng.integers(0, 256, (*shape, *SIZE, 3)).astype(np.uint8),
        "labels": labels.astype(np.uint8),
        "num_objects": np.array(num_objects, np.int32),
        "index": np.arange(len(num_objects), dtype=np.int32) + 100,
    }


def batch_of(clips: dict, max_objects: int, parts: int = 1, full: bool = False) -> Batch:
    batch = Batch(**clips, packing=pack_rows(clips["num_objects"], parts, max_objects, full))
    return jax.tree.map(jnp.asarray, batch)
