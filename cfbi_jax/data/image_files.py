"""Frames and masks as files: read, checked, written.

A frame is `uint8 [height, width, 3]` RGB. A mask (label map) is `uint8 [height, width]`: the value
of a pixel is the id of its object, 0 is background. A file that is not what it should be is an
error here, naming the file, rather than a strange result later.
"""

import collections
import io
import itertools
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, UnidentifiedImageError

from cfbi_jax.files import BadFile, write_file

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_KINDS = ", ".join(FRAME_SUFFIXES)
# Pictures, too, which we do not read: left out in silence, a video would lack frames.
_OTHER_SUFFIXES = (".tif", ".tiff", ".heic", ".heif", ".avif", ".gif", ".jp2", ".jfif", ".exr")

# More objects than DAVIS or YouTube-VOS have in one video (about 10); a ramp of grey has far more.
MAX_IDS_IN_MASK = 64

# Pillow: palette, grey of 8, 1 and 16 bits, grey with an alpha channel (one mask of DAVIS 2016).
_ID_MODES = ("P", "L", "1", "I;16", "I", "LA")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_BITS, _PNG_COLOURS = 24, 25  # where a PNG says its bits per value and its kind of colours
_PNG_GREY = 0
_GREY_STEPS = {2: 85, 4: 17}  # Pillow spreads the values of so many bits over 0..255
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB\x60\x82"
_EXIF_ORIENTATION = 0x0112
_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
# In compressed JPEG data 0xff is followed by 0x00 or is a restart marker; the rest are segments.
_JPEG_NEXT_SEGMENT = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")


def _voc_palette() -> UInt8[np.ndarray, "256 3"]:
    """PASCAL VOC colours: the bits of an id dealt out to red, green, blue as their high bits."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= (((ids >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    palette.setflags(write=False)
    return palette


VOC_PALETTE = _voc_palette()


def list_frames(folder: Path | str) -> list[Path]:
    """The pictures in a folder, in the order of the numbers in their names (9.png before 10.png).

    Errors: FileNotFoundError for a missing folder or one without pictures; ValueError for pictures
    of kinds that are not read, for two that differ in their suffix only, as their masks would have
    the same name, and for one whose name differs from the others' by more than its numbers: a
    preview, say, or a mask.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected one with the frames of a video"
        )
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    others = sorted(path for path in files if path.suffix.lower() in _OTHER_SUFFIXES)
    if others:
        raise ValueError(f"{others[0]}: not a kind of picture that is read; expected {_KINDS}")
    frames = [path for path in files if path.suffix.lower() in FRAME_SUFFIXES]
    if not frames:
        raise FileNotFoundError(f"{folder}: no frames; expected files like 00000.jpg ({_KINDS})")
    frames.sort(key=lambda path: (_natural_order(path.stem), path.name))
    for path, following in itertools.pairwise(frames):
        if path.stem == following.stem:
            raise ValueError(f"{following}: the same frame as {path.name}; expected one of them")
    patterns = [re.sub(r"\d+", "0", path.stem, flags=re.ASCII) for path in frames]
    usual = collections.Counter(patterns).most_common(1)[0][0]
    if any("0" in pattern for pattern in patterns) and len(set(patterns)) > 1:
        numbered = frames[patterns.index(usual)]
        other = next(path for path, x in zip(frames, patterns, strict=True) if x != usual)
        raise ValueError(f"{other}: named otherwise than {numbered.name}; expected frames only")
    return frames


def read_frame(path: Path | str) -> UInt8[np.ndarray, "height width 3"]:
    """Reads one picture as RGB, as stored: an EXIF orientation is not applied.

    Errors: FileNotFoundError; ValueError for a file that is cut short or is no picture.
    """
    return decode_frame(Path(path).read_bytes(), str(path))


