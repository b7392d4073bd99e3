"""Files are read back here with Pillow, not with the functions under test."""

import io
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cfbi_jax import files
from cfbi_jax.data import image_files


@pytest.fixture
def picture():
    """A picture with structure, so that a JPEG of it has a long compressed part."""
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def jpeg_bytes(picture, **options):
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, format="JPEG", quality=90, **options)
    return encoded.getvalue()


def disk(height, width, scale=1):
    """A disk of 1 on 0, `scale` times as large as the others."""
    y, x = np.mgrid[: height * scale, : width * scale] / scale
    return ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2).astype(np.uint8)


def test_voc_palette_has_the_published_colours():
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        4: (0, 0, 128),
        5: (128, 0, 128),
        6: (0, 128, 128),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert image_files.VOC_PALETTE.shape == (256, 3)
    assert {i: tuple(image_files.VOC_PALETTE[i].tolist()) for i in expected} == expected


def test_frames_are_rgb(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(image_files.read_frame(tmp_path / "a.png"), picture)
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    grey = image_files.read_frame(tmp_path / "grey.png")
    np.testing.assert_array_equal(grey, np.repeat(picture[..., :1], 3, axis=-1))


def test_jpeg_frames_are_decoded_as_by_the_official_code(tmp_path, picture):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes(picture))
    np.testing.assert_array_equal(image_files.read_frame(path), cv2.imread(str(path))[..., ::-1])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_not_applied_but_refused_beforehand(tmp_path, picture, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture).save(path, exif=exif)
    assert image_files.read_frame(path).shape == (40, 56, 3)
    with pytest.raises(ValueError, match=rf"a\.{suffix}: viewers turn .*orientation 6.* as stored"):
        image_files.image_size(path)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, -2, -1])
def test_truncated_jpeg_is_refused(tmp_path, picture, kept, progressive):
    data = jpeg_bytes(picture, progressive=progressive)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: kept if kept < 0 else int(kept * len(data))])
    for read in (image_files.read_frame, image_files.image_size):
        with pytest.raises(ValueError, match=r"cut\.jpg: a picture cut short"):
            read(path)


def test_truncated_jpeg_is_not_saved_by_the_end_of_its_thumbnail(tmp_path, picture):
    data = jpeg_bytes(picture, exif=b"Exif\x00\x00" + jpeg_bytes(picture[:16, :16]))
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: 3 * len(data) // 4])
    with pytest.raises(ValueError, match=r"cut\.jpg: a picture cut short"):
        image_files.read_frame(path)
    path.write_bytes(data)
    assert image_files.read_frame(path).shape == picture.shape


def test_zero_filled_jpeg_is_refused(tmp_path, picture):
    data = jpeg_bytes(picture)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(ValueError, match=r"cut\.jpg: a picture cut short"):
        image_files.read_frame(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_after_the_end_of_a_jpeg_are_legal(tmp_path, picture, progressive):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes(picture, progressive=progressive) + b"made by a camera\xff\xda\0")
    assert image_files.read_frame(path).shape == (40, 56, 3)
    assert image_files.image_size(path) == (40, 56)


