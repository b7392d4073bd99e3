"""Videos drawn by a program, with exact masks: to try things without downloading, and to train on.

Textured blobs move, turn, grow, shrink, change their outline and pass in front of one another over
a moving background. Some blobs look like an object but are none (distractors, label 0).
"""

import colorsys
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from cfbi_jax.data.image_files import write_file, write_image, write_mask

MAX_OBJECTS = 10
NAME_PREFIX = "synthetic-"

_OUTLINE_POINTS = 72
_OUTLINE_WAVES = np.arange(2, 6)  # 2: oval, 3: triangular, ...
_SUPERSAMPLING = 4  # how much finer than pixels outlines are drawn, each way
_VISIBLE_AT_START = 0.005  # smallest share of the first frame that an object takes


@dataclass(frozen=True)
class _Blob:
    """A moving thing; lengths in pixels, angles in radians, speeds per frame.

    Attributes:
      object_id: its label; 0 for a distractor.
      texture: its picture, larger than the blob.
      radius: of the outline, before its waves.
      waves, phases, phase_speeds: the outline's waves, relative to the radius.
      start, speed: of the centre, (x, y); it is reflected near the borders of the picture.
      angle, spin: rotation of outline and texture.
      swing, swing_phase, swing_speed: the scale is 1 + swing * sin(...).
    """

    object_id: int
    texture: UInt8[np.ndarray, "side side 3"]
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
    if num_frames < 1 or min(size) < 32 or not 1 <= num_objects <= MAX_OBJECTS:
        raise ValueError(
            f"{num_frames} frames of {size} with {num_objects} objects; expected 1 frame or more of"
            f" 32 x 32 pixels or more with 1 to {MAX_OBJECTS} objects"
        )
    # Places are drawn until nothing hides an object at the start; few seeds need a second attempt.
    for attempt in range(100):
        rng = np.random.default_rng((seed, attempt))
        blobs = _random_blobs(rng, size, num_objects)
        background = _Background(rng, size)
        first_frame, first_label = _draw(background, blobs, 0, size, rng)
        areas = np.bincount(first_label.ravel(), minlength=num_objects + 1)[1:]
        if areas.min() >= _VISIBLE_AT_START * first_label.size:
            break
    else:
        raise ValueError(f"seed {seed}: no room for {num_objects} objects in {size} pixels")
    frames = np.empty((num_frames, *size, 3), np.uint8)
    labels = np.empty((num_frames, *size), np.uint8)
    frames[0], labels[0] = first_frame, first_label
    for time in range(1, num_frames):
        frames[time], labels[time] = _draw(background, blobs, time, size, rng)
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

    Sequences of these names that are there already are replaced, and so is the list of the split,
    last. `resolution` only names the folder. In the 2016 list objects count as one, as always.

    Errors: FileExistsError if the list names other than synthetic sequences; those of
    `synthetic_video`.
    """
    root = Path(root)
    list_file = root / "ImageSets" / str(year) / f"{split}.txt"
    if list_file.exists():
        others = [n for n in list_file.read_text().split() if not n.startswith(NAME_PREFIX)]
        if others:
            raise FileExistsError(f"{list_file}: lists {others[0]}, which is not synthetic")
    names = []
    for seed in seeds:
        name = f"{NAME_PREFIX}{seed:04d}"
        frames, labels = synthetic_video(seed, num_frames, size, num_objects)
        _replace_folder(
            root / "JPEGImages" / resolution / name,
            {f"{time:05d}.jpg": frame for time, frame in enumerate(frames)},
        )
        _replace_folder(
            root / "Annotations" / resolution / name,
            {f"{time:05d}.png": label for time, label in enumerate(labels)},
        )
        names.append(name)
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
        shutil.rmtree(folder)
    os.replace(temporary, folder)


# ---- What is in a video ----


def _random_blobs(rng: np.random.Generator, size: tuple[int, int], num_objects: int) -> list[_Blob]:
    """Objects and distractors, from back to front."""
    first_hue = rng.random()
    # Hues a golden section apart are well apart for any number of objects.
    hues = [(first_hue + 0.618 * i) % 1 for i in range(num_objects)]
    patterns = rng.integers(len(_PATTERNS), size=num_objects).tolist()
    largest = 0.32 * min(size) / num_objects**0.4
    centres: list[np.ndarray] = []
    blobs = []
    # A distractor looks like the object whose look it has: same pattern, nearly the same hue.
    looks = [*range(num_objects), *rng.integers(num_objects, size=rng.integers(1, 4))]
    for i, look in enumerate(looks):
        radius = largest * rng.uniform(0.65, 1.0)
        centre = _far_from(centres, rng, size)
        centres.append(centre)
        is_object = i < num_objects
        hue = hues[look] + (0 if is_object else rng.uniform(-0.05, 0.05))
        direction = rng.uniform(0, 2 * np.pi)
        pace = min(size) * rng.uniform(0.008, 0.022)
        blobs.append(
            _Blob(
                object_id=i + 1 if is_object else 0,
                texture=_object_texture(rng, hue, patterns[look], side=int(4 * radius) + 8),
                radius=radius,
                waves=rng.uniform(0, 0.5, len(_OUTLINE_WAVES)) / _OUTLINE_WAVES,
                phases=rng.uniform(0, 2 * np.pi, len(_OUTLINE_WAVES)),
                phase_speeds=rng.uniform(-0.08, 0.08, len(_OUTLINE_WAVES)),
                start=centre,
                speed=pace * np.array([np.cos(direction), np.sin(direction)]),
                angle=rng.uniform(0, 2 * np.pi),
                spin=rng.uniform(-0.06, 0.06),
                swing=rng.uniform(0.05, 0.25),
                swing_phase=rng.uniform(0, 2 * np.pi),
                swing_speed=rng.uniform(0.05, 0.15),
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


def _stripes(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * 5 * x + 2.5 * noise)


def _spots(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return 2.0 * np.sin(2 * np.pi * 5 * x + noise) * np.sin(2 * np.pi * 5 * y + noise)


def _blotches(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return 2.0 * noise


_PATTERNS = (_stripes, _spots, _blotches)


def _object_texture(
    rng: np.random.Generator, hue: float, pattern: int, side: int
) -> UInt8[np.ndarray, "side side 3"]:
    """A two-coloured pattern, light and dark of nearly one hue."""
    x, y = np.meshgrid(*(np.linspace(-0.5, 0.5, side, dtype=np.float32),) * 2)
    grain = 0.3 * _noise(rng, (side, side), 30)
    values = _PATTERNS[pattern](x, y, _noise(rng, (side, side), 9)) + grain
    light = _rgb(hue, rng.uniform(0.45, 0.8), rng.uniform(0.85, 1.0))
    dark = _rgb(hue + rng.uniform(-0.08, 0.08), rng.uniform(0.7, 1.0), rng.uniform(0.3, 0.5))
    return _mix(dark, light, values)


class _Background:
    """A texture larger than the picture, and how the picture pans, turns and zooms over it."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.size = size
        shape = tuple(int(1.5 * length) for length in size)
        coarse, fine = _noise(rng, shape, 6), _noise(rng, shape, 60)
        hue = rng.random()
        one = _rgb(hue, rng.uniform(0.1, 0.45), rng.uniform(0.3, 0.5))
        two = _rgb(hue + rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.45), rng.uniform(0.55, 0.8))
        self.texture = _mix(one, two, 1.2 * coarse + 0.8 * fine)
        self.pan = min(size) * rng.uniform(-0.008, 0.008, 2)
        self.turn = rng.uniform(-0.004, 0.004)
        self.zoom = rng.uniform(-0.003, 0.003)

    def at(self, time: int) -> UInt8[np.ndarray, "height width 3"]:
        """The background of one frame."""
        transform = _affine(
            from_centre=np.array(self.texture.shape[1::-1]) / 2,
            to_centre=np.array(self.size[::-1]) / 2 + self.pan * time,
            angle=self.turn * time,
            scale=np.exp(self.zoom * time),
        )
        return _warp(self.texture, transform, self.size)


