"""`VideoSegmenter`: propagates the masks of given frames through a video."""

import copy
import inspect
import logging
import numbers
import operator
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from cfbi_jax.compilation import DEFAULT, use_compilation_cache
from cfbi_jax.data.image_files import check_label, ids_in, shades_in
from cfbi_jax.data.prefetch import prefetch
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.programs import Programs
from cfbi_jax.inference.propagation import Label, Prediction, Probabilities, Propagation
from cfbi_jax.memory import MemoryPlan
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import ImageFormat
from cfbi_jax.weights.checkpoint import Checkpoint, load_checkpoint

LOGGER = logging.getLogger(__name__)

# Seconds that a video which is stopped early waits for the frame that is being read.
PATIENCE = 1.0


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

    The options' types replace those of the model's own fields, and its atrous rates where given. It
    stays on the device that was JAX's default when it was made (`with jax.default_device(...)`).
    JAX's settings in the program around it (64 bits, a mesh, strict promotions) change nothing.
    """

    def __init__(
        self,
        model: CFBI,
        variables: Mapping,
        image_format: ImageFormat,
        options: Options | None = None,
    ):
        self.options = options or Options()
        self.programs = Programs(model, variables, image_format, self.options)
        self._video: Propagation | None = None

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, compilation_cache: str | Path | None = DEFAULT, **options
    ) -> "VideoSegmenter":
        """Loads a checkpoint folder. `options` are the fields of `Options`.

        `compilation_cache` is the folder where this process' compiled programs are kept between
        runs ("default": see `compilation.use_compilation_cache`; None: JAX's settings stay).

        Raises ValueError for an option out of its range, and the errors of `load_checkpoint`.
        """
        options = Options(**options)
        use_compilation_cache(compilation_cache)
        return cls.from_loaded(load_checkpoint(path), options)

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

        Memory does not grow with the video: frames are read, by a thread, three ahead of the
        computation, which is one ahead of the consumer. Frames before the first mask are
        background.

        Args:
          frames: RGB frames, all of one size. A generator is closed at the end, early or not.
          masks: the given masks by frame index; at least one must hold an object.
          return_probabilities: yields (label, float32 [1 + objects, height, width]): background,
            then the ids known so far in ascending order. Given pixels are certain. They are
            computed at once, which neither `plan` nor `memory_mib` knows.
          times: if a list is passed, the seconds that each frame's computation took are appended.

        Raises:
          ValueError: a mask that is no label map or has another size than the frames, no object
            in any mask, a frame of another size, more objects or references than the options
            allow, a mask for a frame that does not come.
          TypeError: masks that are no mapping, or a file's name in place of frames.
          MemoryError: what the device's memory does not hold.
        """
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks is {type(masks)}; expected {{index of the frame: mask}}")
        if isinstance(frames, (str, Path)):
            raise TypeError(f"frames is {frames!r}; expected arrays, such as read_frames gives")
        # Copies: the caller may write over masks and frames before they are used.
        masks = {
            operator.index(i): np.array(_checked(mask, f"mask of frame {i}"))
            for i, mask in masks.items()
        }
        self._check_masks(masks)
        try:
            count = len(frames)
        except TypeError:  # only known at the end; progress bars may have no length, either
            pass
        else:
            _check_all_masks_used(masks, count)
        return self._segment(frames, masks, return_probabilities, times)

    def _segment(self, frames, masks, return_probabilities, times):
        first = min(masks)
        video, count = Propagation(self.programs, return_probabilities), 0
        waiting: Prediction | None = None
        finished: Prediction | None = None
        clock = _Clock(times)
        try:
            for index, frame in enumerate(prefetch(_copies(frames), PATIENCE)):
                count += 1
                if index == 0:
                    _check_mask_size(masks[first], frame, first)
                started = time.perf_counter()
                if index < first:
                    result = video.background(frame)
                else:
                    result = video.advance(frame, masks.get(index))
                clock.add(started, result)
                finished, waiting = waiting, result
                if finished is not None:
                    label = finished.fetch()
                    finished = None
                    yield label
        except Exception:
            # What was finished before a bad frame is not lost.
            if waiting is not None and finished is None:
                yield waiting.fetch()
            raise
        finally:
            clock.close()
        if waiting is not None:
            yield waiting.fetch()
        _check_all_masks_used(masks, count)

    # ----------------------------------------------------------------------------- frame by frame

    def start(self, frame: np.ndarray, mask: np.ndarray) -> Label:
        """Begins a new video and forgets the last one. Returns the mask, its label.

        `mask` may be empty. Errors: those of `segment`, after which the last video goes on.
        """
        mask = _checked(mask, "mask of frame 0")
        self._check_masks({0: mask}, empty_allowed=True)
        video = Propagation(self.programs, with_probabilities=False)
        label = video.advance(frame, mask).fetch()
        self._video = video  # only now: bad input leaves the running video as it was
        return label

    def step(self, frame: np.ndarray, mask: np.ndarray | None = None) -> Label:
        """The label of the next frame of the video that `start` began.

        Errors: those of `segment`, after which (Ctrl-C, too) the same frame can be tried again, and
        ValueError before `start`.
        """
        if self._video is None:
            raise ValueError("step was called before start")
        if mask is not None:
            mask = _checked(mask, f"mask of frame {self._video.index}")
        video = copy.copy(self._video)  # its state is immutable
        label = video.advance(frame, mask).fetch()
        self._video = video
        return label

    def _check_masks(self, masks: Mapping[int, Label], empty_allowed: bool = False) -> None:
        if any(index < 0 for index in masks):
            raise ValueError(f"masks are given for frames {sorted(masks)}; the first frame is 0")
        shapes = {mask.shape for mask in masks.values()}
        if len(shapes) > 1:
            raise ValueError(f"masks of one video have different sizes: {sorted(shapes)}")
        ids = set().union(*(ids_in(mask).tolist() for mask in masks.values())) - {0}
        if not ids and not empty_allowed:
            raise ValueError("no mask holds an object: every pixel given is background (0)")
        self.options.check_object_count(len(ids))
        self.options.check_reference_count(len(masks))

    # --------------------------------------------------------------------------------- memory

    def plan(self, size: tuple[int, int], num_objects: int, num_references: int = 1) -> MemoryPlan:
        """What a video of `size` (height, width) will take; compiles its programs, runs nothing.

        Raises ValueError if that is more than `memory_mib` (a warning where it is the default), for
        none or for more objects or references than the options allow, or a size that is none.
        """
        counts = {"num_objects": num_objects, "num_references": num_references}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if len(size) != 2 or not all(isinstance(n, numbers.Integral) and n > 0 for n in size):
            raise ValueError(f"size is {size}; expected (height, width)")
        self.options.check_object_count(num_objects)
        self.options.check_reference_count(num_references)
        return self.programs.plan(size, num_objects, num_references)


def _checked(mask: np.ndarray, name: str) -> Label:
    """The mask as a label map; a warning where its ids look like shades, which are no error here:
    clicks and thin lines may be the objects of an array."""
    label = check_label(mask, name)
    if shades := shades_in(label):
        LOGGER.warning("%s: %s", name, shades)
    return label


def _copies(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, each as it is when it comes: a source may fill one array again and again."""
    iterator = iter(frames)
    try:
        for frame in iterator:
            yield frame.copy() if isinstance(frame, np.ndarray) else frame
    finally:
        if inspect.isgenerator(iterator):
            iterator.close()


def _check_mask_size(mask: Label, frame: np.ndarray, index: int) -> None:
    """All masks have one size: wrong, it would be found out when the first one comes."""
    if isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[:2] != mask.shape:
        raise ValueError(
            f"the mask of frame {index} has {mask.shape[0]} x {mask.shape[1]} pixels; expected "
            f"{frame.shape[0]} x {frame.shape[1]} as the frames"
        )


def _check_all_masks_used(masks: Mapping[int, Label], num_frames: int) -> None:
    missed = sorted(index for index in masks if index >= num_frames)
    if missed:
        raise ValueError(f"masks were given for frames {missed}, the video has {num_frames} frames")


class _Clock:
    """How long computing each frame took, whatever the reader and the consumer do meanwhile.

    A thread waits for each result, in order. A frame's time starts when it is taken up, or when the
    result before is ready if that is later, so the times add up to no more than the whole takes.
    """

    def __init__(self, times: list[float] | None):
        self._times = times
        self._ready = 0.0
        self._thread = None if times is None else ThreadPoolExecutor(1, "clock")

    def add(self, started: float, result: Prediction) -> None:
        """`started`: when the frame was taken up, by `time.perf_counter`."""
        if self._thread is not None:
            self._thread.submit(self._wait, started, result.rows)

    def _wait(self, started: float, rows: Array | np.ndarray) -> None:
        jax.block_until_ready(rows)
        ready = time.perf_counter()
        self._times.append(ready - max(started, self._ready))
        self._ready = ready

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
