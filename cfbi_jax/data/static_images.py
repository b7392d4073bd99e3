"""Short videos made from single annotated pictures, for pre-training as in STM.

The background, with its objects painted out, and each object on top of it move on paths of their
own: smooth affine motion (translation, rotation, scale, shear).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from cfbi_jax.data.augment import NOBODY, objects_above
from cfbi_jax.data.clips import ClipSource, TrainingVideo

# Largest translations (share of the short edge, x and y), rotation (radians), logarithm of the
# scale, and shear on a path. With eight frames an object's centre moves by 2.8 % of the short edge
# from one to the next (median), on the videos of docs/real_video.md by 0.8 %, and the reference is
# among a clip's other frames in 45 %, there in 4 %; with twenty 1.1 % and 19 %.
_OBJECT_RANGE = np.array([0.15, 0.15, 0.35, 0.15, 0.1])
_BACKGROUND_RANGE = np.array([0.06, 0.06, 0.1, 0.06, 0.03])

_FILL_SIDE = 64  # objects are painted out in a picture this small: a smooth filling, fast
_HALO = 5  # pixels around an object that still show its colour


class StaticClips:
    """A `ClipSource`: videos of `num_frames` frames, each from one frame of a video of `source`.

    Errors: ValueError for fewer than two frames.
    """

    def __init__(self, source: ClipSource, num_frames: int = 8):
        if num_frames < 2:
            raise ValueError(f"static_frames = {num_frames}; expected two at least for motion")
        self.source = source
        self._num_frames = num_frames

    def __len__(self) -> int:
        return len(self.source)

    def video(self, index: int, rng: np.random.Generator) -> TrainingVideo:
        """A video from a random frame, one that shows an object if there is any; determined by the
        state of `rng`. Errors: those of the source.
        """
        video = self.source.video(index, rng)
        for t in rng.permutation(len(video)).tolist():
            label = video.mask(t)
            if len(objects_above(label, 0)):
                break
        return _moving_video(video.name, video.frame(t), label, self._num_frames, rng)


@dataclass(frozen=True)
class _Layer:
    """An object cut out of its picture.

    Attributes:
      object_id: its label.
      corner: (x, y) of the cut in the picture.
      texture, cover: the cut: RGB, and 255 where the object is, else 0.
      path: for each frame the matrix from positions (x, y) in the picture to those in the frame.
    """

    object_id: int
    corner: tuple[int, int]
    texture: UInt8[np.ndarray, "rows columns 3"]
    cover: UInt8[np.ndarray, "rows columns"]
    path: Float[np.ndarray, "frames 2 3"]


@dataclass(frozen=True)
class _MovingVideo:
    """A `TrainingVideo`, rendered frame by frame.

    Attributes:
      name: of the video that the picture is from.
      background: the picture without its objects.
      ignored: 255 at nobody's pixels, which move with the background, else 0.
      path: the background's, as that of a layer.
      layers: the objects, from back to front.
    """

    name: str
    background: UInt8[np.ndarray, "h w 3"]
    ignored: UInt8[np.ndarray, "h w"]
    path: Float[np.ndarray, "frames 2 3"]
    layers: tuple[_Layer, ...]

    def __len__(self) -> int:
        return len(self.path)

    def frame(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB."""
        frame = cv2.warpAffine(
            self.background,
            self.path[t],
            self.background.shape[1::-1],
            borderMode=cv2.BORDER_REFLECT,
        )
        for layer in self.layers:
            box, matrix = _place(layer, t, self.ignored.shape)
            cover = _warp_cover(layer.cover, matrix, frame[box].shape[:2])
            texture = cv2.warpAffine(
                layer.texture, matrix, cover.shape[::-1], borderMode=cv2.BORDER_REPLICATE
            )
            share = cover[..., None] / np.float32(255)
            frame[box] = np.rint(frame[box] + share * (texture - frame[box].astype(np.float32)))
        return frame

    def mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """Ids; 0 is background, 255 nobody's."""
        label = cv2.warpAffine(
            self.ignored,
            self.path[t],
            self.ignored.shape[::-1],
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_REFLECT,
        )
        for layer in self.layers:
            box, matrix = _place(layer, t, label.shape)
            cover = _warp_cover(layer.cover, matrix, label[box].shape)
            label[box][cover >= 128] = layer.object_id
        return label


