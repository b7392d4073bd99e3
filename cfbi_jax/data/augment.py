"""One random view for all frames of a training sample, and which objects are left in it.

A view is a window of the scaled frame, perhaps mirrored. It is chosen on the label of the reference
frame and then cut from every frame and label, so that they stay aligned.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8

NOBODY = 255  # the label of pixels that are neither object nor background: ignored in the loss

# What red, green and blue add to a grey picture (ITU-R BT.601).
_LUMA = np.array([0.299, 0.587, 0.114])

# Bicubic interpolation reads two pixels beyond a position; one more for rounding.
_CUBIC_REACH = 3


@dataclass(frozen=True)
class View:
    """A square window of a scaled frame; lengths in pixels of the scaled frame.

    Attributes:
      size: (height, width) of the whole frame once scaled.
      top, left: the window's first row and column.
      side: of the window; it lies inside the frame.
      mirrored: left and right are swapped, after the window is cut.
    """

    size: tuple[int, int]
    top: int
    left: int
    side: int
    mirrored: bool


def choose_view(
    reference: UInt8[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    short_edge: int,
    side: int,
    tries: int,
    min_object_pixels: int,
) -> View:
    """A random view of frames as large as `reference`, the label of the reference frame.

    With more than one of `tries` this is the balanced random crop (paper section 4): the first
    window in which an object has more than `min_object_pixels` pixels of `reference` is taken, else
    the last one.

    Args:
      reference: ids, 0 for background, 255 for nobody's.
      short_edge: of the scaled frame, at least `side`.
    """
    height, width = reference.shape
    scale = short_edge / min(height, width)
    size = (round(scale * height), round(scale * width))
    mirrored = bool(rng.random() < 0.5)
    for _ in range(tries):
        top, left = (int(rng.integers(length - side + 1)) for length in size)
        view = View(size, top, left, side, mirrored)
        if tries == 1 or len(objects_above(view_label(reference, view), min_object_pixels)):
            break
    return view


def view_frame(frame: UInt8[np.ndarray, "h w 3"], view: View) -> UInt8[np.ndarray, "side side 3"]:
    """The view of an RGB frame, scaled with bicubic interpolation."""
    height, width = frame.shape[:2]
    scale_y, scale_x = view.size[0] / height, view.size[1] / width
    end_y, end_x = view.top + view.side, view.left + view.side
    # Positions count from the top left corner, so that scaling only as far as the window reaches
    # gives the pixels of the whole scaled frame (in large ones a few are off by one).
    rows = min(height, math.ceil(end_y / scale_y) + _CUBIC_REACH)
    columns = min(width, math.ceil(end_x / scale_x) + _CUBIC_REACH)
    scaled = cv2.resize(
        frame[:rows, :columns], None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_CUBIC
    )
    window = scaled[view.top : end_y, view.left : end_x]
    # Ten times as fast as copying a reversed array.
    return cv2.flip(window, 1) if view.mirrored else window


def view_label(label: UInt8[np.ndarray, "h w"], view: View) -> UInt8[np.ndarray, "side side"]:
    """The view of a label: at the centre of each pixel the id that is nearest."""
    # Not cv2.INTER_NEAREST, which is shifted by up to half a pixel against the scaled frame.
    rows = _nearest(view.top, view.side, label.shape[0], view.size[0])
    columns = _nearest(view.left, view.side, label.shape[1], view.size[1])
    return label[rows][:, columns[::-1] if view.mirrored else columns]


def choose_colours(rng: np.random.Generator, strength: float) -> Float[np.ndarray, "3 4"]:
    """A random change of colours, RGB -> RGB: a matrix and what is added.

    The gain of every channel, saturation, brightness, and contrast around the middle grey are six
    factors from 1 - `strength` to 1 + `strength`.
    """
    *gains, saturation, brightness, contrast = rng.uniform(1 - strength, 1 + strength, 6)
    saturated = saturation * np.eye(3) + (1 - saturation) * _LUMA
    matrix = contrast * brightness * np.array(gains)[:, None] * saturated
    return np.column_stack([matrix, np.full(3, 127.5 * (1 - contrast))])


def change_colours(
    frame: UInt8[np.ndarray, "h w 3"], colours: Float[np.ndarray, "3 4"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The frame in other colours, to within one, and cut off at 0 and 255."""
    return cv2.transform(frame, colours)


def objects_above(
    label: UInt8[np.ndarray, "h w"], min_pixels: int
) -> Integer[np.ndarray, " objects"]:
    """The ids, ascending, of the objects with more than `min_pixels` pixels (0 or more)."""
    areas = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
    areas[[0, NOBODY]] = 0
    return np.flatnonzero(areas > min_pixels)


def choose_objects(
    reference: UInt8[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    min_object_pixels: int,
    max_objects: int,
) -> Integer[np.ndarray, " objects"]:
    """The ids to keep, ascending: a random subset of those large enough in the reference's view."""
    ids = objects_above(reference, min_object_pixels)
    if len(ids) > max_objects:
        ids = np.sort(rng.choice(ids, max_objects, replace=False))
    return ids


def renumber(
    label: UInt8[np.ndarray, "*shape"], ids: Collection[int] | Integer[np.ndarray, " objects"]
) -> UInt8[np.ndarray, "*shape"]:
    """Makes `ids` 1, 2, ... in their order, and all other ids background; 255 stays."""
    table = np.zeros(256, np.uint8)
    table[list(ids)] = np.arange(1, len(ids) + 1)
    table[NOBODY] = NOBODY
    return cv2.LUT(label, table).reshape(label.shape)


def _nearest(first: int, count: int, length: int, scaled: int) -> Integer[np.ndarray, " count"]:
    """The positions, of `length`, under `count` pixels from `first` on of `scaled` pixels."""
    # (first + i + 1/2) * length / scaled, in whole numbers.
    return (2 * np.arange(first, first + count) + 1) * length // (2 * scaled)
