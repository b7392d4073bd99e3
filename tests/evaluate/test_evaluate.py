"""The evaluation command from folders to PNGs, tables and zip, with a small random network."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from evaluating import FRAMES, SIZE, command, masks_of, run, youtube_vos
from PIL import Image
from small import SMALL

import cfbi_jax
from cfbi_jax import evaluate
from cfbi_jax.data.davis import evaluation_videos
from cfbi_jax.evaluation.submission import check_submission


def test_davis_from_folder_to_zip(config, davis, tmp_path):
    out = tmp_path / "out"
    config.overlays = True
    scores = run(config, out)
    given = masks_of(davis / "Annotations" / "480p")
    found = masks_of(out / "Annotations")
    assert set(found) == set(given)
    for path, mask in found.items():
        assert mask.shape == SIZE and mask.dtype == np.uint8
        if path.name == "00000.png":
            np.testing.assert_array_equal(mask, given[path])
    image = Image.open(out / "Annotations" / "synthetic-0000" / "00001.png")
    assert image.mode == "P" and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]

    lines = (out / "per-sequence_results-val.csv").read_text().splitlines()
    assert lines[0] == "Sequence,J-Mean,F-Mean" and len(lines) == 5
    objects = np.array([line.split(",")[1:] for line in lines[1:]], float)
    means = evaluate.summary(scores)
    assert [means["J"], means["F"]] == pytest.approx(objects.mean(axis=0), abs=1e-3)
    assert means["J&F"] == pytest.approx(objects.mean(), abs=1e-3)
    assert abs(means["J"] - means["F"]) > 0.01
    for path in (out / "segmented").glob("*.json"):
        record = json.loads(path.read_text())
        assert 0 < record["compute_seconds"] < record["seconds"]
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(str(path) for path in found)
    assert check_submission(out / "submission.zip", davis, "davis2017", "val", "480p") == []
    strip = np.array(Image.open(out / "overlays" / "synthetic-0000.png"))
    assert strip.shape == (40, 4 * 56, 3)


def test_what_is_written_is_what_the_segmenter_gives(config, checkpoint, davis, tmp_path):
    run(config, tmp_path / "out")
    segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(checkpoint)
    name = "synthetic-0001"
    frames = [
        np.array(Image.open(path)) for path in sorted((davis / "JPEGImages/480p" / name).iterdir())
    ]
    mask = np.array(Image.open(davis / "Annotations/480p" / name / "00000.png"))
    found = masks_of(tmp_path / "out" / "Annotations" / name)
    for saved, label in zip(found.values(), segmenter.segment(frames, {0: mask}), strict=True):
        assert (saved != label).mean() < 0.01  # Pillow and OpenCV decode JPEG almost alike


def test_ids_with_a_gap(config, davis, tmp_path, caplog):
    """The official tool scores an object that is nowhere 1."""
    for path in (davis / "Annotations/480p/synthetic-0000").iterdir():
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label == 2, 4, label)).save(path)
    run(config, tmp_path / "out")
    assert "synthetic-0000: 2 of 4 objects (2, 3) are not in the first mask" in caplog.text
    assert "synthetic-0001" not in caplog.text


def test_objects_that_come_late(config, davis, tmp_path, caplog):
    """DAVIS has none; the layout of YouTube-VOS says where each begins."""
    path = davis / "Annotations/480p/synthetic-0000/00000.png"
    label = np.array(Image.open(path))
    Image.fromarray(np.where(label == 2, 0, label)).save(path)
    evaluate.prepare(config, tmp_path / "out")
    assert "synthetic-0000: objects 2 are not in the first mask, so they are neither" in caplog.text
    assert "synthetic-0001" not in caplog.text


def test_davis_2016_is_one_object(config, davis, tmp_path):
    lists = davis / "ImageSets"
    (lists / "2016").mkdir()
    (lists / "2016" / "val.txt").write_text("synthetic-0000\n")
    for path in (davis / "Annotations/480p/synthetic-0000").iterdir():
        image = Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8) * 255)
        image.putpalette(bytes(255 * 3) + b"\xff\xff\xff")  # of which 1 would be black
        image.save(path)
    config.data.year = 2016
    run(config, tmp_path / "out")
    written = Image.open(tmp_path / "out" / "Annotations" / "synthetic-0000" / "00000.png")
    assert written.getpalette()[3:6] == [128, 0, 0]
    found = masks_of(tmp_path / "out" / "Annotations")
    assert set(np.unique(np.stack(list(found.values())))) <= {0, 1}
    lines = (tmp_path / "out" / "per-sequence_results-val.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["synthetic-0000_1"]


def test_youtube_vos_with_a_late_object(config, davis, tmp_path):
    root, out = tmp_path / "YTVOS", tmp_path / "out"
    youtube_vos(root, davis, {"synthetic-0000": {1: 0, 2: 2}, "synthetic-0001": {2: 0}})
    later = root / "valid/Annotations/synthetic-0000/00002.png"
    image = Image.open(later)
    image.putpalette([0, 0, 0, 7, 7, 7, 9, 9, 9])
    image.save(later)
    config.data.dataset, config.data.root, config.data.split = "youtube_vos", str(root), "valid"
    run(config, out)
    found = masks_of(out / "Annotations" / "synthetic-0000")
    assert [2 in mask for mask in found.values()][:3] == [False, False, True]
    written = Image.open(out / "Annotations/synthetic-0000/00003.png")
    assert written.getpalette()[3:6] == [128, 0, 0]  # that of the first mask
    given = np.array(Image.open(later))
    third = list(found.values())[2]
    np.testing.assert_array_equal(third[given > 0], given[given > 0])
    only_two = masks_of(out / "Annotations" / "synthetic-0001").values()
    assert set(np.unique(np.stack(list(only_two)))) <= {0, 2}  # ids with a gap come back
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert all(name.startswith("Annotations/synthetic-000") for name in archive.namelist())
    assert check_submission(out / "submission.zip", root, "youtube_vos", "valid") == []


def test_youtube_vos_with_nothing_to_score(config, davis, tmp_path, caplog):
    """Where the only object comes with the last frame there are masks, and no scores."""
    root, out = tmp_path / "YTVOS", tmp_path / "out"
    youtube_vos(root, davis, {"synthetic-0000": {1: FRAMES - 1}}, "train")
    config.data.dataset, config.data.root, config.data.split = "youtube_vos", str(root), "train"
    assert run(config, out) is None
    assert (out / "submission.zip").is_file() and not list(out.glob("*.csv"))
    assert "no object has a frame after its first one to score: not scored" in caplog.text


def test_some_videos_of_youtube_vos(config, davis, tmp_path):
    """Seen objects and others differ here, and the mean is that of all."""
    root, names = tmp_path / "YTVOS", ("synthetic-0000", "synthetic-0001")
    youtube_vos(root, davis, {name: {1: 0, 2: 0} for name in names}, "train")
    for name in names:
        for path in (davis / "Annotations/480p" / name).iterdir():
            shutil.copy(path, root / "train/Annotations" / name)
            predicted = tmp_path / "predicted" / name / path.name
            predicted.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(np.array(Image.open(path)), 3, axis=1)).save(predicted)
    config.data.dataset, config.data.root, config.data.split = "youtube_vos", str(root), "train"
    config.data.sequences = names[1]
    videos = evaluate.videos_of(config)
    assert [video.name for video in videos] == [names[1]]
    scores = evaluate.score(config.data, videos, tmp_path / "predicted", tmp_path / "out")
    assert {found.sequence for found in scores.objects} == {names[1]}
    assert evaluate.summary(scores) == {"J&F": scores.overall}
    assert scores.overall != scores.groups[0].region


def test_tables_without_a_short_sequence_are_not_called_the_splits(config, davis, tmp_path, caplog):
    """First and last frames do not count."""
    for folder in ("JPEGImages/480p", "Annotations/480p"):
        for name, count in (("synthetic-0000", 3), ("synthetic-0001", 2)):
            for path in sorted((davis / folder / name).iterdir())[count:]:
                path.unlink()
    videos, out = evaluation_videos(davis), tmp_path / "out"
    scores = evaluate.score(config.data, videos, davis / "Annotations" / "480p", out)
    assert {found.sequence for found in scores.objects} == {"synthetic-0000"}
    assert scores.j_and_f == 1 and "synthetic-0001 left out" in caplog.text
    assert len(list(out.glob("*.csv"))) == len(list(out.glob("*-val-subset.csv"))) == 3


def test_first_masks_only_is_not_scored(config, davis, tmp_path):
    for path in (davis / "Annotations/480p").rglob("*.png"):
        if path.name != "00000.png":
            path.unlink()
    run(config, tmp_path / "out")
    assert (tmp_path / "out" / "submission.zip").exists()
    assert not list((tmp_path / "out").glob("*.csv"))


def test_all_frames_are_segmented_and_the_listed_ones_kept(config, davis, tmp_path, caplog):
    root, out = tmp_path / "YTVOS", tmp_path / "out"
    youtube_vos(root, davis, {"synthetic-0000": {1: 0}})
    shutil.copytree(root / "valid" / "JPEGImages", root / "valid_all_frames" / "JPEGImages")
    meta = json.loads((root / "valid/meta.json").read_text())
    meta["videos"]["synthetic-0000"]["objects"]["1"]["frames"] = ["00000", "00003"]
    (root / "valid/meta.json").write_text(json.dumps(meta))
    config.data.dataset, config.data.root, config.data.split = "youtube_vos", str(root), "valid"
    config.data.all_frames = config.overlays = True
    caplog.set_level("INFO", "cfbi_jax")
    run(config, out)
    assert f"1 videos, {FRAMES} frames of {root} (all frames, not every fifth)" in caplog.text
    assert [path.stem for path in masks_of(out / "Annotations")] == ["00000", "00003"]
    record = json.loads((out / "segmented/synthetic-0000.json").read_text())
    assert record["frames"] == FRAMES
    assert check_submission(out / "submission.zip", root, "youtube_vos", "valid") == []
    assert Image.open(out / "overlays/synthetic-0000.png").width == 2 * SIZE[1]


def test_the_palette_of_the_first_mask_comes_back(config, davis, tmp_path):
    path = davis / "Annotations/480p/synthetic-0000/00000.png"
    image = Image.open(path)
    palette = np.arange(768, dtype=np.uint8)[::-1].tolist()
    image.putpalette(palette)
    image.save(path)
    run(config, tmp_path / "out")
    for name, expected in (("synthetic-0000", palette[:9]), ("synthetic-0001", [0] * 3 + [128])):
        written = Image.open(tmp_path / "out" / "Annotations" / name / "00002.png")
        assert written.getpalette()[: len(expected)] == expected


def test_quickstart_command(tmp_path):
    """A step of a smaller network, and one of the held-out videos."""
    done = command(
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'out'}",
        f"--config.compilation_cache={tmp_path / 'cache'}",
        "--config.data.sequences=synthetic-0001",
        "--config.num_train_steps=1",
        "--config.batch_size=1",
        "--config.clips.crop_size=33",
        "--config.clips.max_objects=1",
        "--config.clips.num_current=1",  # every one is compiled
        *(f"--config.model.{key}={value}" for key, value in SMALL.items()),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1: loss" in done.stdout
    assert (tmp_path / "out" / "best" / "variables").is_dir()
    assert re.search(r"per second with decoding and writing, [\d.]+ without", done.stdout)
    assert re.search(r"\d+ compilations", done.stdout)
    assert "J&F-Mean" in done.stdout
    assert (tmp_path / "out" / "overlays" / "synthetic-0001.png").exists()
    assert any((tmp_path / "cache").iterdir())
