"""The evaluation command repeated, interrupted, shared by processes, and in folders in use."""

import contextlib
import zipfile

import numpy as np
import pytest
from evaluating import FRAMES, SIZE, masks_of, run, times_of
from PIL import Image
from small import small_network

import cfbi_jax
from cfbi_jax import evaluate
from cfbi_jax.files import BadFile
from cfbi_jax.inference import dataset
from cfbi_jax.models.images import IMAGENET_FORMAT, OFFICIAL_FORMAT


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


def test_some_videos_are_no_submission(config, tmp_path):
    out = tmp_path / "out"
    run(config, out)
    names = "submission.zip", "global_results-val.csv"
    before = [(out / name).read_bytes() for name in names]
    config.data.sequences = "synthetic-0001"
    run(config, out)
    assert [(out / name).read_bytes() for name in names] == before
    assert (out / "global_results-val-subset.csv").exists()


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
