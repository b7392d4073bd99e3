"""Videos drawn by a program, with exact masks: to try things without downloading, and to train on.

Textured blobs move, turn, grow, shrink, change their outline and pass in front of one another over
a moving background, while the light changes. Blobs and background are drawn patterns or pieces of
photographs. Some blobs look like an object but are none (distractors, label 0).
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from cfbi_jax import locks
from cfbi_jax.data import synthetic_looks as looks
from cfbi_jax.data.image_files import write_image, write_mask
from cfbi_jax.files import write_file

MAX_OBJECTS = 10
NAME_PREFIX = "synthetic-"

FIRST_TRAINING_SEED = 1_000_000
"""Videos to train on have seeds from here on; those below are for evaluation."""

_OUTLINE_POINTS = 72
_OUTLINE_WAVES = np.arange(2, 6)  # 2: oval, 3: triangular, ...
_AROUND = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
_SUPERSAMPLING = 4  # how much finer than pixels outlines are drawn, each way
_VISIBLE_AT_START = 0.005  # smallest share of the first frame that an object takes
_FRAMES_KEPT = 8  # more than a training clip has

# First number of the seeds of the random generators, so that none repeats another.
_PLACES, _LOOKS, _CAMERA = 1, 2, 3


class SyntheticVideo:
    """A video whose frames are drawn when asked for, each on its own; see `synthetic_video`.

    Attributes:
      name: says the seed and the number of objects, which (with the size) determine the video.
    """

    def __init__(
        self,
        seed: int,
        num_frames: int = 24,
        size: tuple[int, int] = (96, 160),
        num_objects: int = 2,
    ):
        if num_frames < 1 or min(size) < 32 or not 1 <= num_objects <= MAX_OBJECTS:
            raise ValueError(
                f"{num_frames} frames of {size} with {num_objects} objects; expected 1 frame or"
                f" more of 32 x 32 pixels or more with 1 to {MAX_OBJECTS} objects"
            )
        self.name = f"{NAME_PREFIX}{seed:04d}-objects-{num_objects}"
        self.seed, self.num_frames, self.size = seed, num_frames, tuple(size)
        self._blobs = _visible_blobs(seed, self.size, num_objects)
        rng = np.random.default_rng((_LOOKS, seed))
        self._textures = _textures(rng, self._blobs, num_objects)
        self._background = looks.Background(rng, self.size)
        self._light = looks.Light(rng)
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.num_frames

    def frame(self, t: int) -> UInt8[np.ndarray, "height width 3"]:
        """Frame `t`, RGB, read-only. Errors: IndexError outside the video."""
        return self._draw(t)[0]

    def mask(self, t: int) -> UInt8[np.ndarray, "height width"]:
        """The object ids of frame `t`, read-only. Errors: IndexError outside the video."""
        return self._draw(t)[1]

    def _draw(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= time < self.num_frames:
            raise IndexError(f"{self.name}: frame {time} of {self.num_frames}")
        if time not in self._drawn:
            if len(self._drawn) >= _FRAMES_KEPT:
                del self._drawn[next(iter(self._drawn))]  # the oldest
            frame = self._background.at(time)
            label = np.zeros(self.size, np.uint8)
            for blob, texture in zip(self._blobs, self._textures, strict=True):
                _paint(frame, label, blob, texture, time)
            frame = cv2.LUT(frame, self._light.table(time))
            noise = looks.camera_noise(np.random.default_rng((_CAMERA, self.seed, time)), self.size)
            frame = cv2.add(frame, noise, dtype=cv2.CV_8U)
            frame.setflags(write=False)
            label.setflags(write=False)
            self._drawn[time] = frame, label
        return self._drawn[time]


class SyntheticVideos:
    """Videos to train on without end: every one that is asked for is a new one.

    Args:
      seed: 0 or more; determines the videos together with what `video` is given.
      num_videos: how many make an epoch.
      num_frames, size: of each video.
      max_objects: videos have 1 to this many objects.

    Errors: ValueError for arguments outside the ranges of `synthetic_video`.
    """

    def __init__(
        self,
        seed: int,
        num_videos: int = 1000,
        num_frames: int = 24,
        size: tuple[int, int] = (96, 160),
        max_objects: int = 3,
    ):
        if seed < 0 or num_videos < 1 or not 1 <= max_objects <= MAX_OBJECTS:
            raise ValueError(
                f"seed {seed}, {num_videos} videos with up to {max_objects} objects; expected seed"
                f" 0 or more, 1 video or more with up to 1 to {MAX_OBJECTS} objects"
            )
        self.seed, self.num_videos, self.num_frames = seed, num_videos, num_frames
        self.size, self.max_objects = tuple(size), max_objects

    def __len__(self) -> int:
        return self.num_videos

    def video(self, index: int, rng: np.random.Generator) -> SyntheticVideo:
        """A new video, of a seed from `FIRST_TRAINING_SEED` on. Errors: IndexError."""
        if not 0 <= index < self.num_videos:
            raise IndexError(f"video {index} of {self.num_videos}")
        mixed = np.random.default_rng((self.seed, index, int(rng.integers(2**63))))
        seed = int(mixed.integers(FIRST_TRAINING_SEED, 2**31))
        num_objects = int(mixed.integers(1, self.max_objects, endpoint=True))
        return SyntheticVideo(seed, self.num_frames, self.size, num_objects)


def synthetic_video(
    seed: int,
    num_frames: int = 24,
    size: tuple[int, int] = (96, 160),
    num_objects: int = 2,
) -> tuple[UInt8[np.ndarray, "time height width 3"], UInt8[np.ndarray, "time height width"]]:
    """Draws a video: RGB frames and the exact label of each, both determined by the arguments.

    Args:
      seed: 0 or more.
      num_frames: 1 or more.
      size: (height, width) in pixels, 32 or more each.
      num_objects: 1 to 10, with ids from 1; every object is visible in the first frame, later ones
        may be hidden or partly outside.

    Errors: ValueError for arguments outside these ranges.
    """
    video = SyntheticVideo(seed, num_frames, size, num_objects)
    frames = np.empty((num_frames, *size, 3), np.uint8)
    labels = np.empty((num_frames, *size), np.uint8)
    for time in range(num_frames):
        frames[time], labels[time] = video.frame(time), video.mask(time)
    return frames, labels


def write_davis(
    root: Path | str,
    seeds: Sequence[int],
    split: str = "val",
    year: int = 2017,
    resolution: str = "480p",
    num_frames: int = 24,
    size: tuple[int, int] = (96, 160),
    num_objects: int = 2,
) -> list[str]:
    """Writes a synthetic video per seed as a DAVIS folder and returns the sequences' names.

    Sequences of these names that are there already are replaced unless they are the same (another
    process may be reading them), and so is the list of the split, last. `resolution` only names
    the folder. In the 2016 list objects count as one, as always.

    Errors: FileExistsError if the list names other than synthetic sequences; those of
    `synthetic_video`.
    """
    root = Path(root)
    list_file = root / "ImageSets" / str(year) / f"{split}.txt"
    if list_file.exists():
        others = [n for n in list_file.read_text().split() if not n.startswith(NAME_PREFIX)]
        if others:
            raise FileExistsError(f"{list_file}: lists {others[0]}, which is not synthetic")
    names = [f"{NAME_PREFIX}{seed:04d}" for seed in seeds]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a") as lock:
        locks.take(lock, wait=True)
        for name, seed in zip(names, seeds, strict=True):
            frames, labels = synthetic_video(seed, num_frames, size, num_objects)
            _replace_folder(
                root / "JPEGImages" / resolution / name,
                {f"{time:05d}.jpg": frame for time, frame in enumerate(frames)},
            )
            _replace_folder(
                root / "Annotations" / resolution / name,
                {f"{time:05d}.png": label for time, label in enumerate(labels)},
            )
        write_file(list_file, "".join(f"{name}\n" for name in names).encode())
    return names


def _replace_folder(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    """Writes frames [h, w, 3] or labels [h, w] to a new folder, which then replaces the old one."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, picture in pictures.items():
        write = write_image if picture.ndim == 3 else write_mask
        write(temporary / name, picture)
    if folder.exists():
        if _same_files(temporary, folder):  # another process may be reading them
            shutil.rmtree(temporary)
            return
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    if names != sorted(path.name for path in b.iterdir()):
        return False
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


