"""What the evaluation command refuses, before anything is written."""

import pytest
from evaluating import command, masks_of, youtube_vos
from PIL import Image

from cfbi_jax import evaluate
from cfbi_jax.data.davis import evaluation_videos


def test_masks_are_not_written_over_the_data_set(config, davis):
    """`Annotations` without a resolution is where the masks of a work directory lie."""
    for kind in ("JPEGImages", "Annotations"):
        for folder in (davis / kind / "480p").iterdir():
            folder.rename(davis / kind / folder.name)
    before = masks_of(davis / "Annotations")
    config.data.resolution = ""
    with pytest.raises(ValueError, match="Annotations/.* are where masks would be written"):
        evaluate.prepare(config, davis)
    assert all((mask == before[p]).all() for p, mask in masks_of(davis / "Annotations").items())


def test_a_relative_root_is_seen_too(davis, tmp_path, monkeypatch):
    for kind in ("JPEGImages", "Annotations"):
        for folder in (davis / kind / "480p").iterdir():
            folder.rename(davis / kind / folder.name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Annotations/.* are where masks would be written"):
        evaluate.check_apart(evaluation_videos(davis.name, resolution=""), davis)


def test_all_frames_are_asked_for_where_they_are_anyway(config, tmp_path):
    config.data.all_frames = True
    with pytest.raises(ValueError, match=r"config\.data\.all_frames is for YouTube-VOS"):
        evaluate.prepare(config, tmp_path / "out")


@pytest.mark.parametrize("field, value", [("year", 2019), ("resolution", "Full-Resolution")])
def test_what_is_davis_own_does_nothing_for_youtube_vos(config, tmp_path, field, value):
    config.data.dataset = "youtube_vos"
    config.data[field] = value
    with pytest.raises(ValueError, match=rf"config\.data\.{field} is .*{value}.* is for DAVIS"):
        evaluate.prepare(config, tmp_path / "out")


def no_root(config, davis):
    config.data.root = str(davis / "nowhere")


def no_frame(config, davis):
    (davis / "JPEGImages/480p/synthetic-0001/00002.jpg").unlink()


def no_first_mask(config, davis):
    (davis / "Annotations/480p/synthetic-0001/00000.png").unlink()


def truncated_frame(config, davis):
    path = davis / "JPEGImages/480p/synthetic-0001/00003.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def rgb_truth(config, davis):
    path = davis / "Annotations/480p/synthetic-0001/00002.png"
    Image.open(path).convert("RGB").save(path)


def too_many_objects(config, davis):
    config.inference.max_objects = 1


def unknown_sequence(config, davis):
    config.data.sequences = "synthetic-0000, nothing"


def only_a_comma(config, davis):
    config.data.sequences = ","


def too_many_references(config, davis):
    youtube_vos(davis / "YTVOS", davis, {"synthetic-0000": {1: 0, 2: 2}})
    config.data.dataset, config.data.root = "youtube_vos", str(davis / "YTVOS")
    config.data.split, config.inference.max_references = "valid", 1


def no_such_weights(config, davis):
    """Known before the data set, which may be large, is looked at."""
    config.checkpoint = config.data.root = "nowhere"


def damaged_truth(config, davis):
    path = davis / "Annotations/480p/synthetic-0001/00002.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)


def no_weights(config, davis):
    config.checkpoint = ""


def unknown_dataset(config, davis):
    config.data.dataset = "kitti"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (no_root, "nowhere"),
        (no_frame, r"synthetic-0001.*00002"),
        (no_first_mask, r"synthetic-0001"),
        (truncated_frame, r"synthetic-0001/00003\.jpg.*cut short"),
        (rgb_truth, r"synthetic-0001/00002\.png: RGB colours"),
        (too_many_objects, r"max_objects = 1"),
        (unknown_sequence, "'nothing'.*near names"),
        (only_a_comma, "config.data.sequences is ','; expected names"),
        (no_such_weights, "no such checkpoint folder: nowhere"),
        (too_many_references, "synthetic-0000 has masks for 2 frames, and max_references is 1"),
        (damaged_truth, r"synthetic-0001/00002\.png: damaged picture"),
        (no_weights, "config.checkpoint is empty"),
        (unknown_dataset, '"kitti"; expected one of'),
    ],
)
def test_bad_input_is_found_before_anything_is_written(config, davis, tmp_path, spoil, message):
    spoil(config, davis)
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.prepare(config, out)
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_unwritable_output(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        evaluate.prepare(config, tmp_path / "file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Annotations").write_text("")
    with pytest.raises(OSError, match="Annotations"):
        evaluate.prepare(config, tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.rot=x"], "rot"),  # an unknown field is refused
        (["--workdir="], "error: --workdir is empty"),
        (["--config.mode=trian"], 'error: config.mode is "trian"'),
        (["--config.mode=eval"], "error: config.checkpoint is empty"),
        (["--config.mode=eval", "--config.untrained=True"], "error: config.data.root is empty"),
        (["--config.mode=eval", "config.seed=1"], "error: config.seed=1: no argument; expected"),
        ([], "error: config.data.root is empty"),
        (["--config.mode=train"], "error: config.sources.davis.root is empty"),
    ],
)
def test_command_refuses_bad_arguments_without_a_traceback_of_ours(tmp_path, arguments, message):
    done = command("--config=configs/davis.py", f"--workdir={tmp_path / 'out'}", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    if message.startswith("error"):
        assert "Traceback" not in done.stderr
