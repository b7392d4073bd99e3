"""CFBI (Yang et al., ECCV 2020): the network, in two halves.

    embedding, low_level = model.apply(variables, images, method=CFBI.embed)
    logits = model.apply(
        variables,
        *(reference, reference_label, num_references, previous, previous_label),
        *(embedding, low_level, num_objects, num_rows),
        method=CFBI.segment,
    )

`embed` sees one image and nothing else, so a video embeds every frame once. `segment` compares the
current frame's embedding with those of the reference frames and of the previous frame.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt8

from cfbi_jax.models.attention import instance_vector
from cfbi_jax.models.deeplab import DeepLab
from cfbi_jax.models.ensembler import CollaborativeEnsembler, FeelvosHead
from cfbi_jax.models.layers import Conv, GroupNorm, groups_of
from cfbi_jax.models.matching import NOBODY, background_distance
from cfbi_jax.models.matching_global import global_matching
from cfbi_jax.models.matching_local import local_matching

# Half-resolution windows; largest first is the channel order that official weights expect.
WINDOWS = (12, 2, 4, 6, 8, 10)


class Packing(NamedTuple):
    """Which rows of a batch the head computes, so that none is computed for nothing.

    Row i of the packed batch is row `row[i]` of sample `sample[i]`; where `sample[i]` is not below
    the batch size, row i is padding. With arrays `[groups, n]` one group after the other is
    computed, to bound the memory.
    """

    sample: Int[Array, "*groups n"]
    row: Int[Array, "*groups n"]


def rows_in_groups(batch: int, num_rows: int, size: int) -> Packing:
    """All rows of a batch, `size` at a time; the last group is filled up with padding."""
    groups = -(-batch * num_rows // size)
    sample, row = jnp.divmod(jnp.arange(groups * size).reshape(groups, size), num_rows)
    return Packing(sample, row)


class PixelEmbedding(nn.Module):
    """Depthwise separable convolution to the pixel embedding (paper section 4), which is not
    negative: it ends in a ReLU."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
        dtype = self.dtype
        x = Conv(x.shape[-1], 3, depthwise=True, use_bias=True, dtype=dtype, name="depthwise")(x)
        x = nn.relu(GroupNorm(groups_of(x.shape[-1]), dtype, name="norm1")(x))
        x = Conv(self.features, use_bias=True, dtype=dtype, name="pointwise")(x)
        return nn.relu(GroupNorm(self.features // 4, dtype, name="norm2")(x))


class MatchingFeature(nn.Module):
    """Reduces distance maps and the previous mask to one feature per row (the `prehead`)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w features"]:
        x = Conv(self.features, use_bias=True, dtype=self.dtype, name="conv")(x)
        return nn.relu(GroupNorm(self.features // 4, self.dtype, name="norm")(x))


class CFBI(nn.Module):
    """The fields are the model config; the defaults are the released ResNet-101 network.

    backbone: "resnet101" or "mobilenet_v2".
    resnet_blocks, resnet_width, decoder_dim, embedding_dim, matching_dim, ensembler_dim: widths
        and depths (every published network uses the defaults).
    windows: local windows, in pixels of the half-size grid, in channel order.
    local_downsample: match locally at half size (paper section 4).
    pixel_background: background in pixel matching: background maps and the previous frame's
        background embedding (Table 4, P).
    instance_background: background in the instance vector (Table 4, I).
    distance_bias: the trainable b_B and b_F of eq. 1 (Table 4).
    instance_attention: gates and dynamic logits (Table 5, line 5).
    head: "ensembler", or "feelvos" for Table 5, line 3.
    global_atrous_rate, local_atrous_rate: thin the pixels that are matched with (1: exact).
    dropout: of DeepLab's ASPP, while training.
    compute_dtype: of convolutions and norms' outputs. matching_dtype: of distances.
    """

    backbone: str = "resnet101"
    resnet_blocks: tuple[int, ...] = (3, 4, 23, 3)
    resnet_width: int = 64
    decoder_dim: int = 256
    embedding_dim: int = 100
    matching_dim: int = 64
    ensembler_dim: int = 256
    windows: tuple[int, ...] = WINDOWS
    local_downsample: bool = True
    pixel_background: bool = True
    instance_background: bool = True
    distance_bias: bool = True
    instance_attention: bool = True
    head: str = "ensembler"
    global_atrous_rate: int = 1
    local_atrous_rate: int = 1
    dropout: float = 0.1
    compute_dtype: DTypeLike = jnp.float32
    matching_dtype: DTypeLike = jnp.float32

    def setup(self):
        dtype = self.compute_dtype
        self.deeplab = DeepLab(
            self.backbone,
            self.resnet_blocks,
            self.resnet_width,
            self.decoder_dim,
            self.dropout,
            dtype,
        )
        self.pixel_embedding = PixelEmbedding(self.embedding_dim, dtype)
        self.matching_feature = MatchingFeature(self.matching_dim, dtype)
        heads = {"ensembler": CollaborativeEnsembler, "feelvos": FeelvosHead}
        if self.head not in heads:
            raise ValueError(f'head is "{self.head}"; expected one of {sorted(heads)}')
        self.ensembler = heads[self.head](self.ensembler_dim, dtype)
        if self.distance_bias:
            self.background_bias = self.param("background_bias", nn.initializers.zeros_init(), ())
            self.foreground_bias = self.param("foreground_bias", nn.initializers.zeros_init(), ())

    def embed(
        self,
        images: Float[Array, "b height width 3"],
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w low"]]:
        """Normalised images -> (pixel embedding, low-level features), both at stride 4, float32.

        Heights and widths are `16 k + 1`; h = ceil(height / 4). `dropout_keys`: one for every
        image, while training.
        """
        # float32 products default to TF32 on GPUs, which distances and golden numbers do not stand.
        with jax.default_matmul_precision("highest"):
            features, low_level = self.deeplab(images, dropout_keys)
            embedding = self.pixel_embedding(features)
        return embedding.astype(jnp.float32), low_level.astype(jnp.float32)

    def segment(
        self,
        reference: Float[Array, "b r h w c"],
        reference_label: UInt8[Array, "b r h w"],
        num_references: Int[Array, " b"],
        previous: Float[Array, "b h w c"],
        previous_label: UInt8[Array, "b h w"],
        current: Float[Array, "b h w c"],
        low_level: Float[Array, "b h w low"],
        num_objects: Int[Array, " b"],
        num_rows: int,
        packing: Packing | None = None,
    ) -> Float[Array, "b rows h w"]:
        """Logits at stride 4 of every row: 0 is the background, 1..num_objects[b] the objects.

        Labels are row numbers at the embedding's size; 255 is nobody's. `num_rows` is 1 + the
        padded number of objects, and r the padded number of references. What padding rows hold is
        meaningless and reaches no real row: `mask_padding` takes them out of a softmax.

        The head works on all `b * num_rows` rows at once, or on those of `packing`, which has to
        name every row up to `num_objects[b]`.
        """
        with jax.default_matmul_precision("highest"):
            rows = jnp.arange(num_rows)
            valid = (rows <= num_objects[:, None]).astype(jnp.float32)
            frames = jnp.arange(reference.shape[1])
            frame_valid = frames < num_references[:, None]
            reference_label = jnp.where(
                frame_valid[:, :, None, None], reference_label, NOBODY
            ).astype(jnp.uint8)

            maps, mask = self._distance_maps(
                reference, reference_label, previous, previous_label, current, valid
            )
            vector = None
            if self.instance_attention:
                vector = instance_vector(
                    reference,
                    reference_label,
                    frame_valid.astype(jnp.float32),
                    previous,
                    previous_label,
                    num_rows,
                    self.instance_background,
                )
                self.sow("intermediates", "instance_vector", vector)

            arrays = maps, mask, vector, previous, current, low_level
            batch, height, width, _ = current.shape
            if packing is None:
                logits = self._head(*arrays, None)
                foreground, background = (x.reshape(*maps.shape[:4]) for x in logits)
                return augment_background(foreground, background, valid)

            if packing.row.ndim == 1:
                logits = self._head(*arrays, packing)
            else:
                in_groups = nn.scan(
                    lambda module, carry, group: (carry, module._head(*arrays, group)),
                    variable_broadcast=("params", "frozen"),
                    split_rngs={"params": False},
                )
                _, logits = in_groups(self, (), packing)

            def unpacked(x):  # [..., h, w] -> [b, rows, h, w]
                empty = jnp.zeros((batch, num_rows, height, width), x.dtype)
                return empty.at[packing.sample, packing.row].set(x, mode="drop")

            foreground, background = (unpacked(x) for x in logits)
            return augment_background(foreground, background, valid)

    def _head(
        self,
        maps: Float[Array, "b rows h w maps"],
        mask: Float[Array, "b rows h w 1"],
        vector: Float[Array, "b rows d"] | None,
        previous: Float[Array, "b h w c"],
        current: Float[Array, "b h w c"],
        low_level: Float[Array, "b h w low"],
        packing: Packing | None,
    ) -> tuple[Float[Array, "n h w"], Float[Array, "n h w"]]:
        """Foreground and background logits of the rows of `packing`, or of all."""
        batch, num_rows = maps.shape[:2]

        def per_row(x):  # [b, rows, ...] -> [n, ...]
            if packing is None:
                return x.reshape(-1, *x.shape[2:])
            return x[jnp.minimum(packing.sample, batch - 1), packing.row]

        def shared(x):  # [b, ...] -> [n, ...]
            if packing is None:
                return per_row(jnp.broadcast_to(x[:, None], (batch, num_rows, *x.shape[1:])))
            return x[jnp.minimum(packing.sample, batch - 1)]

        mask, previous_rows = per_row(mask), shared(previous)
        features = [shared(current), previous_rows * mask]
        if self.pixel_background:
            features.append(previous_rows * (1 - mask))
        features.append(self.matching_feature(per_row(maps)).astype(jnp.float32))
        features = jnp.concatenate(features, axis=-1).astype(self.compute_dtype)
        vector = None if vector is None else per_row(vector)
        return self.ensembler(features, shared(low_level), vector)

    def _distance_maps(
        self, reference, reference_label, previous, previous_label, current, valid
    ) -> tuple[Float[Array, "b rows h w maps"], Float[Array, "b rows h w 1"]]:
        """What matching says of every row (end of paper section 3.1), and the previous mask."""
        num_rows = valid.shape[1]
        bias = jnp.zeros(num_rows)
        if self.distance_bias:
            bias = jnp.where(jnp.arange(num_rows) == 0, self.background_bias, self.foreground_bias)

        global_map = global_matching(
            current,
            reference,
            reference_label,
            bias,
            atrous_rate=self.global_atrous_rate,
            dtype=self.matching_dtype,
        )
        local_map = local_matching(
            current,
            previous,
            previous_label,
            bias,
            self.windows,
            downsample=self.local_downsample,
            atrous_rate=self.local_atrous_rate,
            dtype=self.matching_dtype,
        )
        mask = (previous_label[..., None] == jnp.arange(num_rows)).astype(jnp.float32)
        maps = [global_map[..., None], local_map, mask[..., None]]
        self.sow("intermediates", "global_foreground", global_map)
        self.sow("intermediates", "local_foreground", local_map)
        if self.pixel_background:
            global_background = background_distance(global_map, valid)
            local_background = background_distance(local_map, valid)
            maps += [local_background, global_background[..., None]]
            self.sow("intermediates", "global_background", global_background)
            self.sow("intermediates", "local_background", local_background)

        by_row = jnp.moveaxis(jnp.concatenate(maps, axis=-1), 3, 1)
        return by_row, jnp.moveaxis(mask, 3, 1)[..., None]

    def __call__(
        self, images: Float[Array, "b height width 3"], num_rows: int = 2
    ) -> Float[Array, "b rows h w"]:
        """Every image as its own reference, previous and current frame: touches all parameters."""
        embedding, low_level = self.embed(images)
        label = jnp.zeros(embedding.shape[:3], jnp.uint8)
        ones = jnp.ones(embedding.shape[0], jnp.int32)
        return self.segment(
            embedding[:, None],
            label[:, None],
            ones,
            embedding,
            label,
            embedding,
            low_level,
            ones * (num_rows - 1),
            num_rows,
        )


def augment_background(
    foreground: Float[Array, "b rows h w"],
    background: Float[Array, "b rows h w"],
    valid: Float[Array, "b rows"],
) -> Float[Array, "b rows h w"]:
    """Foreground logits; the true background's also gains the least of the objects' background
    logits, where there is an object (as released; the paper does not mention it)."""
    is_object = valid.at[:, 0].set(0)[:, :, None, None] > 0
    least = jnp.min(jnp.where(is_object, background, jnp.inf), axis=1)
    return foreground.at[:, 0].add(jnp.where(jnp.any(is_object, axis=1), least, 0))


def mask_padding(
    logits: Float[Array, "b rows h w"], num_objects: Int[Array, " b"]
) -> Float[Array, "b rows h w"]:
    """Logits with padding rows at -inf: softmax gives them exactly 0."""
    valid = jnp.arange(logits.shape[1]) <= num_objects[:, None]
    return jnp.where(valid[:, :, None, None], logits, -jnp.inf)


def parameter_shapes(model: CFBI) -> dict:
    """Shapes and dtypes of all variables (`params` and `frozen`), nothing allocated."""
    hashable = build_model(model_config(model))  # lists as tuples
    return jax.tree.map(lambda x: x, _parameter_shapes(hashable))  # the caller's own dictionaries


@lru_cache(maxsize=8)
def _parameter_shapes(model: CFBI) -> dict:
    # Seconds for a ResNet-101: all of it is traced.
    image = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def initial_variables(model: CFBI, seed: int) -> dict:
    """Random variables of an untrained network."""
    # Hundreds of small kernels that run once: optimising them would double the waiting time.
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    return init(jax.random.key(seed), jnp.zeros((1, 33, 33, 3)))


# ------------------------------------------------------------------------- model config <-> model

DTYPES = ("float32", "bfloat16", "float16")
MIN_DECODER_DIM = 6  # with which the decoder's low-level features have a channel


def build_model(config: Mapping[str, Any]) -> CFBI:
    """The network that a mapping of `CFBI`'s fields describes (a `ConfigDict`, a JSON object).

    Raises ValueError for a field that `CFBI` does not have, a type that is none of float32,
    bfloat16 and float16, or a number out of its range.
    """
    known = set(model_config(CFBI()))
    values = {}
    for field, value in config.items():
        if field not in known:
            raise ValueError(f'unknown model field "{field}"; the fields are {sorted(known)}')
        if field.endswith("_dtype"):
            if value not in DTYPES:
                raise ValueError(f'model field {field} is "{value}"; expected one of {DTYPES}')
            value = jnp.dtype(value).type
        elif isinstance(value, (list, tuple)):
            value = tuple(value)
        _check_field(field, value)
        values[field] = value
    return CFBI(**values)


def _check_field(field: str, value: Any) -> None:
    """Raises ValueError for numbers out of range: widths, depths, windows, rates, dropout."""
    if field == "dropout" and not 0 <= value < 1:
        raise ValueError(f"model field dropout is {value}; expected 0 or more, below 1")
    if field in ("embedding_dim", "matching_dim", "ensembler_dim") and value % 4:
        raise ValueError(f"model field {field} is {value}; expected a multiple of 4")
    if field == "decoder_dim" and value < MIN_DECODER_DIM:
        raise ValueError(
            f"model field {field} is {value}; expected {MIN_DECODER_DIM} or more, or the decoder "
            "has no low-level features"
        )
    if field in ("resnet_blocks", "windows") and not (
        isinstance(value, tuple) and all(isinstance(n, int) for n in value)
    ):
        raise ValueError(f"model field {field} is {value}; expected integers, 1 or more")
    if field == "resnet_blocks" and len(value) != 4:
        raise ValueError(f"model field {field} is {value}; expected 4 numbers")
    numbers = value if isinstance(value, tuple) else (value,)
    whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]
    if value == () or any(n < 1 for n in whole):
        raise ValueError(f"model field {field} is {value}; expected 1 or more")


def model_config(model: CFBI) -> dict[str, Any]:
    """The inverse of `build_model`: every field, as JSON can hold it."""
    config = {}
    for field in dataclasses.fields(model):
        if field.name in ("parent", "name"):  # linen's own
            continue
        value = getattr(model, field.name)
        if field.name.endswith("_dtype"):
            value = jnp.dtype(value).name
        config[field.name] = list(value) if isinstance(value, tuple) else value
    return config