def _moving_video(
    name: str,
    picture: UInt8[np.ndarray, "h w 3"],
    label: UInt8[np.ndarray, "h w"],
    num_frames: int,
    rng: np.random.Generator,
) -> _MovingVideo:
    """Cuts the picture into layers and draws their paths."""
    height, width = label.shape
    centre = np.array([width - 1, height - 1]) / 2
    path = _random_path(rng, centre, min(label.shape), _BACKGROUND_RANGE, num_frames)
    layers = []
    for object_id in rng.permutation(objects_above(label, 0)).tolist():
        cover = np.where(label == object_id, np.uint8(255), np.uint8(0))
        left, top, columns, rows = cv2.boundingRect(cover)
        cut = slice(top, top + rows), slice(left, left + columns)
        middle = np.array([left + (columns - 1) / 2, top + (rows - 1) / 2])
        layers.append(
            _Layer(
                object_id=object_id,
                corner=(left, top),
                texture=picture[cut],
                cover=cover[cut],
                path=_random_path(rng, middle, min(label.shape), _OBJECT_RANGE, num_frames),
            )
        )
    return _MovingVideo(
        name=name,
        background=_without_objects(picture, label),
        ignored=np.where(label == NOBODY, np.uint8(NOBODY), np.uint8(0)),
        path=path,
        layers=tuple(layers),
    )


def _random_path(
    rng: np.random.Generator,
    centre: Float[np.ndarray, " 2"],
    short_edge: int,
    ranges: Float[np.ndarray, " 5"],
    num_frames: int,
) -> Float[np.ndarray, "frames 2 3"]:
    """A matrix per frame, for motion about `centre` (x, y)."""
    # A quadratic Bezier curve: smooth, and never beyond the ranges of its points.
    points = rng.uniform(-ranges, ranges, (3, len(ranges)))
    u = np.linspace(0, 1, num_frames)[:, None]
    curve = (1 - u) ** 2 * points[0] + 2 * u * (1 - u) * points[1] + u**2 * points[2]
    shift_x, shift_y, angle, log_scale, shear = curve.T
    cosine, sine = np.exp(log_scale) * np.cos(angle), np.exp(log_scale) * np.sin(angle)
    turn = np.stack([cosine, -sine, sine, cosine], axis=-1).reshape(-1, 2, 2)
    slant = np.stack([np.ones_like(shear), shear, 0 * shear, np.ones_like(shear)], axis=-1)
    linear = turn @ slant.reshape(-1, 2, 2)
    shift = short_edge * np.stack([shift_x, shift_y], axis=-1) + centre - linear @ centre
    return np.concatenate([linear, shift[..., None]], axis=-1)


def _without_objects(
    picture: UInt8[np.ndarray, "h w 3"], label: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with its objects painted out from what is around them, smoothly."""
    kernel = np.ones((2 * _HALO + 1,) * 2, np.uint8)
    is_object = ((label != 0) & (label != NOBODY)).astype(np.uint8)
    hole = cv2.dilate(is_object, kernel)
    # Nobody's pixels often surround an object and have its colour: no source of the filling.
    unusable = cv2.dilate((label != 0).astype(np.uint8), kernel)

    height, width = label.shape
    scale = min(1, _FILL_SIDE / min(height, width))
    small = (max(1, round(scale * width)), max(1, round(scale * height)))
    # Usable pixels only go into the average of a small pixel, or colours of the object would.
    weight = cv2.resize((1 - unusable).astype(np.float32), small, interpolation=cv2.INTER_AREA)
    masked = picture * (1 - unusable)[..., None]
    average = cv2.resize(masked.astype(np.float32), small, interpolation=cv2.INTER_AREA)
    average = np.rint(average / np.maximum(weight, 1e-6)[..., None]).clip(0, 255).astype(np.uint8)
    filled = cv2.inpaint(average, (weight < 0.01).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    filled = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(hole[..., None] > 0, filled, picture)


def _place(
    layer: _Layer, t: int, size: tuple[int, int]
) -> tuple[tuple[slice, slice], Float[np.ndarray, "2 3"]]:
    """The box (rows, columns) of frame `t` that a layer can be in, and the matrix from the layer's
    cut to that box. The box is one pixel at least, of which the layer may leave all untouched.
    """
    height, width = size
    rows, columns = layer.cover.shape
    linear, shift = layer.path[t, :, :2], layer.path[t, :, 2]
    shift = shift + linear @ np.array(layer.corner)
    corners = np.array([[-1, -1], [columns, -1], [-1, rows], [columns, rows]]) @ linear.T + shift
    low = np.clip(np.floor(corners.min(axis=0)), 0, [width - 1, height - 1]).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + 1, low + 1, [width, height]).astype(int)
    box = slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))
    return box, np.concatenate([linear, (shift - low)[:, None]], axis=1)


def _warp_cover(
    cover: UInt8[np.ndarray, "rows columns"],
    matrix: Float[np.ndarray, "2 3"],
    size: tuple[int, ...],
) -> UInt8[np.ndarray, "h w"]:
    """How much of each pixel an object covers, 0..255; nothing outside of its cut."""
    return cv2.warpAffine(cover, matrix, size[::-1], borderMode=cv2.BORDER_CONSTANT)
