"""The two jitted functions that a frame takes, and what they need.

frame --> embed ------------> features ---+--> predict --> label, probabilities
                               State -----+
"""

import contextlib
import logging
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
from cfbi_jax.inference.budget import Budget, out_of_memory_explained
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.state import (
    Features,
    State,
    forget_programs,
    padded_rows,
    state_shapes,
)
from cfbi_jax.inference.test_time import View
from cfbi_jax.memory import Chunks, MemoryPlan
from cfbi_jax.models.cfbi import CFBI, rows_in_groups
from cfbi_jax.models.images import ImageFormat

LOGGER = logging.getLogger(__name__)

# Views of the compiled programs that are kept at a time: a data set may have videos of many sizes
# and numbers of objects. On a CPU each takes some tens of MiB and 200 of the 65,530 mappings that
# Linux allows a process.
MAX_VIEWS = 64


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
      budget: the memory that a video may take.
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
        self.budget = Budget(self.model, options, self.device, memory.tree_bytes(variables))
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
        self.budget.check(plan, size, num_objects)
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
        chunks = self.budget.chunks(features, size, num_rows, num_references)
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
        held = self.budget.held(features, size, num_references)
        return MemoryPlan(held | {"computation": max(embedding, prediction)}, chunks)

    def views_of(self, size: tuple[int, int]) -> tuple[View, ...]:
        options = self.options
        return test_time.views_of(size, options.scales, options.flip, options.max_long_edge)

    def num_rows(self, num_objects: int) -> int:
        limit = self.options.max_objects
        return padded_rows(num_objects) if limit is None else 1 + limit
