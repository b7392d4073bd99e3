"""A clip's frames with their true masks, and what the network drew, side by side.

The previous mask is the true one; the network may have had its own (`training.step`).

+-----------+----------+------------+-------+
| reference | previous | prediction | truth |
+-----------+----------+------------+-------+
  frame 1     frame t-1  frame t      frame t
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from cfbi_jax.data.image_files import write_image
from cfbi_jax.inference.video import overlay
from cfbi_jax.training.losses import IGNORED

GAP = 4  # white pixels between panels and between rows
GREY = 208  # light, as VOC's colour of object 7 is mid-grey
CAPTIONS = ("reference", "previous", "prediction", "truth")


def strip(
    reference: UInt8[np.ndarray, "height width 3"],
    reference_label: UInt8[np.ndarray, "height width"],
    previous: UInt8[np.ndarray, "height width 3"],
    previous_label: UInt8[np.ndarray, "height width"],
    current: UInt8[np.ndarray, "height width 3"],
    prediction: UInt8[np.ndarray, "height width"],
    truth: UInt8[np.ndarray, "height width"],
) -> UInt8[np.ndarray, "height strip_width 3"]:
    """Four RGB panels in a row; objects in VOC's colours as in `overlay`, ignored pixels grey."""
    frames = (reference, previous, current, current)
    labels = (reference_label, previous_label, prediction, truth)
    gap = np.full((len(reference), GAP, 3), 255, np.uint8)
    panels = []
    for frame, label, caption in zip(frames, labels, CAPTIONS, strict=True):
        panel = overlay(frame, label)
        panel[label == IGNORED] = GREY
        panels += [_captioned(panel, caption), gap]
    return np.concatenate(panels[:-1], axis=1)


def stack(
    strips: Sequence[UInt8[np.ndarray, "_height _width 3"]],
) -> UInt8[np.ndarray, "all_heights widest 3"]:
    """Strips one below the other, narrower ones filled up with white. ValueError for none."""
    if not strips:
        raise ValueError("no strips; expected one or more")
    widest = max(row.shape[1] for row in strips)
    rows = []
    for row in strips:
        rows.append(
            np.pad(row, ((0, GAP), (0, widest - row.shape[1]), (0, 0)), constant_values=255)
        )
    return np.concatenate(rows)[:-GAP]


def write_strips(path: Path | str, strips: Sequence[UInt8[np.ndarray, "_height _width 3"]]) -> None:
    """Writes a stack of strips as a PNG (or JPEG); it appears complete or not at all."""
    write_image(path, stack(strips))


def _captioned(
    panel: UInt8[np.ndarray, "height width 3"], caption: str
) -> UInt8[np.ndarray, "height width 3"]:
    """The panel with white text on a darkened box in its upper left corner, if it has room."""
    font, scale, margin = cv2.FONT_HERSHEY_SIMPLEX, max(0.4, panel.shape[1] / 900), 4
    (width, height), baseline = cv2.getTextSize(caption, font, scale, 1)
    box_width, box_height = width + 2 * margin, height + baseline + margin
    if 2 * box_width > panel.shape[1] or 5 * box_height > panel.shape[0]:
        return panel  # a caption would hide too much
    panel = panel.copy()
    panel[:box_height, :box_width] //= 3
    cv2.putText(
        panel, caption, (margin, margin + height), font, scale, (255, 255, 255), 1, cv2.LINE_AA
    )
    return panel
