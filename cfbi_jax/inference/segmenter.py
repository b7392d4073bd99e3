"""`VideoSegmenter`: propagates the masks of given frames through a video, frame by frame.

What the network remembers of a video is an explicit, immutable `State`; two jitted functions do
the work, and everything else here is bookkeeping between a user's ids and the network's rows.

    frame --> embed ------------> features ---+--> predict --> label, probabilities
                                   State -----+        |
                                     ^                 v
                                     +---- remember (previous frame; a reference if it came
                                                     with a mask)
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cfbi_jax import memory
from cfbi_jax.compilation import DEFAULT, compiler_options, use_compilation_cache
from cfbi_jax.data.image_files import check_label
from cfbi_jax.inference import test_time
from cfbi_jax.inference.state import (
    Features,
    State,
    padded_references,
    padded_rows,
    remember,
    state_shapes,
)
from cfbi_jax.inference.test_time import View
from cfbi_jax.inference.video import prefetch
from cfbi_jax.memory import MIB, Chunks, MemoryPlan
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import ImageFormat
from cfbi_jax.weights.checkpoint import Checkpoint, load_checkpoint

LOGGER = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
LESS_MEMORY = (
    "less memory: a smaller max_long_edge (pixels at the network), fewer scales or no flip, a "
    "smaller max_references; a smaller memory_mib computes fewer objects at a time"
)

Label = UInt8[np.ndarray, "height width"]
Probabilities = Float[np.ndarray, "rows height width"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a video is segmented. The defaults are exact; what trades exactness is off.

    scales: test scales; their probabilities are averaged at the video's own size.
    flip: adds the mirror image of every scale.
    max_long_edge: limit of the long edge in pixels before the scale applies; None: 1040 for a
        single scale, 800 for several, as released.
    global_atrous_rate, local_atrous_rate: match with every r-th row and column of pixels only.
    compute_dtype: of the convolutions; matching_dtype: of the embedding distances. float32,
        bfloat16 or float16.
    max_references: how many frames with masks one video may have; more is an error.
    max_objects: None, as many as the masks have. A number: rows are always padded to it, so that
        one compilation serves any video, and more objects are an error.
    memory_mib: what weights and arrays may take, in MiB. Where objects or the video's size need
        more, fewer object rows and lines of pixels are computed at a time. None: 80 % of the
        device's memory, on CPUs 1 GiB.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    max_long_edge: int | None = None
    global_atrous_rate: int = 1
    local_atrous_rate: int = 1
    matching_dtype: str = "float32"
    compute_dtype: str = "float32"
    max_references: int = 32
    max_objects: int | None = None
    memory_mib: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales is {self.scales}; expected one or more positive numbers")
        for name in ("global_atrous_rate", "local_atrous_rate", "max_references"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("matching_dtype", "compute_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f'{name} is "{getattr(self, name)}"; expected one of {DTYPES}')
        for name in ("max_objects", "max_long_edge", "memory_mib"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected None or 1 or more")


class VideoSegmenter:
    """Segments the objects of given masks in every frame of a video.

    segmenter = VideoSegmenter.from_checkpoint(path, scales=(1.0, 1.15), flip=True)
    for label in segmenter.segment(frames, {0: mask}):        # a whole video
        ...
    segmenter.start(frame, mask)                              # or frame by frame
    label = segmenter.step(frame)
    label = segmenter.step(frame, mask=new_objects)

    Frames are uint8 [height, width, 3] in RGB. Masks and labels are uint8 [height, width]: 0 is the
    background, any other value is an object's id; ids may have gaps. A mask may come with any
    frame; where it is not 0 it overrides the prediction, for new objects and for corrections.

    The options' types and atrous rates replace those of the model's own fields.
    """

    def __init__(
        self,
        model: CFBI,
        variables: Mapping,
        image_format: ImageFormat,
        options: Options | None = None,
    ):
        self.options = options or Options()
        self.image_format = image_format
        self.model = model.clone(
            global_atrous_rate=self.options.global_atrous_rate,
            local_atrous_rate=self.options.local_atrous_rate,
            compute_dtype=jnp.dtype(self.options.compute_dtype).type,
            matching_dtype=jnp.dtype(self.options.matching_dtype).type,
        )
        self.variables = jax.device_put(variables)
        self._weights = memory.tree_bytes(variables)
        self.num_compilations = 0
        self._embed = jax.jit(
            self._embed_views, static_argnames="views", compiler_options=compiler_options()
        )
        self._predict = jax.jit(
            self._predict_views,
            static_argnames=("views", "num_rows", "with_probabilities", "chunks"),
            compiler_options=compiler_options(),
        )
        self._video: _Video | None = None

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, compilation_cache: str | None = DEFAULT, **options
    ) -> "VideoSegmenter":
        """Loads a checkpoint folder. `options` are the fields of `Options`.

        `compilation_cache` is the folder where compiled programs are kept between runs ("default":
        see `compilation.use_compilation_cache`; None: nowhere).
        """
        use_compilation_cache(compilation_cache)
        return cls.from_loaded(load_checkpoint(path), Options(**options))

    @classmethod
    def from_loaded(cls, checkpoint: Checkpoint, options: Options) -> "VideoSegmenter":
        """The same from what `load_checkpoint` returned."""
        return cls(checkpoint.model, checkpoint.variables, checkpoint.image_format, options)

    # ------------------------------------------------------------------------ a video at once

    def segment(
        self,
        frames: Iterable[np.ndarray],
        masks: Mapping[int, np.ndarray],
        return_probabilities: bool = False,
        times: list[float] | None = None,
    ) -> Iterator[Label] | Iterator[tuple[Label, Probabilities]]:
        """Yields one label per frame, in order; a frame's given mask is part of its label.

        Memory does not grow with the video: frames are read, by a thread, two ahead of the
        computation, which is one ahead of the consumer. Frames before the first mask are
        background.

        Args:
          frames: RGB frames, all of one size.
          masks: the given masks by frame index; at least one must hold an object.
          return_probabilities: yields (label, float32 [1 + objects, height, width]): background,
            then the ids known so far in ascending order. Given pixels are certain.
          times: if a list is passed, the seconds that each frame's computation took are appended.

        Raises:
          ValueError: a mask that is no label map or has another size than the frames, no object
            in any mask, a frame of another size, more objects or references than the options
            allow, a mask for a frame that does not come.
        """
        masks = {int(i): check_label(mask, f"mask of frame {i}") for i, mask in masks.items()}
        self._check_masks(masks)
        if isinstance(frames, Sized):
            _check_all_masks_used(masks, len(frames))
        return self._segment(frames, masks, return_probabilities, times)

    def _segment(self, frames, masks, return_probabilities, times):
        first = min(masks)
        video, count = _Video(self, return_probabilities), 0
        waiting: _Result | None = None
        clock = _Clock(times)
        try:
            for index, frame in enumerate(prefetch(frames)):
                count += 1
                if index < first:
                    result = video.background(frame)
                else:
                    result = video.advance(frame, masks.get(index))
                clock.started(result)
                finished, waiting = waiting, result
                if finished is not None:
                    yield finished.fetch()
        except (ValueError, OSError):
            if waiting is not None:  # what was finished before a bad frame is not lost
                yield waiting.fetch()
            raise
        finally:
            clock.close()
        if waiting is not None:
            yield waiting.fetch()
        _check_all_masks_used(masks, count)

    # ----------------------------------------------------------------------------- frame by frame

    def start(self, frame: np.ndarray, mask: np.ndarray) -> Label:
        """Begins a new video and forgets the last one. Returns the mask, its label."""
        mask = check_label(mask, "mask of frame 0")
        self._check_masks({0: mask}, empty_allowed=True)
        video = _Video(self, with_probabilities=False)
        label = video.advance(frame, mask).fetch()
        self._video = video  # only now: bad input leaves the running video as it was
        return label

    def step(self, frame: np.ndarray, mask: np.ndarray | None = None) -> Label:
        """The label of the next frame of the video that `start` began."""
        if self._video is None:
            raise ValueError("step was called before start")
        if mask is not None:
            mask = check_label(mask, f"mask of frame {self._video.index}")
        return self._video.advance(frame, mask).fetch()

    def _check_masks(self, masks: Mapping[int, Label], empty_allowed: bool = False) -> None:
        if any(index < 0 for index in masks):
            raise ValueError(f"masks are given for frames {sorted(masks)}; the first frame is 0")
        shapes = {mask.shape for mask in masks.values()}
        if len(shapes) > 1:
            raise ValueError(f"masks of one video have different sizes: {sorted(shapes)}")
        ids = set().union(*(np.unique(mask).tolist() for mask in masks.values())) - {0}
        if not ids and not empty_allowed:
            raise ValueError("no mask holds an object: every pixel given is background (0)")
        self.check_object_count(len(ids))
        self.check_reference_count(len(masks))

    def check_object_count(self, count: int) -> None:
        limit = self.options.max_objects
        if limit is not None and count > limit:
            raise ValueError(
                f"the masks hold {count} objects, and max_objects is {limit}: no row is left for "
                f"{count - limit} of them; raise max_objects or leave it None"
            )

    def check_reference_count(self, count: int, video: str = "the video") -> None:
        limit = self.options.max_references
        if count > limit:
            raise ValueError(
                f"{video} has masks for {count} frames, and max_references is {limit}: raise "
                "max_references (memory and the time per frame grow with the masks)"
            )

    # --------------------------------------------------------------------------------- memory

    def plan(self, size: tuple[int, int], num_objects: int, num_references: int = 1) -> MemoryPlan:
        """What a video of `size` (height, width) will take; compiles its programs, runs nothing.

        The programs of a frame take turns, so the larger one counts. Frames that wait to be read
        are not counted.

        Raises ValueError if that is more than `memory_mib`.
        """
        views = self._views_of(size)
        num_rows = self._num_rows(num_objects)
        chunks = self._chunks(views, size, num_rows, num_references)
        frame, label = (jax.ShapeDtypeStruct((*size, *c), np.uint8) for c in ((3,), ()))
        embed = self._embed.lower(self.variables, frame, views=views)
        features = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), embed.out_info)
        state = state_shapes(features, num_references)
        count = jax.ShapeDtypeStruct((), np.int32)
        predict = self._predict.lower(
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
        # A frame, its given mask, its rows and its label.
        frame_bytes = 6 * size[0] * size[1]
        plan = MemoryPlan(
            {
                "weights": self._weights,
                "references": memory.tree_bytes(state.views),
                "features of two frames": 2 * memory.tree_bytes(features),
                "two frames and their masks": 2 * frame_bytes,
                "computation": max(embedding, prediction),
            },
            chunks,
        )
        self._check_budget(plan, size, num_objects)
        return plan

    def _check_budget(self, plan: MemoryPlan, size: tuple[int, int], num_objects: int) -> None:
        budget = self.options.memory_mib
        if budget is not None and plan.peak > budget * MIB:
            raise ValueError(
                f"a video of {size[0]} x {size[1]} with {num_objects} objects takes {plan}, and "
                f"memory_mib is {budget}; {LESS_MEMORY}"
            )

    def _views_of(self, size: tuple[int, int]) -> tuple[View, ...]:
        options = self.options
        return test_time.views_of(size, options.scales, options.flip, options.max_long_edge)

    def _num_rows(self, num_objects: int) -> int:
        limit = self.options.max_objects
        return padded_rows(num_objects) if limit is None else 1 + limit

    def _chunks(
        self, views: tuple[View, ...], size: tuple[int, int], num_rows: int, num_references: int
    ) -> Chunks:
        model, options = self.model, self.options
        pixels = [-(-view.size[0] // 4) * -(-view.size[1] // 4) for view in views]
        # An embedding of every reference and of three frames, and the maps of a frame's rows.
        per_pixel = (padded_references(num_references) + 3) * model.embedding_dim
        maps = 3 * num_rows * (3 + 2 * len(model.windows))
        fixed = self._weights + 4 * sum(pixels) * per_pixel
        fixed += 4 * max(pixels) * maps
        budget = memory.default_budget()
        if options.memory_mib is not None:
            budget = options.memory_mib * MIB
        channels = 3 * model.embedding_dim + model.matching_dim
        return memory.choose_chunks(max(budget - fixed, 0), max(pixels), channels, num_rows, size)

    # -------------------------------------------------------------------------- jitted functions

    def _embed_views(self, variables, frame: UInt8[Array, "height width 3"], views) -> Features:
        self._log_compilation("embedding", frame.shape[:2], views)
        return tuple(
            self.model.apply(
                variables,
                test_time.view_frame(frame, view, self.image_format),
                method=CFBI.embed,
            )
            for view in views
        )

    def _predict_views(
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
        self._log_compilation(f"{num_rows - 1} objects, {references} references", size, views)
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
                None,
                chunks.rows_at_once,
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

    def _log_compilation(self, what: str, size: tuple[int, int], views: tuple[View, ...]) -> None:
        # Python runs the body of a jitted function exactly when a new program is compiled.
        self.num_compilations += 1
        seen = ", ".join(
            f"{view.size[0]} x {view.size[1]}{' mirrored' if view.mirrored else ''}"
            for view in views
        )
        LOGGER.info(
            "compilation %d: %s, video %d x %d, network %s",
            self.num_compilations,
            what,
            *size,
            seen,
        )


def _check_all_masks_used(masks: Mapping[int, Label], num_frames: int) -> None:
    missed = sorted(index for index in masks if index >= num_frames)
    if missed:
        raise ValueError(f"masks were given for frames {missed}, the video has {num_frames} frames")


class _Clock:
    """How long computing each frame took, whatever the reader and the consumer do meanwhile.

    A thread waits for each result, in order; a frame's time starts when the one before is ready.
    """

    def __init__(self, times: list[float] | None):
        self._times = times
        self._ready = 0.0
        self._thread = None if times is None else ThreadPoolExecutor(1, "clock")

    def started(self, result: "_Result") -> None:
        if self._thread is not None:
            self._thread.submit(self._wait, time.perf_counter(), result.rows)

    def _wait(self, started: float, rows: Array | np.ndarray) -> None:
        jax.block_until_ready(rows)
        ready = time.perf_counter()
        self._times.append(ready - max(started, self._ready))
        self._ready = ready

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()


@dataclasses.dataclass
class _Result:
    """One frame's label and probabilities, perhaps still being computed, in rows."""

    rows: Array | np.ndarray
    probabilities: Array | None
    given: np.ndarray | None
    ids: tuple[int, ...]  # of rows 1, 2, ...; some may be newer than the probabilities
    with_probabilities: bool

    def fetch(self) -> Label | tuple[Label, Probabilities]:
        """Waits for the computation; rows become ids."""
        ids = np.array((0, *self.ids), np.uint8)
        with _out_of_memory_explained():
            label = ids[np.asarray(self.rows)]
        if not self.with_probabilities:
            return label
        probabilities = np.zeros((len(ids), *label.shape), np.float32)
        if self.probabilities is None:
            probabilities[0] = 1
        else:
            known = min(len(ids), self.probabilities.shape[0])
            probabilities[:known] = np.asarray(self.probabilities)[:known]
        if self.given is not None:
            rows = np.arange(len(ids))[:, None, None]
            probabilities = np.where(self.given > 0, self.given == rows, probabilities)
        return label, probabilities[np.argsort(ids)].astype(np.float32)