def decode_frame(data: bytes, name: str) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes a picture file's bytes as `read_frame` does; `name` says whose in errors.

    Errors: ValueError for bytes that are cut short or are no picture.
    """
    _check_complete(io.BytesIO(data), name)
    # The decoder of the official code, so that the same file gives the same numbers.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if bgr is None:
        raise BadFile(f"{name}: no picture that can be decoded; expected a JPEG or PNG")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of a frame from its header, not decoded; also sees a file cut short.

    Errors: FileNotFoundError; ValueError for a file that is cut short or is no picture, and for a
    picture that viewers turn or mirror (EXIF orientation), as masks drawn on it would not fit.
    """
    with open(path, "rb") as file:
        _check_complete(file, path)
        image = _open_image(file, path)
        try:
            # Not `image.getexif`, which decodes a PNG to look for more behind its pixels.
            orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
        except (SyntaxError, ValueError, struct.error):  # damaged: nobody turns it
            orientation = 1
    if orientation not in (0, 1):
        raise BadFile(
            f"{path}: viewers turn or mirror this picture (EXIF orientation {orientation}), and it "
            "is read as stored; expected pictures saved upright"
        )
    return image.height, image.width


def mask_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of a mask file from its header, not decoded.

    Errors: FileNotFoundError; ValueError for a file that is cut short or cannot hold object ids.
    """
    with open(path, "rb") as file:
        _check_complete(file, path)
        image = _open_image(file, path)
        _check_holds_ids(image, path)
        return image.height, image.width


def read_mask(
    path: Path | str, refuse_shades: bool = True, refuse_palettes: bool = True
) -> UInt8[np.ndarray, "height width"]:
    """Reads the object ids of an indexed or grey PNG (of 1 bit: white is id 1).

    `refuse_shades=False` is for predictions and truth: scarcely visible objects are no error there.
    `refuse_palettes=False` takes indices for ids whatever colours they have.

    Errors: FileNotFoundError; ValueError for a file that is cut short, is no PNG, stores colours
    instead of ids, is transparent, has ids above 255, has the in-between values of an anti-aliased
    drawing, or is indexed with black (the background, to whoever drew it) at another index than 0.
    """
    return decode_mask(Path(path).read_bytes(), str(path), refuse_shades, refuse_palettes)


def decode_mask(
    data: bytes, name: str, refuse_shades: bool = True, refuse_palettes: bool = True
) -> UInt8[np.ndarray, "height width"]:
    """Decodes a PNG file's bytes as `read_mask` does; `name` says whose in errors.

    Errors: ValueError as in `read_mask`.
    """
    file = io.BytesIO(data)
    _check_complete(file, name)
    _check_holds_ids(_open_image(file, name), name)
    image = _decode(file, name)
    label = np.array(image)
    if image.mode == "LA":
        label, alpha = label[..., 0], label[..., 1]
        if data[_PNG_BITS] != 8 or (alpha != 255).any():
            raise BadFile(f"{name}: a transparent picture; expected object ids, all opaque, 8 bits")
    if refuse_palettes:
        _check_background(image, label, name)
    bits = data[_PNG_BITS]
    if data[_PNG_COLOURS] == _PNG_GREY and bits in _GREY_STEPS:
        label //= _GREY_STEPS[bits]
    label = check_label(label, name)
    if refuse_shades and (shades := shades_in(label)):
        raise BadFile(f"{name}: {shades}")
    return label


def check_label(array: np.ndarray, name: str) -> UInt8[np.ndarray, "height width"]:
    """The given object ids as a label map, if they can be one; `name` says whose in errors.

    `array` is [height, width], of integers 0..255 or bool. Errors: ValueError for another shape or
    type, and for ids outside 0..255.
    """
    array = np.asarray(array)
    if array.ndim != 2 or array.size == 0:
        raise BadFile(f"{name}: shape {array.shape}; expected object ids, [height, width]")
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.integer):
        raise BadFile(f"{name}: values of type {array.dtype}; expected integer object ids")
    if array.dtype not in (np.bool_, np.uint8):
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise BadFile(f"{name}: ids from {low} to {high}; expected object ids 0 to 255")
    return np.ascontiguousarray(array, np.uint8)


def read_palette(path: Path | str) -> UInt8[np.ndarray, "256 3"] | None:
    """The RGB colours of an indexed picture's ids; None if the picture is not indexed.

    Colours that the file does not define are VOC's, so that objects added later are visible.
    Errors: FileNotFoundError; ValueError for a file that is cut short or is no picture.
    """
    with open(path, "rb") as file:
        _check_complete(file, path)
        if _open_image(file, path).mode != "P":
            return None
        colours = _decode(file, path).getpalette("RGB")
    stored = np.array(colours, np.uint8).reshape(-1, 3)
    return np.concatenate([stored, VOC_PALETTE[len(stored) :]])


def write_mask(
    path: Path | str,
    label: np.ndarray,
    palette: UInt8[np.ndarray, "256 3"] = VOC_PALETTE,
) -> None:
    """Writes a label map as an indexed 8-bit PNG; the file appears complete or not at all.

    Errors: ValueError, naming the file, unless `label` is uint8 [height, width]; OSError.
    """
    if label.dtype != np.uint8 or label.ndim != 2:
        raise BadFile(f"{path}: {label.dtype} {label.shape}; expected uint8 [height, width]")
    image = Image.fromarray(label)
    image.putpalette(palette.tobytes())  # turns mode L into P
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    write_file(path, encoded.getvalue())


def write_image(path: Path | str, picture: UInt8[np.ndarray, "height width channels"]) -> None:
    """Writes an RGB picture, PNG or JPEG by its suffix, or RGBA as PNG; it appears complete or not
    at all."""
    suffix = Path(path).suffix.lower()
    suffixes = (".png",) if picture.shape[2] == 4 else (".png", ".jpg", ".jpeg")
    if suffix not in suffixes:
        raise ValueError(f"{path}: cannot write {suffix!r} pictures; expected {suffixes}")
    order = cv2.COLOR_RGBA2BGRA if picture.shape[2] == 4 else cv2.COLOR_RGB2BGR
    _, encoded = cv2.imencode(suffix, cv2.cvtColor(picture, order))
    write_file(path, encoded.tobytes())


def _natural_order(stem: str) -> list[tuple[int, str]]:
    """A sort key that compares the runs of digits in a name as numbers."""
    parts = re.split(r"(\d+)", stem, flags=re.ASCII)  # text, digits, text, digits, ..., text
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _check_holds_ids(image: Image.Image, path: Path | str) -> None:
    if image.format != "PNG" or image.mode not in _ID_MODES:
        found = f"{image.mode} colours" if image.format == "PNG" else f"a {image.format} file"
        raise BadFile(
            f"{path}: {found}; expected an indexed or grey PNG whose values are object ids"
        )


def _check_background(image: Image.Image, label: np.ndarray, name: str) -> None:
    """Raises ValueError if the palette shows black, which is used, and another colour as index 0.

    Programs that optimise palettes order the colours anew: indices are then no ids.
    """
    if image.mode != "P":
        return
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3).astype(int).sum(axis=1)
    black = np.flatnonzero(colours == 0)
    used = np.intersect1d(black, ids_in(label))
    if len(used) and black[0] != 0:
        raise BadFile(
            f"{name}: the colour of index 0 is not black and that of index {used[0]} is: an "
            "optimised palette, say; expected indices that are object ids, 0 the background"
        )


def _open_image(file: io.BufferedIOBase, path: Path | str) -> Image.Image:
    """Opens a picture with Pillow, which reads the header only."""
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        raise BadFile(f"{path}: no picture that can be read; expected a JPEG or PNG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadFile(f"{path}: no picture that can be read ({error})") from error


def decode_picture(data: bytes, name: str) -> Image.Image:
    """The decoded picture, as it is stored. Errors: ValueError for bytes that are cut short, differ
    from their checksums (PNG) or are no picture; `name` says whose."""
    file = io.BytesIO(data)
    _check_complete(file, name)
    return _decode(file, name)


def _decode(file: io.BufferedIOBase, path: Path | str) -> Image.Image:
    """Decodes a picture with Pillow; unlike Pillow, looks at a PNG's checksums first."""
    try:
        file.seek(0)
        _open_image(file, path).verify()  # leaves the image unusable
        file.seek(0)
        image = _open_image(file, path)
        image.load()
        return image
    except BadFile:
        raise
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise BadFile(f"{path}: damaged picture ({error})") from error


