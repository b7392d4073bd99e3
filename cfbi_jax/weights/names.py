"""Which official (PyTorch) key holds which of our arrays, and in which layout.

The table is not written out: every array of a model has one path, e.g.
`params/ensembler/layer1/conv2/kernel`, and the rules below turn its module path and its last part
into the official key `dynamic_seghead.layer1.conv2.weight`.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

from cfbi_jax.models.cfbi import CFBI, parameter_shapes

# Module path -> official module path: all matching rules apply, from top to bottom.
_MODULE_RULES = [
    # DeepLabv3+: ResNet-101
    (r"^deeplab/backbone/layer(\d)_(\d+)", r"deeplab/backbone/layer\1.\2"),
    (r"(layer[\d.]+)[./]downsample_conv$", r"\1.downsample.0"),
    (r"(layer[\d.]+)[./]downsample_(bn|norm)$", r"\1.downsample.1"),
    # DeepLabv3+: MobileNetV2. Block 1 has no expansion, so its numbers start three lower.
    (r"/stem_conv$", "/features.0.0"),
    (r"/stem_bn$", "/features.0.1"),
    (r"/block1/depthwise_conv$", "/features.1.conv.0"),
    (r"/block1/depthwise_bn$", "/features.1.conv.1"),
    (r"/block1/project_conv$", "/features.1.conv.3"),
    (r"/block1/project_bn$", "/features.1.conv.4"),
    (r"/block(\d+)/expand_conv$", r"/features.\1.conv.0"),
    (r"/block(\d+)/expand_bn$", r"/features.\1.conv.1"),
    (r"/block(\d+)/depthwise_conv$", r"/features.\1.conv.3"),
    (r"/block(\d+)/depthwise_bn$", r"/features.\1.conv.4"),
    (r"/block(\d+)/project_conv$", r"/features.\1.conv.6"),
    (r"/block(\d+)/project_bn$", r"/features.\1.conv.7"),
    # DeepLabv3+: pyramid and decoder
    (r"^deeplab/aspp/(aspp\d)/conv$", r"deeplab/aspp/\1/atrous_conv"),
    (r"^deeplab/aspp/pooling/conv$", "deeplab/aspp/global_avg_pool.1"),
    (r"^deeplab/aspp/pooling/bn$", "deeplab/aspp/global_avg_pool.2"),
    (r"^deeplab/aspp/project/(conv|bn)$", r"deeplab/aspp/\g<1>1"),
    (r"^deeplab/decoder/low_level/(conv|bn)$", r"deeplab/decoder/\g<1>1"),
    (r"^deeplab/decoder/conv1/conv$", "deeplab/decoder/last_conv.0"),
    (r"^deeplab/decoder/conv1/bn$", "deeplab/decoder/last_conv.1"),
    (r"^deeplab/decoder/conv2/conv$", "deeplab/decoder/last_conv.4"),
    (r"^deeplab/decoder/conv2/bn$", "deeplab/decoder/last_conv.5"),
    (r"^deeplab/", "feature_extracter."),
    # embedding and matching feature
    (r"^pixel_embedding/depthwise$", "seperate_conv"),
    (r"^pixel_embedding/norm1$", "bn1"),
    (r"^pixel_embedding/pointwise$", "embedding_conv"),
    (r"^pixel_embedding/norm2$", "bn2"),
    (r"^matching_feature/conv$", "dynamic_prehead.conv"),
    (r"^matching_feature/norm$", "dynamic_prehead.bn"),
    # ensembler
    (r"^ensembler/gate(\d+)/linear$", r"ensembler/IA\1.IA"),
    (r"^ensembler/logits/foreground/linear$", "ensembler/IA_final_fg"),
    (r"^ensembler/logits/background/linear$", "ensembler/IA_final_bg"),
    (r"^ensembler/(layer\d)/gct$", r"ensembler/\1/GCT1"),
    (r"^ensembler/aspp/(aspp\d)/conv$", r"ensembler/ASPP/\1/atrous_conv"),
    (r"^ensembler/aspp/pooling_conv$", "ensembler/ASPP/global_avg_pool.1"),
    (r"^ensembler/aspp/project/(conv|norm)$", r"ensembler/ASPP/\g<1>1"),
    (r"^ensembler/aspp/project/gct$", "ensembler/ASPP/GCT"),
    (r"^ensembler/aspp/", "ensembler/ASPP/"),
    (r"^ensembler/skip_gct$", "ensembler/GCT_sc"),
    (r"^ensembler/skip_(conv|norm)$", r"ensembler/\1_sc"),
    (r"^(ensembler/.*)gct$", r"\1GCT"),
    (r"^(ensembler/.*)norm(\d|_sc)?$", r"\1bn\2"),
    (r"^ensembler/", "dynamic_seghead."),
    (r"/", "."),
]
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_BIASES = {"background_bias": "bg_bias", "foreground_bias": "fg_bias"}
# Modules that the official network registers twice, under a second name.
_ALIASES = [
    (r"^seperate_conv\.", "semantic_embedding.0."),
    (r"^bn1\.", "semantic_embedding.1."),
    (r"^embedding_conv\.", "semantic_embedding.3."),
    (r"^bn2\.", "semantic_embedding.4."),
    (r"(?<=backbone\.)features\.(?=[0-3]\.)", "low_level_features."),
    (r"(?<=backbone\.)features\.(?=([4-9]|1\d)\.)", "high_level_features."),
    (r"(?<=backbone\.)features\.(?=[4-6]\.)", "feautre_8x."),
    (r"(?<=backbone\.)features\.(?=([7-9]|1[0-3])\.)", "feature_16x."),
    (r"(?<=backbone\.)features\.(?=1[4-7]\.)", "feature_32x."),
]


class Entry(NamedTuple):
    """One array: our path, its official key and aliases, and the official shape."""

    path: tuple[str, ...]
    key: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]


def official_key(path: tuple[str, ...]) -> str:
    """Official key of the array at `path`, e.g. ("frozen", "deeplab", ..., "bn1", "mean")."""
    _, *modules, leaf = path
    if not modules:
        return _BIASES[leaf]
    module = "/".join(modules)
    for pattern, replacement in _MODULE_RULES:
        module = re.sub(pattern, replacement, module)
    return f"{module}.{_LEAVES.get(leaf, leaf)}"


def to_official(leaf: str, array: np.ndarray) -> np.ndarray:
    """Our layout -> PyTorch's: kernels [h, w, in, out] -> [out, in, h, w], linear transposed,
    per-channel GCT parameters and biases with axes of one."""
    if leaf == "kernel":
        return array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    if leaf in ("alpha", "beta", "gamma") or leaf in _BIASES:
        return array.reshape(1, -1, 1, 1)
    return array


def from_official(leaf: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_official`."""
    if leaf == "kernel":
        return array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
    if leaf in _BIASES:
        return array.reshape(())
    if leaf in ("alpha", "beta", "gamma"):
        return array.reshape(-1)
    return array


def entries(model: CFBI) -> list[Entry]:
    """The whole table for `model`; nothing is allocated."""
    flat, _ = jax.tree_util.tree_flatten_with_path(parameter_shapes(model))
    table = []
    for tree_path, leaf in flat:
        path = tuple(part.key for part in tree_path)
        key = official_key(path)
        aliases = tuple(
            re.sub(pattern, name, key) for pattern, name in _ALIASES if re.search(pattern, key)
        )
        shape = to_official(path[-1], np.broadcast_to(np.float32(0), leaf.shape)).shape
        table.append(Entry(path, key, aliases, shape))
    return table
