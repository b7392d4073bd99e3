"""What the network remembers of a video: explicit, immutable, in rows instead of a user's ids."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from cfbi_jax.inference import test_time
from cfbi_jax.inference.options import MAX_OBJECTS
from cfbi_jax.inference.test_time import View
from cfbi_jax.models.matching import NOBODY
from cfbi_jax.models.resizing import interpolation_matrix, resize_labels

Shaped = Any  # an array or, in a plan, what stands for one


@struct.dataclass
class ViewState:
    """What one view remembers, at its embedding's size. Labels hold rows; 255 is nobody's.

    Only the first `State.num_references` references count.
    """

    reference: Float[Shaped, "r h w c"]
    reference_label: UInt8[Shaped, "r h w"]
    previous: Float[Shaped, "1 h w c"]
    previous_label: UInt8[Shaped, "1 h w"]


@struct.dataclass
class State:
    views: tuple[ViewState, ...]
    num_references: Int[Shaped, ""] | int


# (embedding, low-level features) of every view; views differ in size
Features = tuple[tuple[Float[Shaped, "1 _ _ _"], Float[Shaped, "1 _ _ _"]], ...]


def padded_rows(num_objects: int) -> int:
    """Rows (1 + objects) that are compiled for: exact up to 8 objects, then in steps of 4, at most
    as many as labels can name."""
    if num_objects > 8:
        num_objects = min(-(-num_objects // 4) * 4, MAX_OBJECTS)
    return 1 + num_objects


def padded_references(count: int) -> int:
    """References that are compiled for: 1, 2, 3, 4, then in steps of 4."""
    return count if count <= 4 else -(-count // 4) * 4


def remember(
    old: State | None,
    features: Features,
    rows: UInt8[Array, "height width"] | UInt8[np.ndarray, "height width"],
    views: tuple[View, ...],
    as_reference: bool,
) -> State:
    """The state after a frame: it is the previous one, and one more reference if it came with a
    mask, as a video's first does. `rows`: of its pixels."""
    new = []
    count = old.num_references if old else 0
    size = padded_references(count + as_reference)
    for i, (view, (embedding, _)) in enumerate(zip(views, features, strict=True)):
        label = _small_label(rows, embedding.shape[1:3], view.mirrored)
        if old is None:
            reference, reference_label = embedding, label
        else:
            reference, reference_label = old.views[i].reference, old.views[i].reference_label
            if as_reference:
                reference = _append(reference, embedding, count, size, 0)
                reference_label = _append(reference_label, label, count, size, NOBODY)
        new.append(ViewState(reference, reference_label, embedding, label))
    return State(tuple(new), count + as_reference)


def state_shapes(features: Features, num_references: int) -> State:
    """The shapes of a state with so many references, from those of a frame's features."""
    count = padded_references(num_references)

    def view_state(embedding):
        shape = embedding.shape[1:]
        like = partial(jax.ShapeDtypeStruct, sharding=embedding.sharding)
        return ViewState(
            like((count, *shape), embedding.dtype),
            like((count, *shape[:2]), np.uint8),
            embedding,
            like((1, *shape[:2]), np.uint8),
        )

    return State(tuple(view_state(embedding) for embedding, _ in features), num_references)


def forget_programs() -> None:
    """Frees what every size of videos has its own of, beside `Programs`: the programs of this
    module, and the matrices that resize."""
    _small_label.clear_cache()
    _append.clear_cache()
    interpolation_matrix.cache_clear()


@partial(jax.jit, static_argnums=(1, 2))
def _small_label(
    rows: UInt8[Array, "height width"], size: tuple[int, int], mirrored: bool
) -> UInt8[Array, "1 h w"]:
    return resize_labels(test_time.mirror(rows, mirrored)[None], size)


@partial(jax.jit, static_argnums=(3, 4))
def _append(stack: Array, item: Array, count: Int[Array, ""], size: int, fill: int) -> Array:
    """`item` [1, ...] at position `count` of `stack`, which grows to `size`, filled with `fill`."""
    grown = jnp.full((size, *stack.shape[1:]), fill, stack.dtype).at[: len(stack)].set(stack)
    return grown.at[count].set(item[0])
