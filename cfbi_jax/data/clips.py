"""Which frames of a video make a training sample (a clip), and the sample itself.

    video     0 1 2 3 4 5 6 7 8 9       or reversed, half of the time
    clip        R     P C   C C         reference, previous, current 1..3

The reference is any frame that shows enough of the objects; current frames follow the previous one
closely, turning round at the end of the video.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from cfbi_jax.data import augment


@runtime_checkable
class TrainingVideo(Protocol):
    """A video with every frame annotated, read frame by frame; frames count from 0."""

    name: str

    def __len__(self) -> int:
        """The number of frames."""
        ...

    def frame(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB."""
        ...

    def mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """Ids; 0 is background, 255 nobody's (ignored in the loss)."""
        ...


@runtime_checkable
class ClipSource(Protocol):
    """Videos to draw clips from."""

    def __len__(self) -> int:
        """The number of videos."""
        ...

    def video(self, index: int, rng: np.random.Generator) -> TrainingVideo:
        """One video; `rng` is for sources that draw something new every time."""
        ...


@dataclass(frozen=True)
class ClipOptions:
    """How clips are drawn; the defaults are those of the paper and its released configuration.

    Attributes:
      num_current: current frames in a clip.
      max_gap: a current frame is 1 to this many frames after the one before.
      crop_size: side of the square frames of a clip; 16 n + 1, as the network wants it.
      short_edge: short edge of the scaled frames, in pixels, at scale 1.
      min_scale, max_scale: range of the scale.
      balanced_crop: whether windows are drawn again until the reference shows an object.
      colour_jitter: how far the colours of a clip, the same in all its frames, are from the video's
        (`augment.choose_colours`); 0: they are the video's, as in the paper.
      max_objects: a clip has at most this many; others become background.
      crop_tries: windows drawn in all for a balanced crop.
      min_object_pixels: an object is kept if it has more pixels in the reference of the clip.
      min_reference_pixels: the reference has more object pixels than this, in the whole frame.
      reference_tries: frames drawn in all until one can be the reference.
      consistency_tries: how often the frames of a clip are drawn again because one shows an object
        that the reference does not.

    Errors: ValueError for values out of range, or if the smallest scaled frame has no room for the
    crop.
    """

    num_current: int = 3
    max_gap: int = 3
    crop_size: int = 465
    short_edge: int = 480
    min_scale: float = 1.0
    max_scale: float = 1.3
    balanced_crop: bool = True
    colour_jitter: float = 0.0
    max_objects: int = 5
    crop_tries: int = 5
    min_object_pixels: int = 100
    min_reference_pixels: int = 200
    reference_tries: int = 5
    consistency_tries: int = 5

    def __post_init__(self):
        least = {
            **dict.fromkeys(("num_current", "max_gap", "short_edge", "max_objects"), 1),
            **dict.fromkeys(("crop_tries", "reference_tries"), 1),
            **dict.fromkeys(("min_object_pixels", "min_reference_pixels", "consistency_tries"), 0),
        }
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} = {getattr(self, name)}; expected {limit} or more")
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"colour_jitter = {self.colour_jitter}; expected 0 or more, below 1")
        if self.max_objects > 254:
            raise ValueError(f"max_objects = {self.max_objects}; expected at most 254, as ids go")
        if self.crop_size % 16 != 1 or self.crop_size < 17:
            below = max(17, (self.crop_size - 1) // 16 * 16 + 1)
            near = f"{below}" if self.crop_size < 17 else f"{below} or {below + 16}"
            raise ValueError(f"crop_size = {self.crop_size}; expected 16 n + 1, such as {near}")
        if not 0 < self.min_scale <= self.max_scale < math.inf:
            raise ValueError(
                f"scales from {self.min_scale} to {self.max_scale}; expected 0 < min_scale <="
                " max_scale < inf"
            )
        smallest = round(self.short_edge * self.min_scale)
        if smallest < self.crop_size:
            raise ValueError(
                f"short_edge {self.short_edge} x min_scale {self.min_scale} = {smallest} pixels;"
                f" expected at least crop_size = {self.crop_size}"
            )


@dataclass(frozen=True)
class Clip:
    """A training sample.

    Attributes:
      name: the video's.
      frames: RGB: reference, previous, current 1..n.
      labels: rows of the network, in the same order: 0 is background, 1..num_objects, 255 ignored.
      num_objects: may be 0: such a clip trains background only.
    """

    name: str
    frames: UInt8[np.ndarray, "frames crop crop 3"]
    labels: UInt8[np.ndarray, "frames crop crop"]
    num_objects: int


def sample_clip(video: TrainingVideo, rng: np.random.Generator, options: ClipOptions) -> Clip:
    """Draws a clip, determined by the state of `rng`.

    Errors: ValueError, naming the video, for fewer than two frames, and for frames and masks of
    different sizes; those of the video's own reading.
    """
    if len(video) < 2:
        raise ValueError(f"{video.name}: {len(video)} frames; expected two at least for a clip")
    mask = functools.cache(video.mask)
    frame = functools.cache(video.frame)
    times = choose_frames(len(video), mask, rng, options)

    reference = mask(times[0])
    view = augment.choose_view(
        reference,
        rng,
        short_edge=round(options.short_edge * rng.uniform(options.min_scale, options.max_scale)),
        side=options.crop_size,
        tries=options.crop_tries if options.balanced_crop else 1,
        min_object_pixels=options.min_object_pixels,
    )
    ids = augment.choose_objects(
        augment.view_label(reference, view),
        rng,
        min_object_pixels=options.min_object_pixels,
        max_objects=options.max_objects,
    )
    for t in times:
        sizes = (frame(t).shape[:2], mask(t).shape)
        if sizes != (reference.shape, reference.shape):
            raise ValueError(
                f"{video.name}: frame {t} has size {sizes[0]} and its mask {sizes[1]}; expected"
                f" {reference.shape} as the mask of frame {times[0]}"
            )
    frames = [augment.view_frame(frame(t), view) for t in times]
    if options.colour_jitter:
        colours = augment.choose_colours(rng, options.colour_jitter)
        frames = [augment.change_colours(x, colours) for x in frames]
    return Clip(
        name=video.name,
        frames=np.stack(frames),
        # What the view of the reference does not show becomes background in all frames, objects
        # that are unknown to the whole reference included.
        labels=augment.renumber(
            np.stack([augment.view_label(mask(t), view) for t in times]), ids.tolist()
        ),
        num_objects=len(ids),
    )


def choose_frames(
    num_frames: int,
    mask: Callable[[int], np.ndarray],
    rng: np.random.Generator,
    options: ClipOptions,
) -> list[int]:
    """The frames of a clip: reference, previous, current 1..n, as indices of the video.

    Frames are drawn again, up to `options.consistency_tries` times, while one after the reference
    shows an object that the reference does not; the last draw is kept as it is.

    Args:
      num_frames: of the video, two or more.
      mask: gives the mask of a frame, uint8 [h, w]; only those that are needed are asked for, some
        of them repeatedly.
    """
    backwards = rng.random() < 0.5

    def objects(t: int) -> set[int]:
        return set(augment.objects_above(mask(t), 0).tolist())

    for _ in range(1 + options.consistency_tries):
        following = _following_frames(num_frames, rng, options)
        if backwards:
            following = [num_frames - 1 - t for t in following]
        reference = _reference_frame(num_frames, mask, rng, options)
        known = objects(reference)
        if all(objects(t) <= known for t in following):
            break
    return [reference, *following]


def _following_frames(num_frames: int, rng: np.random.Generator, options: ClipOptions) -> list[int]:
    """Previous frame and current frames of a video that is not reversed."""
    gaps = rng.integers(1, options.max_gap + 1, size=options.num_current)
    positions = np.cumsum([rng.integers(num_frames), *gaps])
    # Reflected at the last frame and, in videos shorter than a clip, at the first one again.
    period = 2 * (num_frames - 1)
    positions %= period
    return np.minimum(positions, period - positions).tolist()


def _reference_frame(
    num_frames: int,
    mask: Callable[[int], np.ndarray],
    rng: np.random.Generator,
    options: ClipOptions,
) -> int:
    """A random frame with enough object pixels, or the last one tried."""
    for _ in range(options.reference_tries):
        t = int(rng.integers(num_frames))
        label = mask(t)
        if np.count_nonzero((label != 0) & (label != augment.NOBODY)) > (
            options.min_reference_pixels
        ):
            break
    return t
