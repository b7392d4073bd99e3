"""Small video files, and one that says more than there is."""

import cv2
import numpy as np


def write_clip(path, frames):
    """Writes an MJPEG file (AVI) of uint8 RGB frames."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def state_frames(path, number):
    """Has an AVI file state another number of frames, as if it were trimmed and hid some."""
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 8 + 32  # of the stream, in its header
    data[length : length + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)