@contextlib.contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    """Raises MemoryError, with what helps, where the device's memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"out of device memory; {LESS_MEMORY}\n{error}") from error


class _Video:
    """One video under way: the network's state and which row holds which id."""

    def __init__(self, segmenter: VideoSegmenter, with_probabilities: bool):
        self._segmenter = segmenter
        self._with_probabilities = with_probabilities
        self._views: tuple[View, ...] = ()
        self._size: tuple[int, int] | None = None
        self._state: State | None = None
        self._ids: tuple[int, ...] = ()  # in order of appearance; row 0 is the background
        self.index = 0  # of the next frame

    def background(self, frame: np.ndarray) -> _Result:
        """A frame before the first mask: there is nothing to look for yet."""
        self._check_frame(frame)
        self.index += 1
        return self._result(np.zeros(self._size, np.uint8), None, None)

    def advance(self, frame: np.ndarray, mask: Label | None) -> _Result:
        """Dispatches the computation of the next frame and takes it into the state."""
        self._check_frame(frame)
        self._check_mask(mask)
        segmenter = self._segmenter
        known = len(self._ids)
        given = None if mask is None else self._to_rows(mask)
        with _out_of_memory_explained():
            features = segmenter._embed(segmenter.variables, frame, views=self._views)

        probabilities = None
        if self._state is None or known == 0:  # nothing to predict but background
            rows = np.zeros(self._size, np.uint8) if given is None else given
        else:
            num_rows = segmenter._num_rows(known)
            references = self._state.views[0].reference.shape[0]
            with _out_of_memory_explained():
                rows, probabilities = segmenter._predict(
                    segmenter.variables,
                    self._state,
                    features,
                    np.zeros(self._size, np.uint8) if given is None else given,
                    np.int32(known),
                    views=self._views,
                    num_rows=num_rows,
                    with_probabilities=self._with_probabilities,
                    chunks=segmenter._chunks(self._views, self._size, num_rows, references),
                )
        self._state = remember(
            self._state, features, rows, self._views, as_reference=given is not None
        )
        self.index += 1
        return self._result(rows, probabilities, given)

    def _result(self, rows, probabilities, given) -> _Result:
        return _Result(rows, probabilities, given, self._ids, self._with_probabilities)

    def _check_frame(self, frame: np.ndarray) -> None:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3:
            found = f"{getattr(frame, 'dtype', type(frame))} {getattr(frame, 'shape', '')}"
            raise ValueError(f"frame {self.index} is {found}; expected uint8 [height, width, 3]")
        if frame.shape[2] != 3:
            raise ValueError(f"frame {self.index} has {frame.shape[2]} channels; expected 3, RGB")
        size = frame.shape[:2]
        if self._size is None:
            self._size = size
            self._views = self._segmenter._views_of(size)
        if size != self._size:
            raise ValueError(
                f"frame {self.index} has {size[0]} x {size[1]} pixels; expected "
                f"{self._size[0]} x {self._size[1]} as before"
            )

    def _check_mask(self, mask: Label | None) -> None:
        if mask is None:
            return
        if mask.shape != self._size:
            raise ValueError(
                f"the mask of frame {self.index} has {mask.shape[0]} x {mask.shape[1]} pixels; "
                f"expected {self._size[0]} x {self._size[1]} as its frame"
            )
        ids = set(np.unique(mask).tolist()) - {0}
        self._segmenter.check_object_count(len(ids | set(self._ids)))
        if self._state is not None:
            self._segmenter.check_reference_count(self._state.num_references + 1)

    def _to_rows(self, mask: Label) -> Label:
        """Ids -> rows; new ids get the next rows."""
        new = [i for i in np.unique(mask).tolist() if i and i not in self._ids]
        self._ids += tuple(new)
        table = np.zeros(256, np.uint8)
        table[list(self._ids)] = np.arange(1, len(self._ids) + 1)
        return table[mask]
