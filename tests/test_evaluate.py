"""The evaluation command from folders to PNGs, tables and zip, with a small random network."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import SMALL, small_network

import cfbi_jax
from cfbi_jax import evaluate
from cfbi_jax.config import default_config
from cfbi_jax.data import synthetic
from cfbi_jax.data.davis import evaluation_videos
from cfbi_jax.evaluation.submission import check_submission
from cfbi_jax.files import BadFile
from cfbi_jax.inference import dataset
from cfbi_jax.models.images import IMAGENET_FORMAT, OFFICIAL_FORMAT

ROOT = Path(__file__).parents[1]
FRAMES, SIZE = 4, (40, 56)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ckpt"
    cfbi_jax.save_checkpoint(path, *small_network(), IMAGENET_FORMAT)
    return path


@pytest.fixture
def davis(tmp_path):
    """A DAVIS folder of two sequences, and its size on disk kept small."""
    root = tmp_path / "DAVIS"
    synthetic.write_davis(root, (0, 1), num_frames=FRAMES, size=SIZE)
    return root


@pytest.fixture
def config(checkpoint, davis):
    config = default_config()
    config.checkpoint = str(checkpoint)
    config.data.root = str(davis)
    return config


def run(config, workdir):
    return evaluate.run(evaluate.prepare(config, workdir))


def masks_of(folder):
    return {p.relative_to(folder): np.array(Image.open(p)) for p in sorted(folder.rglob("*.png"))}


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


def youtube_vos(root, davis, starts, split="valid"):
    """The synthetic DAVIS videos in YouTube-VOS layout, annotated only where an object starts."""
    meta = {}
    folder = root / split
    for name, objects in starts.items():
        shutil.copytree(davis / "JPEGImages/480p" / name, folder / "JPEGImages" / name)
        (folder / "Annotations" / name).mkdir(parents=True)
        stems = [f"{t:05d}" for t in range(FRAMES)]
        for start in set(objects.values()):
            source = Image.open(davis / "Annotations/480p" / name / f"{start:05d}.png")
            label = np.array(source)
            visible = [i for i, first in objects.items() if first == start]
            label[~np.isin(label, visible)] = 0
            image = Image.fromarray(label)
            image.putpalette(source.getpalette())
            image.save(folder / "Annotations" / name / f"{start:05d}.png")
        objects = {
            str(i): {"category": "blob", "frames": stems[start:]} for i, start in objects.items()
        }
        meta[name] = {"objects": objects}
    (folder / "meta.json").write_text(json.dumps({"videos": meta}))


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


# ---------------------------------------------------------------------------- resuming, sharing


def times_of(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*.png"))}


def test_resume(config, tmp_path):
    out = tmp_path / "out"
    run(config, out)
    expected, first = masks_of(out / "Annotations"), times_of(out / "Annotations")

    (out / "submission.zip").unlink()
    run(config, out)  # nothing to compute, but all that follows is there again
    assert times_of(out / "Annotations") == first
    assert (out / "submission.zip").exists()

    # Killed in the middle of the second video: some PNGs, no record.
    (out / "segmented" / "synthetic-0001.json").unlink()
    (out / "Annotations" / "synthetic-0001" / "00003.png").unlink()
    run(config, out)
    again = times_of(out / "Annotations")
    changed = {p.parent.name for p in again if again[p] != first.get(p)}
    assert changed == {"synthetic-0001"}
    for path, mask in masks_of(out / "Annotations").items():
        np.testing.assert_array_equal(mask, expected[path])

    config.overwrite = True
    run(config, out)
    assert all(t != first[p] for p, t in times_of(out / "Annotations").items())


def test_other_options_or_weights_are_noticed(config, tmp_path, checkpoint):
    out = tmp_path / "out"
    run(config, out)
    first = times_of(out / "Annotations")
    config.inference.flip = True
    with pytest.raises(ValueError, match=r"options: .*'flip': False.* there.*'flip': True.* now"):
        evaluate.prepare(config, out)
    config.inference.flip = False
    model, variables = small_network()
    variables = {**variables, "params": {**variables["params"]}}
    variables["params"]["background_bias"] = np.float32(0.25)
    cfbi_jax.save_checkpoint(tmp_path / "other", model, variables, IMAGENET_FORMAT)
    config.checkpoint = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"weights: [^\n]*\n.*--config.overwrite=True"):
        evaluate.prepare(config, out)
    assert times_of(out / "Annotations") == first
    config.checkpoint = str(checkpoint)
    evaluate.prepare(config, out)


def test_bounds_may_change_and_what_makes_the_masks_may_not(config, tmp_path):
    out = tmp_path / "out"
    run(config, out)
    config.inference.max_objects, config.inference.memory_mib = 6, 4000
    evaluate.prepare(config, out)
    model, variables = small_network()
    others = {
        "model": (model.clone(global_atrous_rate=2), IMAGENET_FORMAT),
        "image_format": (model, OFFICIAL_FORMAT),
    }
    for name, (other, image_format) in others.items():
        cfbi_jax.save_checkpoint(tmp_path / name, other, variables, image_format)
        config.checkpoint = str(tmp_path / name)
        with pytest.raises(ValueError, match=f"\n  {name}: "):
            evaluate.prepare(config, out)


def test_another_data_set_of_the_same_names_is_noticed(config, davis, tmp_path):
    run(config, tmp_path / "out")
    path = davis / "Annotations/480p/synthetic-0001/00000.png"
    image = Image.open(path)
    mirrored = Image.fromarray(np.array(image)[:, ::-1].copy())
    mirrored.putpalette(image.getpalette())
    mirrored.save(path)
    with pytest.raises(ValueError, match=r"synthetic-0001\.json: [^\n]*\n  video: "):
        evaluate.prepare(config, tmp_path / "out")


def test_masks_of_an_earlier_run_do_not_enter_the_zip(config, tmp_path):
    stale = tmp_path / "out" / "Annotations" / "synthetic-0000" / "00099.png"
    stale.parent.mkdir(parents=True)
    (tmp_path / "out" / "segmented").mkdir()
    (tmp_path / "out" / "segmented" / "synthetic-0000.lock").touch()  # the run was interrupted
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(stale)
    run(config, tmp_path / "out")
    assert not stale.exists()


def test_truth_that_breaks_meanwhile_costs_the_scores_alone(config, davis, tmp_path):
    """The submission is packed before; the command repeated scores what is there."""
    out, truth = tmp_path / "out", davis / "Annotations/480p/synthetic-0000/00002.png"
    evaluation, whole = evaluate.prepare(config, out), truth.read_bytes()
    truth.write_bytes(whole[:30])
    with pytest.raises(BadFile, match="00002"):
        evaluate.run(evaluation)
    assert len(zipfile.ZipFile(out / "submission.zip").namelist()) == 2 * FRAMES
    truth.write_bytes(whole)
    times = times_of(out / "Annotations")
    assert run(config, out) is not None
    assert times_of(out / "Annotations") == times


def test_first_masks_only_is_not_scored(config, davis, tmp_path):
    for path in (davis / "Annotations/480p").rglob("*.png"):
        if path.name != "00000.png":
            path.unlink()
    run(config, tmp_path / "out")
    assert (tmp_path / "out" / "submission.zip").exists()
    assert not list((tmp_path / "out").glob("*.csv"))


def test_processes_share_the_videos(config, tmp_path):
    """While somebody else holds one video, we do the other; whoever is last scores."""
    out = tmp_path / "out"
    (out / "segmented").mkdir(parents=True)
    with dataset._hold(out / "segmented" / "synthetic-0000.lock") as held:
        assert held
        run(config, out)
        assert not (out / "Annotations" / "synthetic-0000").exists()
        assert len(times_of(out / "Annotations" / "synthetic-0001")) == FRAMES
        assert not (out / "submission.zip").exists()
    run(config, out)
    assert len(times_of(out / "Annotations" / "synthetic-0000")) == FRAMES
    assert (out / "submission.zip").exists()


def test_masks_of_something_else_are_not_replaced(config, tmp_path):
    """Such as a baseline's, or the data set's own."""
    mask = tmp_path / "out" / "Annotations" / "synthetic-0000" / "00002.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"somebody's")
    with pytest.raises(BadFile, match="synthetic-0000: masks that were made by something else"):
        evaluate.prepare(config, tmp_path / "out")
    assert mask.read_bytes() == b"somebody's"
    config.overwrite = True
    run(config, tmp_path / "out")
    assert mask.read_bytes() != b"somebody's"


def test_a_video_that_another_process_gave_up_is_taken_over(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluation = evaluate.prepare(config, out)
    held = contextlib.ExitStack()
    assert held.enter_context(dataset._hold(out / "segmented" / "synthetic-0000.lock"))
    write = dataset.write_file

    def write_and_give_up(path, data):  # while we work on the next video
        write(path, data)
        held.close()

    monkeypatch.setattr(dataset, "write_file", write_and_give_up)
    assert evaluate.run(evaluation) is not None
    assert len(times_of(out / "Annotations" / "synthetic-0000")) == FRAMES
    assert (out / "submission.zip").exists()


def test_two_runs_do_not_mix_in_one_folder(config, tmp_path):
    """Both began in an empty folder, and each did a video."""
    out = tmp_path / "out"
    first = evaluate.prepare(config, out)
    config.inference.global_atrous_rate = 2
    second = evaluate.prepare(config, out)
    with dataset._hold(out / "segmented" / "synthetic-0000.lock"):
        evaluate.run(second)
    message = r"synthetic-0001\.json: .*made by something else"
    with (
        dataset._hold(out / "segmented" / "synthetic-0001.lock"),
        pytest.raises(BadFile, match=message),  # which the command shows without a traceback
    ):
        evaluate.run(first)
    assert not (out / "submission.zip").exists()


def test_an_interrupted_replacement_is_unfinished(config, tmp_path, monkeypatch):
    """Half of its masks are of the old weights: no table and no zip is left, and the same command
    without `overwrite` goes on."""
    out = tmp_path / "out"
    run(config, out)
    config.overwrite = True
    evaluation = evaluate.prepare(config, out)

    def segment(frames, masks, times):
        for frame in frames:
            yield np.zeros(frame.shape[:2], np.uint8)
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.segmenter, "segment", segment)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(evaluation)
    assert dataset.unfinished(evaluation.videos, out) == ["synthetic-0000", "synthetic-0001"]
    assert not (out / "submission.zip").exists() and not list(out.glob("*.csv"))
    monkeypatch.undo()
    config.overwrite = False
    run(config, out)
    assert (out / "submission.zip").exists() and len(list(out.glob("*.csv"))) == 3


def test_a_lost_mask_or_record_is_made_again(config, tmp_path):
    out = tmp_path / "out"
    run(config, out)
    before = (out / "submission.zip").read_bytes()
    (out / "Annotations" / "synthetic-0001" / "00002.png").unlink()
    (out / "segmented" / "synthetic-0000.json").write_bytes(b"")
    run(config, out)
    assert (out / "submission.zip").read_bytes() == before
    evaluation = evaluate.prepare(config, out)
    for content in (b"{}", b"[]", b"\xff"):
        assert dataset.unfinished(evaluation.videos, out) == []
        record = out / "segmented" / "synthetic-0000.json"
        whole = record.read_bytes()
        record.write_bytes(content)
        assert dataset.unfinished(evaluation.videos, out) == ["synthetic-0000"]
        record.write_bytes(whole)


def test_all_frames_are_segmented_and_the_listed_ones_kept(config, davis, tmp_path):
    root, out = tmp_path / "YTVOS", tmp_path / "out"
    youtube_vos(root, davis, {"synthetic-0000": {1: 0}})
    shutil.copytree(root / "valid" / "JPEGImages", root / "valid_all_frames" / "JPEGImages")
    meta = json.loads((root / "valid/meta.json").read_text())
    meta["videos"]["synthetic-0000"]["objects"]["1"]["frames"] = ["00000", "00003"]
    (root / "valid/meta.json").write_text(json.dumps(meta))
    config.data.dataset, config.data.root, config.data.split = "youtube_vos", str(root), "valid"
    config.data.all_frames = config.overlays = True
    run(config, out)
    assert [path.stem for path in masks_of(out / "Annotations")] == ["00000", "00003"]
    record = json.loads((out / "segmented/synthetic-0000.json").read_text())
    assert record["frames"] == FRAMES
    assert check_submission(out / "submission.zip", root, "youtube_vos", "valid") == []
    assert Image.open(out / "overlays/synthetic-0000.png").width == 2 * SIZE[1]


def test_some_videos_are_no_submission(config, tmp_path):
    out = tmp_path / "out"
    run(config, out)
    names = "submission.zip", "global_results-val.csv"
    before = [(out / name).read_bytes() for name in names]
    config.data.sequences = "synthetic-0001"
    run(config, out)
    assert [(out / name).read_bytes() for name in names] == before
    assert (out / "global_results-val-subset.csv").exists()


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


def test_overlays_of_finished_videos(config, davis, tmp_path):
    out = tmp_path / "out"
    run(config, out)
    before = times_of(out / "Annotations")
    config.overlays = True
    run(config, out)
    assert times_of(out / "Annotations") == before
    strip = np.array(Image.open(out / "overlays" / "synthetic-0001.png"))
    assert strip.shape == (40, 4 * 56, 3)
    frame = np.array(Image.open(davis / "JPEGImages/480p/synthetic-0001/00003.jpg"))
    background = np.array(Image.open(out / "Annotations/synthetic-0001/00003.png")) == 0
    difference = np.abs(strip[:, -56:][background].astype(int) - frame[background])
    assert np.median(difference) < 5


def test_what_is_replaced_leaves_no_picture_and_no_table_behind(config, tmp_path):
    """Of all videos, when some are done again, and of some, when all are."""
    out, tables = tmp_path / "out", {}
    config.overlays = True
    run(config, out)
    tables[""] = sorted(path.name for path in out.glob("*.csv"))
    before = (out / "overlays/synthetic-0000.png").read_bytes()

    config.inference.flip, config.overwrite, config.overlays = True, True, False
    config.data.sequences = "synthetic-0000"
    run(config, out)
    tables["-subset"] = sorted(path.name for path in out.glob("*.csv"))
    assert tables["-subset"] == [name.replace(".csv", "-subset.csv") for name in tables[""]]
    config.overwrite, config.overlays = False, True
    run(config, out)
    assert (out / "overlays/synthetic-0000.png").read_bytes() != before

    config.data.sequences, config.overwrite = "", True
    run(config, out)
    assert sorted(path.name for path in out.glob("*.csv")) == tables[""]


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


# ------------------------------------------------------------------------------------ bad input


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


# ---------------------------------------------------------------------------------- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cfbi_jax.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )


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
