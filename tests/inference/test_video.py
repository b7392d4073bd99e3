import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import state_frames, write_clip

from cfbi_jax.data import image_files
from cfbi_jax.inference import video

# ---- frames ----


def test_frames_of_a_folder_by_number(tmp_path):
    for i in (10, 9, 1):
        Image.new("RGB", (16, 12), (i, 0, 100)).save(tmp_path / f"{i}.png")
    frames = list(video.read_frames(tmp_path))
    assert [frame[0, 0].tolist() for frame in frames] == [[1, 0, 100], [9, 0, 100], [10, 0, 100]]
    assert frames[0].shape == (12, 16, 3)


def test_bad_folders_are_refused_before_the_first_frame(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        video.read_frames(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no frames"):
        video.read_frames(tmp_path)
    Image.new("RGB", (16, 12)).save(tmp_path / "0.jpg")
    Image.new("RGB", (16, 14)).save(tmp_path / "1.jpg")
    message = r"1\.jpg has 14 x 16 pixels \(height x width\); expected 12 x 16"
    with pytest.raises(ValueError, match=message):
        video.read_frames(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.new("RGB", (16, 12)).save(tmp_path / "1.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"1\.jpg: viewers turn .*orientation 3.* as stored"):
        video.read_frames(tmp_path)
    (tmp_path / "1.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"1\.jpg: a picture cut short"):
        video.read_frames(tmp_path)


def test_frames_of_a_video_file(tmp_path):
    reds = [np.full((48, 64, 3), (200, 20 * i, 0), np.uint8) for i in range(6)]
    write_clip(tmp_path / "clip.avi", reds)
    frames = list(video.read_frames(tmp_path / "clip.avi"))
    assert len(frames) == 6
    for i, frame in enumerate(frames):
        assert (frame.shape, frame.dtype) == ((48, 64, 3), np.uint8)
        assert np.abs(frame.mean(axis=(0, 1)) - (200, 20 * i, 0)).max() < 8


def test_bad_video_files(tmp_path):
    (tmp_path / "text.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match=r"text\.mp4: no video that can be read"):
        video.read_frames(tmp_path / "text.mp4")
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    write_clip(tmp_path / "whole.avi", noise)
    assert len(list(video.read_frames(tmp_path / "whole.avi"))) == 12
    data = (tmp_path / "whole.avi").read_bytes()
    # Its size is not known where it is written to a pipe.
    (tmp_path / "piped.avi").write_bytes(data[:4] + b"\xff" * 4 + data[8:])
    assert len(list(video.read_frames(tmp_path / "piped.avi"))) == 12
    (tmp_path / "cut.avi").write_bytes(data[:-100])
    message = rf"cut\.avi: cut short; it has {len(data) - 100} bytes, expected {len(data)}"
    with pytest.raises(ValueError, match=message):
        video.read_frames(tmp_path / "cut.avi")


def test_a_video_that_opens_and_gives_no_frame(tmp_path, monkeypatch):
    """As OpenCV's AV1 where no hardware decodes it; here a file that was read to its end before."""
    write_clip(tmp_path / "clip.avi", np.zeros((2, 48, 64, 3), np.uint8))
    capture = video.open_video(tmp_path / "clip.avi")
    while capture.grab():
        pass
    monkeypatch.setattr(video, "open_video", lambda path: capture)
    message = r"clip\.avi: no frame can be read \(codec MJPG\); .*ffmpeg -i IN OUT\.mp4"
    with pytest.raises(ValueError, match=message):
        next(video.read_frames(tmp_path / "clip.avi"))


@pytest.mark.parametrize("wide", [False, True])
def test_the_boxes_of_an_mp4_file(tmp_path, wide):
    def box(name, content):
        size = len(content) + (16 if wide else 8)
        start = (1 if wide else size).to_bytes(4, "big") + name
        return start + (size.to_bytes(8, "big") if wide else b"") + content

    # The index before the frames, as for the web: such a file opens without its end.
    data = box(b"ftyp", b"isom") + box(b"moov", b"index" * 9) + box(b"mdat", b"frames" * 99)
    (tmp_path / "whole.mp4").write_bytes(data)
    video._check_complete(tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes(data[:-1])
    message = rf"cut\.mp4: cut short; it has {len(data) - 1} bytes, expected {len(data)}"
    with pytest.raises(ValueError, match=message):
        video._check_complete(tmp_path / "cut.mp4")
    (tmp_path / "trailer.mp4").write_bytes(data + b"\xff\xf0\0\0\xd8camera's own")
    video._check_complete(tmp_path / "trailer.mp4")
    open_end = data + bytes(4) + b"mdat" + b"frames"  # a last box without a size
    (tmp_path / "open.mp4").write_bytes(open_end)
    video._check_complete(tmp_path / "open.mp4")


def turned(a, b, c, d, version):
    """An mp4 file's index whose track is shown by this matrix."""
    one = 1 << 16
    matrix = b"".join(x.to_bytes(4, "big", signed=True) for x in (a * one, b * one, 0))
    matrix += b"".join(x.to_bytes(4, "big", signed=True) for x in (c * one, d * one, 0, 9, 9, 1))
    times = bytes(32 if version else 20)
    header = bytes([0, 0, 0, 92 + 12 * version]) + b"tkhd" + bytes([version, 0, 0, 3]) + times
    header += bytes(16) + matrix + bytes(8)
    index = (16 + len(header)).to_bytes(4, "big") + b"moov"
    index += (8 + len(header)).to_bytes(4, "big") + b"trak" + header
    return bytes([0, 0, 0, 12]) + b"ftypisom" + index + bytes([0, 0, 0, 12]) + b"mdatdata"


@pytest.mark.parametrize("version", [0, 1])
def test_a_mirrored_video_is_refused(tmp_path, version):
    """OpenCV turns frames as an mp4 file asks, and leaves mirroring out."""
    path = tmp_path / "clip.mp4"
    for matrix in ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)):  # turns
        path.write_bytes(turned(*matrix, version))
        video._check_complete(path)
        video._check_not_mirrored(path)
    for matrix in ((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)):
        path.write_bytes(turned(*matrix, version))
        with pytest.raises(ValueError, match=r"clip\.mp4: players mirror this video"):
            video.read_frames(path)


def test_a_damaged_frame_is_no_end(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)
    write_clip(tmp_path / "clip.avi", frames)
    data = bytearray((tmp_path / "clip.avi").read_bytes())
    starts = [
        found.start() for found in re.finditer(b"00dc", data) if found.start() > data.find(b"movi")
    ]
    data[starts[3] + 8 : starts[4]] = bytes(starts[4] - starts[3] - 8)
    (tmp_path / "clip.avi").write_bytes(data)
    found = video.read_frames(tmp_path / "clip.avi")
    assert [next(found).shape for _ in range(3)] == 3 * [(48, 64, 3)]
    with pytest.raises(ValueError, match=r"clip\.avi: frame 3 is damaged, later ones can be read"):
        next(found)


def test_fewer_frames_than_a_file_states(tmp_path, caplog):
    """What there is, and a warning."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), np.uint8)
    write_clip(tmp_path / "clip.avi", frames)
    state_frames(tmp_path / "clip.avi", 12)
    assert len(list(video.read_frames(tmp_path / "clip.avi"))) == 5
    assert "clip.avi: 5 frames can be read; it states 12" in caplog.text


def test_a_colon_in_a_relative_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    write_clip(tmp_path / "clip.avi", frames)
    Path("clip.avi").rename("2024-05-01T12:30:00.avi")
    assert len(list(video.read_frames("2024-05-01T12:30:00.avi"))) == 3


# ---- masks ----


def test_mask_writer_has_written_everything_at_its_end(tmp_path):
    palette = image_files.VOC_PALETTE[::-1]
    label = np.zeros((6, 8), np.uint8)
    with video.MaskWriter(threads=2, pending=3) as writer:
        for i in range(10):
            label[:] = i
            writer.write(tmp_path / "out" / f"{i:05d}.png", label, palette)  # then changed again
    for i in range(10):
        with Image.open(tmp_path / "out" / f"{i:05d}.png") as image:
            assert (np.array(image) == i).all()
            assert (np.array(image.convert("RGB")) == palette[i]).all()
    assert len(list((tmp_path / "out").iterdir())) == 10


def test_mask_writer_waits_when_too_many_masks_are_pending(tmp_path, monkeypatch):
    writing, release = [], threading.Event()

    def slow_write(path, label, palette):
        writing.append(path)
        release.wait(10)

    monkeypatch.setattr(image_files, "write_mask", slow_write)
    accepted = []

    def produce():
        with video.MaskWriter(threads=1, pending=4) as writer:
            for i in range(20):
                writer.write(tmp_path / f"{i}.png", np.zeros((2, 2), np.uint8))
                accepted.append(i)

    thread = threading.Thread(target=produce)
    thread.start()
    time.sleep(0.2)
    assert len(accepted) == 4
    release.set()
    thread.join(10)
    assert len(writing) == 20


def test_mask_writer_raises_write_errors(tmp_path):
    (tmp_path / "file").touch()
    label = np.zeros((2, 2), np.uint8)
    with pytest.raises(OSError, match="file"), video.MaskWriter() as writer:
        writer.write(tmp_path / "file" / "0.png", label)  # raised at the end of the block

    written = []
    with pytest.raises(OSError, match="file"), video.MaskWriter(pending=2) as writer:
        for i in range(20):
            writer.write(tmp_path / ("file" if i == 0 else "out") / f"{i}.png", label)
            written.append(i)
    assert len(written) < 4  # raised at a later call, not after all of them


def test_mask_writer_lets_the_error_of_its_block_through(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZeroDivisionError), video.MaskWriter() as writer:
        writer.write(tmp_path / "file" / "0.png", np.zeros((2, 2), np.uint8))
        raise ZeroDivisionError


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_masks_before_an_error_are_written(tmp_path, monkeypatch, error):
    """But not those that wait when someone wants to stop."""
    write = image_files.write_mask

    def slow_write(*arguments):
        time.sleep(0.1)
        write(*arguments)

    monkeypatch.setattr(image_files, "write_mask", slow_write)
    with pytest.raises(error), video.MaskWriter(threads=1) as writer:
        for i in range(8):
            writer.write(tmp_path / f"{i}.png", np.zeros((2, 2), np.uint8))
        raise error
    assert (len(list(tmp_path.iterdir())) == 8) == (error is ZeroDivisionError)


# ---- pictures ----


def test_overlay_tints_objects_and_draws_their_outline():
    frame = np.full((12, 14, 3), 100, np.uint8)
    label = np.zeros((12, 14), np.uint8)
    label[2:8, 0:6] = 1  # touches the left border
    label[2:8, 6:12] = 2
    original = frame.copy()
    drawn = video.overlay(frame, label, alpha=0.25)
    np.testing.assert_array_equal(frame, original)
    np.testing.assert_array_equal(drawn[label == 0], frame[label == 0])
    assert drawn[5, 3].tolist() == [107, 75, 75]  # 0.75 * 100 + 0.25 * (128, 0, 0)
    assert drawn[5, 0].tolist() == [107, 75, 75]  # no outline along the picture's border
    assert drawn[2, 3].tolist() == drawn[7, 3].tolist() == drawn[5, 5].tolist() == [128, 0, 0]
    assert drawn[5, 6].tolist() == drawn[5, 11].tolist() == [0, 128, 0]
