"""The two jitted functions that a frame takes, and what they need.

frame --> embed ------------> features ---+--> predict --> label, probabilities
                               State -----+
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cfbi_jax import memory
from cfbi_jax.compilation import (
    compiler_options,
    default_device,
    own_settings,
    return_memory_after_compiling,
)
from cfbi_jax.inference import test_time
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.state import (
    Features,
    State,
    forget_programs,
    padded_references,
    padded_rows,
    state_shapes,
)
from cfbi_jax.inference.test_time import View
from cfbi_jax.memory import MIB, Chunks, MemoryPlan
from cfbi_jax.models.cfbi import CFBI, rows_in_groups
from cfbi_jax.models.images import ImageFormat

LOGGER = logging.getLogger(__name__)

LESS_MEMORY = (
    "less memory: a smaller max_long_edge (pixels at the network), fewer scales or no flip, fewer "
    "masks (references)"
)

# Views of the compiled programs that are kept at a time: a data set may have videos of many sizes
# and numbers of objects. On a CPU each takes some tens of MiB and 200 of the 65,530 mappings that
# Linux allows a process.
MAX_VIEWS = 64


def out_of_memory_explained() -> contextlib.AbstractContextManager[None]:
    fewer = "a smaller memory_mib computes fewer objects at a time"
    return memory.explained(f"{LESS_MEMORY}; {fewer}")


class _Traced:
    """What is compiled, and how often it was. Without the weights, which the compiled functions
    would keep: they and what they were made of are a cycle, freed when garbage is collected.
    """

    def __init__(self, model: CFBI, image_format: ImageFormat):
        self.model = model
        self.image_format = image_format
        self.compilations = 0
        self.views_kept = 0

    def embed_views(self, variables, frame: UInt8[Array, "height width 3"], views) -> Features:
        self._log("embedding", frame.shape[:2], views)
        return tuple(
            self.model.apply(
                variables,
                test_time.view_frame(frame, view, self.image_format),
                method=CFBI.embed,
            )
            for view in views
        )

    def predict_views(
        self,
        variables,
        state: State,
        features: Features,
        given: UInt8[Array, "height width"],
        num_objects: Int[Array, ""],
        views: tuple[View, ...],
        num_rows: int,
        with_probabilities: bool,
        chunks: Chunks,
    ) -> tuple[UInt8[Array, "height width"], Float[Array, "rows height width"] | None]:
        """(rows of all pixels, given ones included; probabilities of the prediction)."""
        size = given.shape
        references = state.views[0].reference.shape[0]
        self._log(f"{num_rows - 1} objects, {references} references", size, views)
        packing = None
        if chunks.rows_at_once:
            packing = rows_in_groups(1, num_rows, chunks.rows_at_once)
        logits = []
        for view_state, (current, low_level) in zip(state.views, features, strict=True):
            of_view = self.model.apply(
                variables,
                view_state.reference[None],
                view_state.reference_label[None],
                jnp.full(1, state.num_references),
                view_state.previous,
                view_state.previous_label,
                current,
                low_level,
                num_objects[None],
                num_rows,
                packing,
                method=CFBI.segment,
            )
            logits.append(of_view[0])
        probabilities = None
        if with_probabilities:
            probabilities = test_time.mean_probabilities(logits, views, size, num_objects)
            label = jnp.argmax(probabilities, axis=0).astype(jnp.uint8)
        else:
            lines = chunks.lines_at_once or size[0]
            label = test_time.most_likely_rows(logits, views, size, num_objects, lines)
        return jnp.where(given > 0, given, label), probabilities

    def _log(self, what: str, size: tuple[int, int], views: tuple[View, ...]) -> None:
        # Python runs the body of a jitted function exactly when a new program is compiled.
        self.compilations += 1
        self.views_kept += len(views)
        seen = ", ".join(
            f"{view.size[0]} x {view.size[1]}{' mirrored' if view.mirrored else ''}"
            for view in views
        )
        LOGGER.info(
            "compilation %d: %s, video %d x %d, network %s",
            self.compilations,
            what,
            *size,
            seen,
        )


class Programs:
    """A network as it segments videos.

    Attributes:
      model: with the types and atrous rates of `options`.
      variables: of the network, on the device; `use` puts others in their place.
      device: where all is computed: JAX's default one when this was made, else the first.
      embed: (variables, frame, views=) -> `Features`.
      predict: see `_Traced.predict_views`.
    """

    def __init__(
        self, model: CFBI, variables: Mapping, image_format: ImageFormat, options: Options
    ):
        self.options = options
        self.model = model.clone(
            global_atrous_rate=options.global_atrous_rate or model.global_atrous_rate,
            local_atrous_rate=options.local_atrous_rate or model.local_atrous_rate,
            compute_dtype=jnp.dtype(options.compute_dtype).type,
            matching_dtype=jnp.dtype(options.matching_dtype).type,
        )
        self.device = default_device()
        self.use(variables)
        self._weights = memory.tree_bytes(variables)  # asked for with every frame
        self._told: set[tuple] = set()
        return_memory_after_compiling()
        self._traced = traced = _Traced(self.model, image_format)
        self.embed = jax.jit(
            traced.embed_views, static_argnames="views", compiler_options=compiler_options()
        )
        self.predict = jax.jit(
            traced.predict_views,
            static_argnames=("views", "num_rows", "with_probabilities", "chunks"),
            compiler_options=compiler_options(),
        )

    @property
    def num_compilations(self) -> int:
        """Programs made so far, those that were forgotten included."""
        return self._traced.compilations

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """What everything here is traced and run in, wherever it is called."""
        with own_settings(self.device), out_of_memory_explained():
            yield

    def use(self, variables: Mapping) -> None:
        """Other weights of the same shapes; no program is compiled again."""
        with self.at_work():
            self.variables = self.to_device(variables)

    def to_device(self, arrays):
        """A tree of arrays where the programs run. JAX compiles a program once for arrays that were
        put somewhere on purpose, as its own results then are, and once more for others.
        """
        return jax.device_put(arrays, self.device)

    def begin_video(self) -> None:
        """Forgets all programs where there are many, so that memory does not grow with the number
        of videos; what is needed again comes from the persistent cache.
        """
        if self._traced.views_kept >= MAX_VIEWS:
            self.embed.clear_cache()
            self.predict.clear_cache()
            forget_programs()
            self._traced.views_kept = 0

    def plan(self, size: tuple[int, int], num_objects: int, num_references: int = 1) -> MemoryPlan:
        """What a video of `size` (height, width) will take; compiles its programs, runs nothing.

        The programs of a frame take turns, so the larger one counts. Frames that wait to be read
        are not counted.

        Raises ValueError if that is more than `memory_mib`; where that is None, warns of more than
        its default.
        """
        with self.at_work():
            plan = self._plan(size, num_objects, num_references)
        if plan.peak > self.budget:
            message = self._over_budget(size, num_objects, str(plan))
            if self.options.memory_mib is not None:
                raise ValueError(message)
            LOGGER.warning(message)
        return plan

    def _plan(self, size: tuple[int, int], num_objects: int, num_references: int) -> MemoryPlan:
        views = self.views_of(size)
        num_rows = self.num_rows(num_objects)
        frame, label = (jax.ShapeDtypeStruct((*size, *c), np.uint8) for c in ((3,), ()))
        embed = self.embed.lower(self.variables, frame, views=views)
        # On the device, as those of a video are: else this would be another program.
        here = jax.sharding.SingleDeviceSharding(self.device)
        features = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), embed.out_info
        )
        chunks = self.chunks(features, size, num_rows, num_references)
        state = state_shapes(features, num_references)
        count = jax.ShapeDtypeStruct((), np.int32)
        predict = self.predict.lower(
            *(self.variables, state, features, label, count),
            views=views,
            num_rows=num_rows,
            with_probabilities=False,
            chunks=chunks,
        )
        embedding, prediction = (
            memory.working_bytes(program.compile()) for program in (embed, predict)
        )
        lines = chunks.lines_at_once or size[0]
        prediction += memory.library_bytes(num_rows, lines, size[1])
        held = self._held(features, size, num_references)
        return MemoryPlan(held | {"computation": max(embedding, prediction)}, chunks)

    @property
    def budget(self) -> int:
        """Bytes: `memory_mib`, or its default."""
        given = self.options.memory_mib
        return memory.default_budget(self.device) if given is None else given * MIB

    def _over_budget(self, size: tuple[int, int], num_objects: int, plan: str) -> str:
        return (
            f"a video of {size[0]} x {size[1]} with {num_objects} objects takes {plan}, and "
            f"memory_mib is {self.budget // MIB}; {LESS_MEMORY}"
        )

    def views_of(self, size: tuple[int, int]) -> tuple[View, ...]:
        options = self.options
        return test_time.views_of(size, options.scales, options.flip, options.max_long_edge)

    def num_rows(self, num_objects: int) -> int:
        limit = self.options.max_objects
        return padded_rows(num_objects) if limit is None else 1 + limit

    def chunks(
        self, features: Features, size: tuple[int, int], num_rows: int, num_references: int
    ) -> Chunks:
        """What is computed at once, for a video of `size` whose frames have `features`."""
        room = self.budget - self._fixed(features, size, num_rows, num_references)
        row = memory.row_bytes(self._head_channels, _largest(features))
        return memory.choose_chunks(max(room, 0), row, num_rows, size)

    def warn_over_budget(
        self, features: Features, size: tuple[int, int], num_rows: int, num_references: int
    ) -> None:
        """Tells, once for each of these, where even the smallest chunks should need more memory."""
        model, pixels = self.model, _largest(features)
        # Matching's sorted copies, in its own type and of the pixels that it looks at.
        looked_at = padded_references(num_references) * pixels / model.global_atrous_rate**2
        matching = 3 * looked_at * model.embedding_dim * jnp.dtype(model.matching_dtype).itemsize
        row = memory.row_bytes(self._head_channels, pixels)
        least = self._fixed(features, size, num_rows, num_references) + max(matching, row)
        what = size, num_rows, num_references
        if least > self.budget and what not in self._told:
            self._told.add(what)
            LOGGER.warning(self._over_budget(size, num_rows - 1, f"about {least / MIB:.0f} MiB"))

    def _fixed(
        self, features: Features, size: tuple[int, int], num_rows: int, num_references: int
    ) -> int:
        """Bytes that no chunks change: what exists all the time, the maps of a frame's rows, and
        the logits of every view."""
        held = sum(self._held(features, size, num_references).values())
        maps = 4 * _largest(features) * 3 * num_rows * (3 + 2 * len(self.model.windows))
        pixels = sum(math.prod(embedding.shape[1:3]) for embedding, _ in features)
        return held + maps + 4 * pixels * num_rows

    @property
    def _head_channels(self) -> int:
        """Of the head's input, or of its inside where that is wider than in the published one."""
        model = self.model
        inside = round(364 / 256 * model.ensembler_dim)
        return max(3 * model.embedding_dim + model.matching_dim, inside)

    def _held(
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


def _largest(features: Features) -> int:
    """Pixels of the largest view's embedding."""
    return max(math.prod(embedding.shape[1:3]) for embedding, _ in features)
