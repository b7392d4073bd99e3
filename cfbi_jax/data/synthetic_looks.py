"""What synthetic videos look like: drawn patterns, pieces of photographs, background and light.

The photographs come with scikit-image, inside its package: nothing is downloaded.
"""

import colorsys
import functools
import importlib.util
import statistics
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Int8, UInt8

from cfbi_jax.data.image_files import read_frame

_COLOUR_PHOTOGRAPHS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg"),
    *("ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_GREY_PHOTOGRAPHS = ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png")
PHOTOGRAPHS = (*_COLOUR_PHOTOGRAPHS, *_GREY_PHOTOGRAPHS)

_LONGER_SIDE = 640  # of a photograph in memory

_GREY_AXIS_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], np.float32) / np.sqrt(3)

# Each byte stands for an equal share of a normal distribution: random bytes make camera noise.
_NOISE_OF_BYTE = np.rint(
    [statistics.NormalDist(0, 2).inv_cdf((byte + 0.5) / 256) for byte in range(256)]
).astype(np.int8)


# ---- Textures ----


def object_textures(
    rng: np.random.Generator, sides: list[int]
) -> list[UInt8[np.ndarray, "side side 3"]]:
    """A square texture per object, of these sides: a pattern or a piece of a photograph each.

    No two are of the same photograph while there are enough, and patterns differ in their hue.
    """
    first_hue = rng.random()
    photographs = rng.permutation(PHOTOGRAPHS).tolist()
    textures = []
    for i, side in enumerate(sides):
        if rng.random() < 0.5:
            name = photographs[i % len(photographs)]
            textures.append(_photograph_piece(rng, name, (side, side), 0.25, 0.6))
        else:
            # Hues a golden section apart are well apart for any number of objects.
            textures.append(_pattern(rng, first_hue + 0.618 * i, side))
    return textures