# ---- One frame ----


def _draw(
    background: _Background,
    blobs: Sequence[_Blob],
    time: int,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Draws one frame and its label, from back to front."""
    frame = background.at(time).astype(np.float32)
    label = np.zeros(size, np.uint8)
    for blob in blobs:
        box, cover, texture = _draw_blob(blob, time, size)
        frame[box] += (cover[..., None] / np.float32(255)) * (texture - frame[box])
        label[box][cover >= 128] = blob.object_id
    frame += 2 * rng.standard_normal(frame.shape, np.float32)  # the noise of a camera
    return np.clip(np.rint(frame), 0, 255).astype(np.uint8), label


def _draw_blob(
    blob: _Blob, time: int, size: tuple[int, int]
) -> tuple[
    tuple[slice, slice],
    UInt8[np.ndarray, "rows columns"],
    UInt8[np.ndarray, "rows columns 3"],
]:
    """The box (rows, columns) of the frame that the blob is in, and in that box how much of each
    pixel it covers (0..255), and its texture.
    """
    height, width = size
    low = 0.1 * np.array([width, height])
    # Moving on and back between the borders: a triangle wave.
    span = 0.8 * np.array([width, height])
    position = (blob.start - low + blob.speed * time) % (2 * span)
    centre = low + np.minimum(position, 2 * span - position)
    angle = blob.angle + blob.spin * time
    scale = 1 + blob.swing * np.sin(blob.swing_phase + blob.swing_speed * time)

    around = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    phases = _OUTLINE_WAVES[:, None] * around + (blob.phases + blob.phase_speeds * time)[:, None]
    radii = blob.radius * scale * (1 + blob.waves @ np.cos(phases))
    directions = np.stack([np.cos(around + angle), np.sin(around + angle)], axis=-1)
    outline = centre + radii[:, None] * directions

    left, top = np.maximum(np.floor(outline.min(axis=0)), 0).astype(int).tolist()
    right, bottom = (
        np.minimum(np.ceil(outline.max(axis=0)) + 1, [width, height]).astype(int).tolist()
    )
    corner, shape = np.array([left, top]), (bottom - top, right - left)

    fine = np.zeros((shape[0] * _SUPERSAMPLING, shape[1] * _SUPERSAMPLING), np.uint8)
    # Pixel centres are at whole numbers in both grids, hence the half steps.
    points = np.rint((outline - corner + 0.5) * _SUPERSAMPLING - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [points], 255)
    cover = cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA)

    middle = (np.array(blob.texture.shape[:2]) - 1) / 2
    texture = _warp(blob.texture, _affine(middle, centre - corner, angle, scale), shape)
    return (slice(top, bottom), slice(left, right)), cover, texture


def _affine(
    from_centre: np.ndarray, to_centre: np.ndarray, angle: float, scale: float
) -> Float[np.ndarray, "2 3"]:
    """The matrix that scales and turns about `from_centre` (x, y) and moves that to `to_centre`."""
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    return np.concatenate([linear, (to_centre - linear @ from_centre)[:, None]], axis=1)


def _warp(
    texture: UInt8[np.ndarray, "rows columns 3"], transform: np.ndarray, size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    return cv2.warpAffine(texture, transform, size[::-1], borderMode=cv2.BORDER_REFLECT)


# ---- Colours and noise ----


def _rgb(hue: float, saturation: float, value: float) -> Float[np.ndarray, " 3"]:
    """A colour, 0..255 per channel."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _mix(
    one: Float[np.ndarray, " 3"], two: Float[np.ndarray, " 3"], values: np.ndarray
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Colours from `one` (values of -1 and less) to `two` (1 and more)."""
    share = np.clip(0.5 + 0.5 * values, 0, 1)[..., None].astype(np.float32)
    return np.rint(one + share * (two - one)).astype(np.uint8)


def _noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: int
) -> Float[np.ndarray, "rows columns"]:
    """Smooth noise, about -1 to 1, with `cells` bumps along the longer side."""
    longer = max(shape)
    grid = tuple(max(2, round(cells * length / longer)) for length in shape)
    values = rng.uniform(-1, 1, grid).astype(np.float32)
    return cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC)
