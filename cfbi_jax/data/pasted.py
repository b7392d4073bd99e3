"""Videos with the objects of another one pasted into them: several objects from single-object data.

    before          and            after
    [  cow     ]    [     dog ]    [ dog cow  ]    the dog moves as it does in its own video

Not part of the paper. The other video is sometimes the same one, perhaps mirrored and mostly at
another time: then only place and motion tell the object from its double.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from cfbi_jax.data.augment import NOBODY
from cfbi_jax.data.clips import ClipSource, TrainingVideo
from cfbi_jax.files import BadFile

MAX_ID = 127  # a pasted object has its own id plus this
_SCALES = (0.6, 1.1)  # of what is pasted, in pixels of the video that it goes into


class PastedVideos:
    """A `ClipSource`: the videos of `source`, a `share` of them with pasted objects.

    Of these the share `doubles` get their own objects, the others those of any video.

    Errors: ValueError for a share outside [0, 1].
    """

    def __init__(self, source: ClipSource, share: float, doubles: float = 0.25):
        for name, value in (("paste", share), ("paste_doubles", doubles)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}; expected a share from 0 to 1")
        self.source = source
        self._share, self._doubles = share, doubles

    def __len__(self) -> int:
        return len(self.source)

    def video(self, index: int, rng: np.random.Generator) -> TrainingVideo:
        """A video, determined by the state of `rng`. Errors: those of the source."""
        video = self.source.video(index, rng)
        if rng.random() >= self._share:
            return video
        if rng.random() >= self._doubles:
            index = int(rng.integers(len(self.source)))
        return _random_paste(video, self.source.video(index, rng), rng)


@dataclass(frozen=True)
class _PastedVideo:
    """A `TrainingVideo`.

    Attributes:
      video: what is seen everywhere but where objects are pasted.
      other: whose objects are pasted.
      start: frame t gets the objects of frame `start + t` of `other`; time turns round at its ends.
      matrix: from positions (x, y) in frames of `other` to those in frames of `video`.
      behind: whether the objects of `video` hide the pasted ones.
    """

    video: TrainingVideo
    other: TrainingVideo
    start: int
    matrix: Float[np.ndarray, "2 3"]
    behind: bool

    @property
    def name(self) -> str:
        return f"{self.video.name}+{self.other.name}"

    def __len__(self) -> int:
        return len(self.video)

    def frame(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB."""
        frame = self.video.frame(t).astype(np.float32)
        label, other, time = self.video.mask(t), self.other, self._time(t)
        cover = self._moved(np.float32(_is_object(other.mask(time))), label.shape)
        if self.behind:
            cover[_is_object(label)] = 0
        pasted = self._moved(other.frame(time), label.shape)
        return np.rint(frame + cover[..., None] * (pasted - frame)).astype(np.uint8)

    def mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """Ids; 0 is background, 255 nobody's; pasted objects have their id plus 127.

        Errors: BadFile, naming the video, for ids above 127.
        """
        label, other = self.video.mask(t), self.other.mask(self._time(t))
        for name, ids in ((self.video.name, label), (self.other.name, other)):
            largest = ids[_is_object(ids)].max(initial=0)
            if largest > MAX_ID:
                raise BadFile(
                    f"{name}: object {largest}; expected ids up to {MAX_ID}, as others are "
                    "pasted into this source (paste = 0 takes any)"
                )
        other = np.where(_is_object(other), other, np.uint8(0))
        pasted = self._moved(other, label.shape, cv2.INTER_NEAREST)
        visible = (pasted > 0) & ~(_is_object(label) if self.behind else False)
        return np.where(visible, pasted + np.uint8(MAX_ID), label)

    def _time(self, t: int) -> int:
        last = len(self.other) - 1
        position = (self.start + t) % max(1, 2 * last)
        return min(position, 2 * last - position)

    def _moved(
        self, picture: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_LINEAR
    ) -> np.ndarray:
        """A picture of `other` at its place in frames of `size`; 0 where there is none."""
        return cv2.warpAffine(picture, self.matrix, size[::-1], flags=interpolation)


def _random_paste(
    video: TrainingVideo, other: TrainingVideo, rng: np.random.Generator
) -> _PastedVideo:
    """`video` with the objects of `other` at a random place, size and time, perhaps mirrored."""
    start = int(rng.integers(len(other)))
    label = other.mask(start)
    height, width = video.mask(0).shape
    scale = rng.uniform(*_SCALES) * min(height, width) / min(label.shape)
    mirror = -1 if rng.random() < 0.5 else 1
    linear = np.diag([mirror * scale, scale])
    rows, columns = np.nonzero(_is_object(label))
    centre = np.array(label.shape[::-1]) / 2
    if len(rows):
        centre = np.array([columns.mean(), rows.mean()])
    place = rng.uniform(0.1, 0.9, 2) * [width, height]
    matrix = np.concatenate([linear, (place - linear @ centre)[:, None]], axis=1)
    return _PastedVideo(video, other, start, matrix, behind=bool(rng.random() < 0.5))


def _is_object(label: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    return (label != 0) & (label != NOBODY)