# ---- What is in a video ----


@dataclass(frozen=True)
class _Blob:
    """How a thing moves; lengths in pixels, angles in radians, speeds per frame.

    Attributes:
      object_id: its label; 0 for a distractor.
      looks_like: the id of the object whose look it has; its own, if it is one.
      radius: of the outline, before its waves.
      waves, phases, phase_speeds: the outline's waves, relative to the radius.
      start, speed: of the centre, (x, y); it is reflected near the borders of the picture.
      angle, spin: rotation of outline and texture.
      swing, swing_phase, swing_speed: the scale is 1 + swing * sin(...).
      shade: its brightness is 1 + shade * cos(...), of the same phase as the scale.
    """

    object_id: int
    looks_like: int
    radius: float
    waves: Float[np.ndarray, " waves"]
    phases: Float[np.ndarray, " waves"]
    phase_speeds: Float[np.ndarray, " waves"]
    start: Float[np.ndarray, " 2"]
    speed: Float[np.ndarray, " 2"]
    angle: float
    spin: float
    swing: float
    swing_phase: float
    swing_speed: float
    shade: float


def _visible_blobs(seed: int, size: tuple[int, int], num_objects: int) -> list[_Blob]:
    """Blobs, from back to front, none of whose objects is hidden in the first frame."""
    # Few seeds need a second attempt.
    for attempt in range(100):
        blobs = _random_blobs(np.random.default_rng((_PLACES, seed, attempt)), size, num_objects)
        label = np.zeros(size, np.uint8)
        for blob in blobs:
            box, cover = _cover(_outline(blob, 0, size), size)
            label[box][cover >= 128] = blob.object_id
        areas = np.bincount(label.ravel(), minlength=num_objects + 1)[1:]
        if areas.min() >= _VISIBLE_AT_START * label.size:
            return blobs
    raise ValueError(f"seed {seed}: no room for {num_objects} objects in {size} pixels")