def test_truncated_png_is_refused(tmp_path, picture):
    path = tmp_path / "cut.png"
    Image.fromarray(picture[..., 0] // 64).save(path)
    data = path.read_bytes()
    for length in (20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        for read in (image_files.read_frame, image_files.image_size, image_files.read_mask):
            with pytest.raises(ValueError, match=r"cut\.png: a picture cut short"):
                read(path)


READERS = [
    image_files.read_frame,
    image_files.image_size,
    image_files.read_mask,
    image_files.read_palette,
]


@pytest.mark.parametrize("read", READERS)
def test_other_files_are_refused(tmp_path, read):
    for name, content in {"text.png": b"not a picture", "empty.jpg": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read(tmp_path / "absent.png")


@pytest.mark.parametrize("read", [image_files.read_mask, image_files.read_palette])
def test_damaged_png_is_refused(tmp_path, read):
    path = tmp_path / "damaged.png"
    image_files.write_mask(path, np.random.default_rng(0).integers(0, 4, (50, 50), np.uint8))
    data = bytearray(path.read_bytes())
    data[-200:-100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.png: damaged picture"):
        read(path)


@pytest.mark.parametrize("after_the_pixels", [False, True])
def test_more_text_in_a_png_than_pillow_reads(tmp_path, after_the_pixels):
    """XMP, say: an error with the file's name and the reason."""
    path, text = tmp_path / "text.png", PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    Image.fromarray(disk(40, 56)).save(path, pnginfo=text)
    if after_the_pixels:
        data = path.read_bytes()
        start = data.index(b"iTXt") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    with pytest.raises(files.BadFile, match=r"text\.png: .* \(Decompressed data too large"):
        image_files.read_mask(path)


@pytest.mark.parametrize("mode", ["P", "L", "LA", "1", "I;16"])
def test_masks_of_ids_are_read(tmp_path, mode):
    ids = [[0, 1, 1], [1, 0, 0]] if mode == "1" else [[0, 1, 2], [5, 200, 255]]
    ids = np.kron(ids, np.ones((4, 4), int))
    if mode == "1":
        image = Image.fromarray(ids.astype(bool))
    elif mode == "I;16":
        image = Image.fromarray(ids.astype(np.uint16))
    else:
        image = Image.fromarray(ids.astype(np.uint8))
    if mode == "P":
        image.putpalette([7, 7, 7] * 256)  # colours do not matter
    if mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == mode
    mask = image_files.read_mask(tmp_path / "mask.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, ids)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_few_bits(tmp_path, bits):
    """A grey PNG written by hand: 16 pixels in a line, as many values in a byte as go in."""
    ids = np.arange(16) % 2**bits
    values = ids.reshape(-1, 8 // bits) << np.arange(8 - bits, -1, -bits)
    lines = 3 * (b"\0" + values.sum(axis=1).astype(np.uint8).tobytes())

    def part(kind, content):
        check = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + check.to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", 16, 3, bits, 0, 0, 0, 0)
    parts = part(b"IHDR", header), part(b"IDAT", zlib.compress(lines)), part(b"IEND", b"")
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    mask = image_files.read_mask(tmp_path / "mask.png", refuse_shades=False)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.tile(ids, (3, 1)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_mask_of_colours_is_refused_as_such(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "mask.png")
    message = rf"mask\.png: {mode} colours; expected an indexed or grey PNG"
    with pytest.raises(ValueError, match=message):
        image_files.read_mask(tmp_path / "mask.png")


def test_transparent_mask_is_refused(tmp_path):
    mask = np.full((8, 8, 2), 255, np.uint8)
    mask[0, 0, 1] = 254
    Image.fromarray(mask, "LA").save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png: a transparent picture; expected object ids"):
        image_files.read_mask(tmp_path / "mask.png")


def test_jpeg_mask_is_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "mask.jpg")
    with pytest.raises(
        ValueError, match=r"mask\.jpg: a JPEG file; expected an indexed or grey PNG"
    ):
        image_files.read_mask(tmp_path / "mask.jpg")


def test_ids_above_255_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 1], [2, 256]], np.uint16)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png: ids from 0 to 256; expected .* 0 to 255"):
        image_files.read_mask(tmp_path / "mask.png")


def anti_aliased_masks():
    fine = Image.fromarray(disk(60, 80, scale=8) * 255)
    yield "drawn smoothly", np.array(fine.resize((80, 60), Image.Resampling.BOX))
    for factor, kind in ((2, "BILINEAR"), (3, "BICUBIC"), (0.5, "LANCZOS")):
        size = (int(80 * factor), int(60 * factor))
        mask = Image.fromarray(disk(60, 80) * 255).resize(size, Image.Resampling[kind])
        yield f"{kind} {factor}", np.array(mask)
    # A paint program's edges, its 40 shades numbered in a palette of 41 colours.
    shades = np.array(fine.resize((80, 60), Image.Resampling.BOX)).astype(int)
    yield "indexed", (shades * 40 // 255).astype(np.uint8)


@pytest.mark.parametrize(("kind", "mask"), anti_aliased_masks())
def test_anti_aliased_mask_is_refused_as_such(tmp_path, kind, mask):
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png: \d+ ids, .* an anti-aliased or resized mask"):
        image_files.read_mask(tmp_path / "mask.png")


def test_more_ids_than_objects_have_are_refused():
    mask = np.kron(np.arange(70).reshape(7, 10), np.ones((5, 5), int)).astype(np.uint8)
    assert re.match("69 ids, as shades .* at most 64 in one mask", image_files.shades_in(mask))


def legal_masks():
    yield "white", disk(60, 80) * 255
    yield "one with void", np.where(disk(60, 80) > 0, 1, 0) + 254 * (disk(62, 80)[:60] > 2)
    yield "40 objects", np.kron(np.arange(40).reshape(5, 8), np.ones((4, 4), int))
    slivers = np.zeros((60, 80), int)
    slivers[5:55:5, 10] = np.arange(1, 11)  # ten objects of one pixel, as if nearly hidden
    yield "slivers", slivers
    yield "high ids", np.kron([[0, 100], [150, 200]], np.ones((9, 9), int))


@pytest.mark.parametrize(("kind", "mask"), legal_masks())
def test_legal_masks_are_not_taken_for_anti_aliased(kind, mask):
    label = image_files.check_label(mask, kind)
    np.testing.assert_array_equal(label, mask)
    assert not image_files.shades_in(label)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.int32), np.zeros((4, 4, 3), np.uint8)])
def test_what_is_no_label_map_is_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"a\.png: \w+ \(4, 4.*\); expected uint8 \[height, wid"):
        image_files.write_mask(tmp_path / "a.png", wrong)
    assert not list(tmp_path.iterdir())


