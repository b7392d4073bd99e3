"""scripts/segment.py, as a user runs it: what it writes is what `VideoSegmenter` says."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from from_scripts import load_script
from PIL import Image
from small import mask_of, random_video, small_network
from video_files import state_frames, write_clip

import cfbi_jax
from cfbi_jax.data.image_files import read_mask, read_palette, write_image, write_mask
from cfbi_jax.inference.video import overlay, read_frames, video_writer
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.weights.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
FIRST, LATER = mask_of({1: (4, 4, 20, 20), 7: (24, 30, 36, 50)}), mask_of({9: (2, 40, 14, 54)})


@pytest.fixture(scope="module")
def script():
    return load_script("segment")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a checkpoint, five pictures and two masks in colours of their own."""
    root = tmp_path_factory.mktemp("inputs")
    save_checkpoint(root / "checkpoint", *small_network(), IMAGENET_FORMAT)
    for t, frame in enumerate(random_video(5)):
        write_image(root / "pictures" / f"shot {8 + t}.png", frame)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    write_mask(root / "first.png", FIRST, palette)
    write_mask(root / "later.png", LATER)
    write_mask(root / "large.png", np.pad(LATER, (0, 1)))
    write_clip(root / "trimmed.avi", random_video(3))
    state_frames(root / "trimmed.avi", 9)
    return root


def run(script, inputs, output, *more, video="pictures", masks=("first.png",)):
    masks = [
        str(name).replace("=", f"={inputs}/") if "=" in name else inputs / name for name in masks
    ]
    arguments = ["--checkpoint", inputs / "checkpoint", "--video", inputs / video]
    arguments += ["--output", output, "--masks", *masks, *more]
    script.main(script.parse_arguments([str(argument) for argument in arguments]))