def _random_blobs(rng: np.random.Generator, size: tuple[int, int], num_objects: int) -> list[_Blob]:
    """Objects and distractors, from back to front."""
    largest = 0.32 * min(size) / num_objects**0.4
    centres: list[np.ndarray] = []
    blobs = []
    ids = range(1, num_objects + 1)
    for i, like in enumerate([*ids, *rng.choice(ids, size=rng.integers(1, 4)).tolist()]):
        centres.append(_far_from(centres, rng, size))
        direction = rng.uniform(0, 2 * np.pi)
        pace = min(size) * rng.uniform(0.01, 0.026)
        blobs.append(
            _Blob(
                object_id=like if i < num_objects else 0,
                looks_like=like,
                radius=largest * rng.uniform(0.65, 1.0),
                waves=rng.uniform(0, 0.5, len(_OUTLINE_WAVES)) / _OUTLINE_WAVES,
                phases=rng.uniform(0, 2 * np.pi, len(_OUTLINE_WAVES)),
                phase_speeds=rng.uniform(-0.1, 0.1, len(_OUTLINE_WAVES)),
                start=centres[-1],
                speed=pace * np.array([np.cos(direction), np.sin(direction)]),
                angle=rng.uniform(0, 2 * np.pi),
                spin=rng.uniform(-0.08, 0.08),
                swing=rng.uniform(0.05, 0.3),
                swing_phase=rng.uniform(0, 2 * np.pi),
                swing_speed=rng.uniform(0.05, 0.15),
                shade=rng.uniform(0, 0.15),
            )
        )
    return [blobs[i] for i in rng.permutation(len(blobs))]


def _far_from(
    others: Sequence[np.ndarray], rng: np.random.Generator, size: tuple[int, int]
) -> Float[np.ndarray, " 2"]:
    """A place (x, y): of several random ones that which is farthest from `others`."""
    height, width = size
    places = rng.uniform([0.15 * width, 0.15 * height], [0.85 * width, 0.85 * height], (12, 2))
    if not others:
        return places[0]
    distances = np.linalg.norm(places[:, None] - np.array(others)[None], axis=-1)
    return places[distances.min(axis=1).argmax()]