def _check_complete(file: io.BufferedIOBase, path: Path | str) -> None:
    """Raises ValueError if a JPEG or PNG lacks its end. Reads both ends, rarely the whole file.

    Decoders may fill the missing part of a JPEG with grey and say nothing. Other formats are left
    to their decoders. Leaves the file at its start.
    """
    start = file.read(len(_PNG_SIGNATURE))
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - len(_PNG_END)))
    end = file.read()
    file.seek(0)
    # Bytes may follow the end of the picture, hence the second look at the whole file.
    if start.startswith(_JPEG_START):
        complete = end.endswith(_JPEG_END) or _has_jpeg_end(file.read())
    elif start == _PNG_SIGNATURE:
        complete = end == _PNG_END or _PNG_END in file.read()
    else:
        complete = length > 0
    file.seek(0)
    if not complete:
        raise BadFile(f"{path}: a picture cut short, its end is missing after {length} bytes")


def _has_jpeg_end(data: bytes) -> bool:
    """Walks the segments of a JPEG: thumbnails inside segments have end markers of their own."""
    position = len(_JPEG_START)
    while segment := _JPEG_NEXT_SEGMENT.search(data, position):
        if segment[1] == _JPEG_END[1:]:
            return True
        # The segment states its length; after a start of scan, compressed data follow it.
        position = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2], "big")
    return False