def test_indices_of_an_optimised_palette_are_no_ids(tmp_path):
    """Pillow's `quantize` orders the colours anew: black, the background, is no longer index 0."""
    label = np.zeros((40, 56), np.uint8)
    label[4:30, 4:50] = 1
    label[10:20, 20:40] = 2
    path = tmp_path / "drawn.png"
    Image.fromarray(image_files.VOC_PALETTE[label]).quantize(8).save(path)
    background = np.array(Image.open(path))[0, 0]
    assert background != 0
    with pytest.raises(ValueError, match=rf"drawn\.png: .*index 0 .*index {background} "):
        image_files.read_mask(path)


def test_labels_from_python_are_checked():
    for array in (np.eye(4, dtype=bool), np.eye(4, dtype=np.int64), np.eye(4, dtype=np.uint16)):
        label = image_files.check_label(array, "first mask")
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, np.eye(4))
    bad = {
        "shape": np.zeros((4, 4, 1), np.uint8),
        "type float32": np.zeros((4, 4), np.float32),
        "from -1 to 0": np.array([[-1, 0]]),
        "from 0 to 300": np.array([[300, 0]]),
    }
    for message, array in bad.items():
        with pytest.raises(ValueError, match=f"first mask: .*{message}"):
            image_files.check_label(array, "first mask")


def test_written_mask_is_an_indexed_png(tmp_path):
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image_files.write_mask(tmp_path / "new" / "00000.png", label)
    with Image.open(tmp_path / "new" / "00000.png") as image:
        assert (image.format, image.mode) == ("PNG", "P")
        np.testing.assert_array_equal(np.array(image), label)
        rgb = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(rgb[0, :3], [(0, 0, 0), (128, 0, 0), (0, 128, 0)])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["00000.png"]


def test_palette_of_a_mask_is_kept(tmp_path):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    image_files.write_mask(tmp_path / "a.png", np.full((4, 4), 9, np.uint8), palette)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.array(image.convert("RGB"))[0, 0], palette[9])
    np.testing.assert_array_equal(image_files.read_palette(tmp_path / "a.png"), palette)


def test_short_palette_is_continued_and_grey_has_none(tmp_path):
    image = Image.fromarray(np.zeros((4, 4), np.uint8))
    image.putpalette([9, 8, 7, 6, 5, 4])
    image.save(tmp_path / "short.png")
    palette = image_files.read_palette(tmp_path / "short.png")
    np.testing.assert_array_equal(palette[:3], [(9, 8, 7), (6, 5, 4), (0, 128, 0)])
    assert palette.shape == (256, 3)
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    assert image_files.read_palette(tmp_path / "grey.png") is None


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "00000.png"
    image_files.write_mask(path, np.zeros((4, 4), np.uint8))
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        image_files.write_mask(path, np.ones((4, 4), np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_names_as_long_as_they_may_be(tmp_path):
    for name in ("n" * 251, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 83):
        image_files.write_mask(tmp_path / f"{name}.png", np.zeros((4, 4), np.uint8))
        assert (tmp_path / f"{name}.png").is_file()


def test_written_pictures_are_rgb(tmp_path, picture):
    image_files.write_image(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), picture)
    red = np.full((16, 16, 3), (250, 10, 10), np.uint8)
    image_files.write_image(tmp_path / "a.jpg", red)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG"
        assert np.abs(np.array(image).astype(int) - red).max() < 6
    with pytest.raises(ValueError, match=r"a\.gif"):
        image_files.write_image(tmp_path / "a.gif", picture)


def test_frames_are_listed_by_number(tmp_path):
    for name in ("frame10.png", "frame9.png", "frame1.JPG", "notes.txt", "._frame1.png"):
        (tmp_path / name).touch()
    names = [path.name for path in image_files.list_frames(tmp_path)]
    assert names == ["frame1.JPG", "frame9.png", "frame10.png"]
    (tmp_path / "frame9.jpg").touch()
    with pytest.raises(ValueError, match=r"frame9\.png: the same frame as frame9\.jpg"):
        image_files.list_frames(tmp_path)
    for name in ("0.jpg", "1.jpg", "first_mask.png"):
        (tmp_path / "numbers" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "numbers" / name).touch()
    with pytest.raises(ValueError, match=r"first_mask\.png: named otherwise than 0\.jpg"):
        image_files.list_frames(tmp_path / "numbers")
    (tmp_path / "numbers" / "first_mask.png").rename(tmp_path / "numbers" / "1_mask.png")
    with pytest.raises(ValueError, match=r"1_mask\.png: named otherwise than 0\.jpg"):
        image_files.list_frames(tmp_path / "numbers")
    (tmp_path / "mask.png").touch()
    (tmp_path / "frame9.jpg").unlink()
    with pytest.raises(ValueError, match=r"mask\.png: named otherwise than frame1\.JPG"):
        image_files.list_frames(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        image_files.list_frames(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no frames; .* \(\.jpg, "):
        image_files.list_frames(tmp_path / "empty")
    for name in ("0.jpg", "1.TIF"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(ValueError, match=r"1\.TIF: not a kind of picture .* expected \.jpg, "):
        image_files.list_frames(tmp_path / "empty")