def _textures(
    rng: np.random.Generator, blobs: Sequence[_Blob], num_objects: int
) -> list[UInt8[np.ndarray, "side side 3"]]:
    """The square picture of each blob, somewhat larger than the blob."""
    # Outlines reach 1.65 times the radius at most.
    sides = [int(4 * blob.radius) + 8 for blob in blobs]
    side_of_id = {blob.object_id: side for blob, side in zip(blobs, sides, strict=True)}
    ids = range(1, num_objects + 1)
    textures = looks.object_textures(rng, [side_of_id[i] for i in ids])
    return [
        textures[blob.looks_like - 1]
        if blob.object_id
        else looks.similar_texture(rng, textures[blob.looks_like - 1], side)
        for blob, side in zip(blobs, sides, strict=True)
    ]


# ---- One blob in one frame ----


def _paint(
    frame: UInt8[np.ndarray, "height width 3"],
    label: UInt8[np.ndarray, "height width"],
    blob: _Blob,
    texture: UInt8[np.ndarray, "side side 3"],
    time: int,
) -> None:
    """Draws a blob over what `frame` and `label` hold."""
    box, cover = _cover(_outline(blob, time, label.shape), label.shape)
    centre, angle, scale = _pose(blob, time, label.shape)
    middle = (np.array(texture.shape[:2]) - 1) / 2
    corner = np.array([box[1].start, box[0].start])
    drawn = looks.warp(texture, looks.affine(middle, centre - corner, angle, scale), cover.shape)
    shade = 1 + blob.shade * np.cos(blob.swing_phase + blob.swing_speed * time)
    drawn = cv2.convertScaleAbs(drawn, alpha=shade)
    share = cover.astype(np.float32) / 255
    frame[box] = cv2.blendLinear(drawn, np.ascontiguousarray(frame[box]), share, 1 - share)
    label[box][cover >= 128] = blob.object_id


def _pose(
    blob: _Blob, time: int, size: tuple[int, int]
) -> tuple[Float[np.ndarray, " 2"], float, float]:
    """Centre (x, y), angle and scale."""
    low = 0.1 * np.array(size[::-1])
    # Moving on and back between the borders: a triangle wave.
    span = 0.8 * np.array(size[::-1])
    position = (blob.start - low + blob.speed * time) % (2 * span)
    centre = low + np.minimum(position, 2 * span - position)
    scale = 1 + blob.swing * float(np.sin(blob.swing_phase + blob.swing_speed * time))
    return centre, blob.angle + blob.spin * time, scale


def _outline(blob: _Blob, time: int, size: tuple[int, int]) -> Float[np.ndarray, "points 2"]:
    """The corners (x, y) of its polygon; whole numbers are the centres of pixels."""
    centre, angle, scale = _pose(blob, time, size)
    phases = _OUTLINE_WAVES[:, None] * _AROUND + (blob.phases + blob.phase_speeds * time)[:, None]
    radii = blob.radius * scale * (1 + blob.waves @ np.cos(phases))
    directions = np.stack([np.cos(_AROUND + angle), np.sin(_AROUND + angle)], axis=-1)
    return centre + radii[:, None] * directions


def _cover(
    outline: Float[np.ndarray, "points 2"], size: tuple[int, int]
) -> tuple[tuple[slice, slice], UInt8[np.ndarray, "rows columns"]]:
    """The box (rows, columns) that the polygon is in, and how much it covers of each pixel there,
    0..255.
    """
    height, width = size
    left, top = np.maximum(np.floor(outline.min(axis=0)), 0).astype(int).tolist()
    right, bottom = (
        np.minimum(np.ceil(outline.max(axis=0)) + 1, [width, height]).astype(int).tolist()
    )
    shape = (bottom - top, right - left)
    fine = np.zeros((shape[0] * _SUPERSAMPLING, shape[1] * _SUPERSAMPLING), np.uint8)
    # Pixel centres are at whole numbers in both grids, hence the half steps.
    points = np.rint((outline - [left, top] + 0.5) * _SUPERSAMPLING - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [points], 255)
    cover = cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA)
    return (slice(top, bottom), slice(left, right)), cover