def shades_in(label: UInt8[np.ndarray, "height width"]) -> str:
    """What is wrong if the ids look like shades: smoothed edges would make dozens of objects. Else
    nothing.

    In an object some pixel has its own id all around it; a shade lives in one-pixel edges only.
    """
    ids = ids_in(label)
    ids = ids[(ids != 0) & (ids != 255)]  # 255 is white or void in masks of any kind
    if len(ids) < 3:
        return ""
    kernel = np.ones((3, 3), np.uint8)
    inside = cv2.erode(label, kernel) == cv2.dilate(label, kernel)
    only_in_edges = np.setdiff1d(ids, ids_in(label, inside.view(np.uint8)))
    # Small ids may be real objects, barely visible; ids that jump to high values are shades.
    suspicious = 3 if ids[-1] > MAX_IDS_IN_MASK else 12
    mostly_edges = len(only_in_edges) >= suspicious and 2 * len(only_in_edges) > len(ids)
    if mostly_edges:
        return (
            f"{len(ids)} ids, {len(only_in_edges)} of them only in edges: an anti-aliased"
            f" or resized mask; expected hard edges and at most {MAX_IDS_IN_MASK} objects"
        )
    if len(ids) > MAX_IDS_IN_MASK:
        return (
            f"{len(ids)} ids, as shades of grey have; expected object ids, at most "
            f"{MAX_IDS_IN_MASK} in one mask (more objects can come with other frames' masks)"
        )
    return ""


def ids_in(
    label: UInt8[np.ndarray, "height width"], where: UInt8[np.ndarray, "height width"] | None = None
) -> Integer[np.ndarray, " ids"]:
    """The values of `label`, ascending. OpenCV's histogram is ten times faster than np.unique."""
    return np.flatnonzero(cv2.calcHist([label], [0], where, [256], [0, 256]))