def similar_texture(
    rng: np.random.Generator, texture: UInt8[np.ndarray, "side side 3"], side: int
) -> UInt8[np.ndarray, "new_side new_side 3"]:
    """The texture of a distractor: the given one resized, often with a slightly other hue."""
    resized = cv2.resize(texture, (side, side), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.3:
        return resized
    turn = rng.choice([-1, 1]) * rng.uniform(0.015, 0.05)
    return cv2.transform(resized, _turn_hue(turn))


def background_texture(
    rng: np.random.Generator, shape: tuple[int, int]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Smooth noise of two colours, or a piece of a photograph."""
    if rng.random() < 0.5:
        return _photograph_piece(rng, str(rng.choice(PHOTOGRAPHS)), shape, 0.6, 1.0)
    values = 1.2 * _noise(rng, shape, 6) + 0.8 * _noise(rng, shape, 60)
    hue = rng.random()
    one = _rgb(hue, rng.uniform(0.1, 0.45), rng.uniform(0.3, 0.5))
    two = _rgb(hue + rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.45), rng.uniform(0.55, 0.8))
    return _colourise(_to_grey(values), one, two)


def camera_noise(
    rng: np.random.Generator, size: tuple[int, int]
) -> Int8[np.ndarray, "height width 3"]:
    """Normal noise of deviation 2, rounded, independent for each pixel and channel."""
    height, width = size
    data = np.frombuffer(rng.bytes(height * width * 3), np.uint8)
    return cv2.LUT(data, _NOISE_OF_BYTE).reshape(height, width, 3)


class Background:
    """A texture larger than the picture, and how the picture pans, turns and zooms over it."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.size = size
        self.texture = background_texture(rng, tuple(int(1.5 * length) for length in size))
        self.pan = min(size) * rng.uniform(-0.008, 0.008, 2)
        self.turn = rng.uniform(-0.004, 0.004)
        self.zoom = rng.uniform(-0.003, 0.003)

    def at(self, time: int) -> UInt8[np.ndarray, "height width 3"]:
        """The background of one frame."""
        transform = affine(
            from_centre=np.array(self.texture.shape[1::-1]) / 2,
            to_centre=np.array(self.size[::-1]) / 2 + self.pan * time,
            angle=self.turn * time,
            scale=np.exp(self.zoom * time),
        )
        return warp(self.texture, transform, self.size)


class Light:
    """Brightness, contrast and colour of the light, which swing slowly."""

    def __init__(self, rng: np.random.Generator):
        # Contrast, brightness of all channels, then of red, green, blue.
        self.swings = np.array([0.25, 25, 8, 8, 8]) * rng.uniform(0.5, 1, 5)
        self.phases = rng.uniform(0, 2 * np.pi, 5)
        self.speeds = rng.uniform(0.05, 0.15, 5)

    def table(self, time: int) -> UInt8[np.ndarray, "1 256 3"]:
        """What becomes of each value of each channel at `time`."""
        contrast, brightness, *tint = self.swings * np.sin(self.phases + self.speeds * time)
        values = 128 + (1 + contrast) * (np.arange(256)[None, :, None] - 128)
        return np.clip(np.rint(values + brightness + np.array(tint)), 0, 255).astype(np.uint8)


# ---- Photographs ----


@functools.cache
def photograph(name: str) -> UInt8[np.ndarray, "rows columns 3"]:
    """One of `PHOTOGRAPHS`, RGB, at most 640 pixels long; decoded once per process, read-only."""
    # Not through skimage.data, which would import the library and may download.
    package = importlib.util.find_spec("skimage")
    picture = read_frame(Path(package.origin).parent / "data" / name)
    shrink = min(1.0, _LONGER_SIDE / max(picture.shape))
    picture = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    picture.setflags(write=False)
    return picture


def _photograph_piece(
    rng: np.random.Generator, name: str, shape: tuple[int, int], smallest: float, largest: float
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A random window of a photograph, resized to `shape`, maybe flipped, in other colours.

    `smallest`, `largest`: of the window, relative to the largest one that fits.
    """
    whole = photograph(name)
    fit = min(whole.shape[0] / shape[0], whole.shape[1] / shape[1])
    windows = []
    # Of a few windows the most varied one: much of a photograph may be empty sky.
    for _ in range(3):
        scale = fit * rng.uniform(smallest, largest)
        rows, columns = (max(1, int(scale * length)) for length in shape)
        top = rng.integers(whole.shape[0] - rows + 1)
        left = rng.integers(whole.shape[1] - columns + 1)
        windows.append(whole[top : top + rows, left : left + columns])
    window = max(windows, key=lambda w: w[::8, ::8].std())
    shrinks = window.shape[0] > shape[0]
    piece = cv2.resize(
        window, shape[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    piece = piece[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    if name in _GREY_PHOTOGRAPHS:
        return _colourise(np.ascontiguousarray(piece[..., 0]), *_dark_and_light(rng, rng.random()))
    # Mostly the colours of the photograph, sometimes any others.
    matrix = rng.uniform(0.8, 1.2) * _turn_hue(rng.uniform(-0.5, 0.5) * rng.random())
    offset = rng.uniform(-15, 15, (3, 1)).astype(np.float32)
    return cv2.transform(np.ascontiguousarray(piece), np.hstack([matrix, offset]))


# ---- Patterns ----


def _stripes(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * 5 * x + 2.5 * noise)


def _spots(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return 2.0 * np.sin(2 * np.pi * 5 * x + noise) * np.sin(2 * np.pi * 5 * y + noise)


def _blotches(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return 2.0 * noise


_PATTERNS = (_stripes, _spots, _blotches)


def _pattern(rng: np.random.Generator, hue: float, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A two-coloured pattern, light and dark of nearly one hue."""
    x, y = np.meshgrid(*(np.linspace(-0.5, 0.5, side, dtype=np.float32),) * 2, sparse=True)
    grain = np.float32(0.3) * _noise(rng, (side, side), 30)
    draw = _PATTERNS[rng.integers(len(_PATTERNS))]
    values = draw(x, y, _noise(rng, (side, side), 9)) + grain
    return _colourise(_to_grey(values), *_dark_and_light(rng, hue))


def _noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: int
) -> Float[np.ndarray, "rows columns"]:
    """Smooth noise, about -1 to 1, with `cells` bumps along the longer side."""
    longer = max(shape)
    grid = tuple(max(2, round(cells * length / longer)) for length in shape)
    values = rng.uniform(-1, 1, grid).astype(np.float32)
    return cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC)


# ---- Colours ----


def _rgb(hue: float, saturation: float, value: float) -> Float[np.ndarray, " 3"]:
    """A colour, 0..255 per channel."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _dark_and_light(
    rng: np.random.Generator, hue: float
) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Two colours of nearly one hue."""
    dark = _rgb(hue + rng.uniform(-0.08, 0.08), rng.uniform(0.7, 1.0), rng.uniform(0.3, 0.5))
    return dark, _rgb(hue, rng.uniform(0.45, 0.8), rng.uniform(0.85, 1.0))


def _to_grey(values: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns"]:
    """-1 and less becomes 0, 1 and more becomes 255."""
    return np.clip(127.5 + 127.5 * values, 0, 255).astype(np.uint8)


def _colourise(
    grey: UInt8[np.ndarray, "rows columns"],
    dark: Float[np.ndarray, " 3"],
    light: Float[np.ndarray, " 3"],
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Colours from `dark` for 0 to `light` for 255."""
    return cv2.transform(grey, np.stack([(light - dark) / 255, dark], axis=1))


def _turn_hue(turn: float) -> Float[np.ndarray, "3 3"]:
    """The matrix that turns colours about the grey axis, by 1 for the full circle of hues."""
    cosine, sine = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    matrix = cosine * np.eye(3) + (1 - cosine) / 3 + sine * _GREY_AXIS_CROSS
    return matrix.astype(np.float32)


# ---- Places ----


def affine(
    from_centre: np.ndarray, to_centre: np.ndarray, angle: float, scale: float
) -> Float[np.ndarray, "2 3"]:
    """The matrix that scales and turns about `from_centre` (x, y) and moves that to `to_centre`."""
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    return np.concatenate([linear, (to_centre - linear @ from_centre)[:, None]], axis=1)


def warp(
    texture: UInt8[np.ndarray, "rows columns 3"], transform: np.ndarray, size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    return cv2.warpAffine(texture, transform, size[::-1], borderMode=cv2.BORDER_REFLECT)