def frames_of(video):
    capture = cv2.VideoCapture(str(video))
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_pictures(script, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    masks = "first.png", "3=later.png"
    run(
        script,
        inputs,
        out,
        "--overlay",
        "--cutouts",
        "--option",
        "local_atrous_rate=2",
        masks=masks,
    )
    segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(inputs / "checkpoint", local_atrous_rate=2)
    frames = list(read_frames(inputs / "pictures"))
    labels = list(segmenter.segment(frames, {0: FIRST, 3: LATER}))

    names = [f"shot {8 + t}" for t in range(5)]
    assert {path.stem for path in (out / "masks").iterdir()} == set(names)
    palette = read_palette(inputs / "first.png")
    for name, label in zip(names, labels, strict=True):
        path = out / "masks" / f"{name}.png"
        np.testing.assert_array_equal(read_mask(path, refuse_shades=False), label)
        np.testing.assert_array_equal(read_palette(path), palette)

    cutouts = {}
    for path in (out / "cutouts").glob("*/*.png"):
        picture = np.array(Image.open(path))
        assert picture.shape == (40, 56, 4)
        t = names.index(path.stem)
        mine = labels[t] == int(path.parent.name)
        np.testing.assert_array_equal(picture[..., :3], frames[t] * mine[..., None])
        np.testing.assert_array_equal(picture[..., 3], 255 * mine)
        cutouts.setdefault(t, set()).add(int(path.parent.name))
    assert cutouts == dict.fromkeys(range(5), {1, 7, 9})  # every object in every frame
    assert (labels[3] == 9).any() and not (labels[2] == 9).any()

    found, per_second = frames_of(out / "overlay.mp4")
    assert len(found) == 5 and per_second == 24
    for picture, frame, label in zip(found, frames, labels, strict=True):
        shown = overlay(frame, label, palette=palette)
        other = overlay(frame, label)  # in other colours
        found = [np.abs(picture.astype(float) - x).mean() for x in (shown, other)]
        assert found[0] < 0.5 * found[1], found
    printed = capsys.readouterr().out
    assert printed.count("wrote") == 3 and "later.png: the mask of shot 11\n" in printed
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_video_file(script, inputs, tmp_path, monkeypatch):
    """Its masks are numbered; its overlay has its speed; sizes may be odd."""
    with video_writer(inputs / "video.mp4", 10.0) as write:
        for frame in random_video(4):
            write(frame)
    out = tmp_path / "out"
    run(script, inputs, out, "--overlay", video="video.mp4", masks=["2=first.png"])
    assert sorted(path.name for path in out.iterdir()) == ["masks", "overlay.mp4"]
    labels = [read_mask(out / "masks" / f"{t:05d}.png", refuse_shades=False) for t in range(4)]
    segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(inputs / "checkpoint")
    expected = segmenter.segment(read_frames(inputs / "video.mp4"), {2: FIRST})
    np.testing.assert_array_equal(labels, list(expected))
    found, per_second = frames_of(out / "overlay.mp4")
    assert len(found) == 4 and per_second == 10

    monkeypatch.setattr(script, "stated_by", lambda video: (0, 0.0))  # as of a stream
    run(script, inputs, tmp_path / "stream", "--overlay", video="video.mp4")
    found, per_second = frames_of(tmp_path / "stream" / "overlay.mp4")
    assert len(found) == 4 and per_second == 24

    odd = np.zeros((41, 57, 3), np.uint8)
    odd[:, -1] = 255
    with video_writer(tmp_path / "odd.mp4", 24.0) as write:
        write(odd)
    (frame,), _ = frames_of(tmp_path / "odd.mp4")
    assert frame.shape == (42, 58, 3) and (frame[:, -2:] > 128).all()


@pytest.mark.parametrize("per_second", [29.97, 239.947])
def test_speeds(script, tmp_path, per_second):
    with video_writer(tmp_path / "x.mp4", per_second) as write:
        for frame in random_video(3):
            write(frame)
    frames, found = frames_of(tmp_path / "x.mp4")
    assert len(frames) == 3 and abs(found - per_second) < 0.1


def test_a_video_that_is_not_whole_is_not_kept(script, tmp_path):
    """As on a full disk, of which OpenCV says nothing."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (
            pytest.raises(OSError, match=r"x\.mp4: \d of 9 frames were written"),
            video_writer(tmp_path / "x.mp4", 24.0) as write,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
            for seed in range(9):
                write(np.random.default_rng(seed).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [0, 2])
def test_of_what_fails_the_frames_so_far_stay(script, tmp_path, written, error):
    with pytest.raises(error), video_writer(tmp_path / "x.mp4", 24.0) as write:
        for _ in range(written):
            write(np.zeros((16, 16, 3), np.uint8))
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"] * (written > 0)
    assert len(frames_of(tmp_path / "x.mp4")[0]) == written


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(masks=["first.png", "0=later.png"]),
            "two masks for frame 0: .*first.png and .*later",
        ),
        (dict(masks=["first.png", "5=later.png"]), r"masks for frames \[5\]; .* has 5 frames"),
        (dict(masks=["pictures/shot 8.png"]), "shot 8.png: a mask among the pictures"),
        (dict(masks=["none.png"]), "none.png"),
        (dict(masks=["first.png", "2=large.png"]), "large.png: 41 x 57 .* expected 40 x 56 as the"),
        (
            dict(video="trimmed.avi", masks=["first.png", "4=later.png"]),
            r"frames \[4\]; .* has 3 f",
        ),
        (dict(video="none.mp4"), "none.mp4: no such folder of frames or video file"),
        (
            dict(more=["--option", "scale=2"]),
            r"--option scale=2: expected NAME=VALUE with one of \[",
        ),
        (dict(more=["--option", "flip"]), "--option flip: expected NAME=VALUE"),
        (
            dict(more=["--option", "scales=(1.0, -1.0)"]),
            "scales is .*; expected one or more positive",
        ),
    ],
)
def test_bad_input_is_known_before_anything_is_written(script, inputs, tmp_path, changes, message):
    changes = dict(changes)
    with pytest.raises((OSError, ValueError), match=message):
        run(script, inputs, tmp_path / "out", *changes.pop("more", ()), **changes)
    assert not (tmp_path / "out").exists()


def test_masks_may_be_given_one_by_one(script):
    given = ["--checkpoint=c", "--video=v", "--output=o", "--masks=a.png", "--masks", "4=b.png"]
    assert script.parse_arguments(given).masks == ["a.png", "4=b.png"]
    with pytest.raises(SystemExit):
        script.parse_arguments([*given, "--output="])


@pytest.mark.parametrize("nothing", ["", "4="])
def test_a_mask_without_a_name(script, nothing):
    """As from a shell's variable that is not set."""
    with pytest.raises(ValueError, match=f"--masks '{nothing}': expected the name of a PNG"):
        script.mask_paths([nothing])


def test_paths_from_the_home_folder(script, monkeypatch):
    """Shells leave the ~ behind an equals sign."""
    monkeypatch.setenv("HOME", "/home/someone")
    paths = script.mask_paths(["first.png", "40=~/late.png"])
    assert paths == {0: Path("first.png"), 40: Path("/home/someone/late.png")}
    required = ["--checkpoint=~/c", "--video=v.mp4", "--masks", "m.png", "--output=~/out"]
    found = script.parse_arguments(required)
    assert (found.checkpoint, found.output) == (Path("/home/someone/c"), Path("/home/someone/out"))


def test_of_two_at_once_one_gets_the_folder(script, inputs, tmp_path, monkeypatch):
    """The other starts while the first one still loads and compiles; nothing is written yet."""
    load = script.VideoSegmenter.from_checkpoint

    def slow(*arguments, **options):
        monkeypatch.setattr(script.VideoSegmenter, "from_checkpoint", load)
        with pytest.raises(FileExistsError, match="masks: exists; delete it, or"):
            run(script, inputs, tmp_path, masks=["later.png"])
        return load(*arguments, **options)

    monkeypatch.setattr(script.VideoSegmenter, "from_checkpoint", slow)
    run(script, inputs, tmp_path)
    np.testing.assert_array_equal(read_mask(tmp_path / "masks/shot 8.png"), FIRST)


def test_an_empty_folder_is_not_left(script, inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(script, inputs, tmp_path, "--checkpoint", "nowhere")
    assert not list(tmp_path.iterdir())
    run(script, inputs, tmp_path)
    assert len(list((tmp_path / "masks").iterdir())) == 5


def test_values_of_options_are_pythons_or_text(script):
    found = script.options_of(["compute_dtype=bfloat16", "flip=True", "scales=(1.0, 1.5)"])
    assert found == {"compute_dtype": "bfloat16", "flip": True, "scales": (1.0, 1.5)}


def command(inputs, output, *more, program=None):
    """The script in a process of its own."""
    program = program or [ROOT / "scripts" / "segment.py"]
    arguments = ["--checkpoint", inputs / "checkpoint", "--video", inputs / "pictures"]
    arguments += ["--masks", inputs / "first.png", "--output", output, *more]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )


def test_bad_input_is_a_message(inputs, tmp_path):
    done = command(inputs, tmp_path, "--option", "flip")
    assert done.returncode == 1 and done.stderr.startswith("error: --option flip: expected NAME")


def test_stopped(inputs, tmp_path):
    """The masks so far stay, whole; so does the overlay; no temporary file does."""
    code = f"""
import os, runpy
from cfbi_jax.inference import video
write = video.MaskWriter.write
def write_and_signal(self, path, *arguments):
    write(self, path, *arguments)
    if path.stem == "shot 10":
        os.kill(os.getpid(), {signal.SIGTERM:d})
video.MaskWriter.write = write_and_signal
runpy.run_path({str(ROOT / "scripts" / "segment.py")!r}, run_name="__main__")
"""
    done = command(inputs, tmp_path / "out", "--overlay", program=["-c", code])
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.endswith(
        "interrupted: --output holds the first frames only; delete it to repeat the command\n"
    )
    found = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*"))
    masks = [Path("masks") / f"shot {number}.png" for number in (10, 8, 9)]
    assert found == [*masks, Path("overlay.mp4")] or found == [*masks[1:], Path("overlay.mp4")]
    for path in masks[1:]:
        assert read_mask(tmp_path / "out" / path, refuse_shades=False).shape == FIRST.shape
    assert len(frames_of(tmp_path / "out" / "overlay.mp4")[0]) == 2


def test_results_are_not_replaced(script, inputs, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "cutouts").mkdir()
    with pytest.raises(FileExistsError, match="masks, .*cutouts: exists; delete it, or choose"):
        run(script, inputs, tmp_path)
