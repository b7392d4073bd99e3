"""Scales of the random layers on top of a pretrained backbone, from a few frames.

    start = calibrated(initial_checkpoint(model, "backbone.npz", seed), pairs_of_frames)

The paper starts from a DeepLabv3+ whose batch norms hold statistics. A file that covers the
backbone alone leaves norms that normalise nothing, since they are frozen: the features that happen
to be largest drown the others, and squared distances are so large that eq. 1 is flat. So the random
part gets, before the first step, what training cannot give it (as in Krähenbühl et al.,
"Data-dependent Initializations of Convolutional Neural Networks", ICLR 2016):

- the norms that are still the identity: the statistics of their inputs;
- the embedding: the scale at which half of the pixels find their nearest neighbour, in another
  frame of the video, closer than `NEAREST`;
- the logits: a tenth of their random weights, so that the first loss is that of a guess.
"""

import dataclasses
import logging
from functools import partial, reduce
from operator import getitem

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import prepare
from cfbi_jax.models.layers import NORM_EPSILON, FrozenBatchNorm
from cfbi_jax.models.matching_global import nearest_squared_distance
from cfbi_jax.weights.checkpoint import Checkpoint

LOGGER = logging.getLogger(__name__)

NEAREST = 1.0  # squared distance: (2 sigmoid(1) - 1) = 0.46, well inside eq. 1's slope
LOGIT_SCALE = 0.1
LEAST_VARIANCE = 0.01  # of a channel, in units of its layer's mean one: some channels hardly vary

Path = tuple[str, ...]


def calibrated(start: Checkpoint, pairs: UInt8[np.ndarray, "n 2 height width 3"]) -> Checkpoint:
    """`start` with scales from `pairs` of RGB frames, two of a video each; unchanged where no norm
    is the identity, as in a whole network that was trained. The embedding keeps its scale where
    half of the pixels are the same in both frames of a pair."""
    unset = _identities(start.variables["frozen"])
    if not unset:
        return start
    size = pairs.shape[2:4]
    images = prepare(jnp.asarray(pairs.reshape(-1, *pairs.shape[2:])), size, start.image_format)
    statistics, nearest = jax.jit(partial(_measure, start.model, unset))(start.variables, images)
    variables = jax.tree.map(lambda x: x, start.variables)  # new dictionaries, the same arrays
    for path, (mean, variance) in statistics.items():
        norm = reduce(getitem, path, variables["frozen"])
        norm["mean"], norm["var"] = mean, variance
    embedding = variables["params"]["pixel_embedding"]["norm2"]
    scale = jnp.where(nearest > 0, jnp.sqrt(NEAREST / nearest), 1)
    embedding["scale"], embedding["bias"] = embedding["scale"] * scale, embedding["bias"] * scale
    logits = variables["params"]["ensembler"]["logits"]
    logits.update(jax.tree.map(lambda x: LOGIT_SCALE * x, logits))
    LOGGER.info(
        "%d norms without statistics: taken from %d frames; embedding scaled by %.2g",
        len(unset),
        len(images),
        scale,
    )
    return dataclasses.replace(start, variables=variables)


def _measure(
    model: CFBI, unset: frozenset[Path], variables: dict, images: Float[Array, "m h w 3"]
) -> tuple[dict[Path, tuple[Array, Array]], Float[Array, ""]]:
    """(mean and variance of the inputs of each unset norm, median of the nearest squared distances
    of consecutive images), one norm after the other in one pass."""
    statistics = {}

    def normalise(call, arguments, keywords, context):
        module = context.module
        if not isinstance(module, FrozenBatchNorm) or module.path not in unset:
            return call(*arguments, **keywords)
        (x,) = arguments
        dtype, x = x.dtype, x.astype(jnp.float32)  # as all weights are, whatever computes
        mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        variance = jnp.maximum(variance, LEAST_VARIANCE * jnp.mean(variance))
        statistics[module.path] = mean, variance
        return ((x - mean) / jnp.sqrt(variance + NORM_EPSILON)).astype(dtype)

    with nn.intercept_methods(normalise):
        embedding, _ = model.apply(variables, images, method=CFBI.embed)
    pixels = embedding.reshape(len(images) // 2, 2, -1, embedding.shape[-1])
    everywhere = jnp.zeros(pixels.shape[2], jnp.uint8)
    with jax.default_matmul_precision("highest"):  # called alone, matching has JAX's default
        nearest = jax.lax.map(
            lambda pair: nearest_squared_distance(pair[1], pair[0], everywhere, 1), pixels
        )
    return statistics, jnp.median(nearest)


def _identities(frozen: dict, path: Path = ()) -> frozenset[Path]:
    """Norms that change nothing: those that no file gave anything."""
    if "var" in frozen:
        fresh = all(np.all(frozen[name] == 1) for name in ("scale", "var"))
        fresh &= all(np.all(frozen[name] == 0) for name in ("mean", "bias"))
        return frozenset([path] if fresh else [])
    return frozenset().union(*(_identities(frozen[key], (*path, key)) for key in frozen))
