"""How much memory a video may take, and how much of it is computed at a time to stay within it."""

import contextlib
import logging
import math

import jax
import jax.numpy as jnp

from cfbi_jax import memory
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.state import Features, padded_references, state_shapes
from cfbi_jax.memory import MIB, Chunks, MemoryPlan
from cfbi_jax.models.cfbi import CFBI

LOGGER = logging.getLogger(__name__)

LESS_MEMORY = (
    "less memory: a smaller max_long_edge (pixels at the network), fewer scales or no flip, fewer "
    "masks (references)"
)


def out_of_memory_explained() -> contextlib.AbstractContextManager[None]:
    fewer = "a smaller memory_mib computes fewer objects at a time"
    return memory.explained(f"{LESS_MEMORY}; {fewer}")


class Budget:
    """Of every video that a network segments.

    Args:
      weights: their bytes.
    """

    def __init__(self, model: CFBI, options: Options, device: jax.Device, weights: int):
        self._model = model
        self._options = options
        self._weights = weights
        given = options.memory_mib
        self._bytes = memory.default_budget(device) if given is None else given * MIB
        self._told: set[tuple] = set()

    def chunks(
        self, features: Features, size: tuple[int, int], num_rows: int, num_references: int
    ) -> Chunks:
        """What is computed at once, for a video of `size` whose frames have `features`."""
        room = self._bytes - self._fixed(features, size, num_rows, num_references)
        row = memory.row_bytes(self._head_channels, _largest(features))
        return memory.choose_chunks(max(room, 0), row, num_rows, size)

    def check(self, plan: MemoryPlan, size: tuple[int, int], num_objects: int) -> None:
        """Raises ValueError for more than `memory_mib`; warns of more than its default."""
        if plan.peak > self._bytes:
            message = self._over(size, num_objects, str(plan))
            if self._options.memory_mib is not None:
                raise ValueError(message)
            LOGGER.warning(message)

    def warn(
        self, features: Features, size: tuple[int, int], num_rows: int, num_references: int
    ) -> None:
        """Tells, once for each of these, where even the smallest chunks should need more memory."""
        model, pixels = self._model, _largest(features)
        # Matching's sorted copies, in its own type and of the pixels that it looks at.
        looked_at = padded_references(num_references) * pixels / model.global_atrous_rate**2
        matching = 3 * looked_at * model.embedding_dim * jnp.dtype(model.matching_dtype).itemsize
        row = memory.row_bytes(self._head_channels, pixels)
        least = self._fixed(features, size, num_rows, num_references) + max(matching, row)
        what = size, num_rows, num_references
        if least > self._bytes and what not in self._told:
            self._told.add(what)
            LOGGER.warning(self._over(size, num_rows - 1, f"about {least / MIB:.0f} MiB"))

    def held(
        self, features: Features, size: tuple[int, int], num_references: int
    ) -> dict[str, int]:
        """Bytes of what exists whichever program runs, by purpose."""
        # A frame, its given mask, its rows and its label.
        frame_bytes = 6 * size[0] * size[1]
        return {
            "weights": self._weights,
            "references": memory.tree_bytes(state_shapes(features, num_references).views),
            "features of two frames": 2 * memory.tree_bytes(features),
            "two frames and their masks": 2 * frame_bytes,
        }

    def _fixed(
        self, features: Features, size: tuple[int, int], num_rows: int, num_references: int
    ) -> int:
        """Bytes that no chunks change: what exists all the time, the maps of a frame's rows, and
        the logits of every view."""
        held = sum(self.held(features, size, num_references).values())
        maps = 4 * _largest(features) * 3 * num_rows * (3 + 2 * len(self._model.windows))
        pixels = sum(math.prod(embedding.shape[1:3]) for embedding, _ in features)
        return held + maps + 4 * pixels * num_rows

    @property
    def _head_channels(self) -> int:
        """Of the head's input, or of its inside where that is wider than in the published one."""
        model = self._model
        inside = round(364 / 256 * model.ensembler_dim)
        return max(3 * model.embedding_dim + model.matching_dim, inside)

    def _over(self, size: tuple[int, int], num_objects: int, needed: str) -> str:
        return (
            f"a video of {size[0]} x {size[1]} with {num_objects} objects takes {needed}, and "
            f"memory_mib is {self._bytes // MIB}; {LESS_MEMORY}"
        )


def _largest(features: Features) -> int:
    """Pixels of the largest view's embedding."""
    return max(math.prod(embedding.shape[1:3]) for embedding, _ in features)
