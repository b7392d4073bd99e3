"""Scores of whole DAVIS folders: what counts, what is refused, and the tables."""

import io
import re

import numpy as np
import pytest
import slow_scores
from PIL import Image
from rich.console import Console

from cfbi_jax.data.image_files import shades_in
from cfbi_jax.evaluation import report
from cfbi_jax.evaluation.davis import score_davis
from cfbi_jax.evaluation.submission import check_submission


def blobs(seed, frames, shape, ids=(1, 2)):
    """A drifting rectangle per id: `uint8 [frames, height, width]`."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((frames, *shape), np.uint8)
    for object_id in ids:
        top, left = rng.integers(0, shape[0] // 2), rng.integers(0, shape[1] // 2)
        for mask in masks:
            top, left = top + rng.integers(-1, 2), left + rng.integers(-1, 2)
            mask[max(top, 0) : top + shape[0] // 3, max(left, 0) : left + shape[1] // 3] = object_id
    return masks


def assert_agrees(scores, slow):
    assert [(o.sequence, o.object_id) for o in scores.objects] == list(slow)
    for found, (region, boundary) in zip(scores.objects, slow.values(), strict=True):
        np.testing.assert_allclose(found.region, region, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.boundary, boundary, rtol=0, atol=1e-9)
    for measure, index in ((scores.region, 0), (scores.boundary, 1)):
        expected = np.mean([slow_scores.statistics(s[index]) for s in slow.values()], axis=0)
        np.testing.assert_allclose(
            (measure.mean, measure.recall, measure.decay), expected, rtol=0, atol=1e-9
        )
    assert scores.j_and_f == pytest.approx((scores.region.mean + scores.boundary.mean) / 2)


@pytest.fixture
def two_squares(tmp_path, write_davis, write_results):
    """Two sequences of 10 x 10 pixels whose scores are easily found by hand (radius 1)."""
    truth = np.zeros((4, 10, 10), np.uint8)
    truth[:, 2:6, 2:6] = 1
    vanishing = truth.copy()
    vanishing[2] = 0
    half = truth.copy()
    half[:, :, 4:] = 0
    root = write_davis(tmp_path / "DAVIS", {"b": truth, "a": truth})
    results = write_results(tmp_path / "results", {"a": half, "b": vanishing})
    return root, results


def test_agrees_with_the_definition_2017(tmp_path, write_davis, write_results):
    truth = {
        "one": blobs(0, 7, (60, 80)),
        "gap": blobs(1, 5, (48, 91), ids=(1, 3)),  # id 2 counts, and is nowhere
        "late": blobs(2, 6, (40, 40)),
        "more": blobs(5, 5, (40, 50), ids=(1, 2, 3)),
    }
    truth["more"][0][truth["more"][0] == 3] = 0  # object 3 is not in the first mask: not scored
    truth["late"][3:, :, :] *= truth["late"][3:, :, :] == 1  # object 2 leaves
    truth["one"][:, :4] = 255
    predicted = {name: np.roll(masks, (2, -3), (1, 2)) for name, masks in truth.items()}
    for masks in predicted.values():
        masks[masks == 255] = 0
    predicted["more"][predicted["more"] == 3] = 0
    root = write_davis(tmp_path / "DAVIS", truth)
    results = write_results(tmp_path / "results", predicted)
    scores = score_davis(root, results)
    assert_agrees(scores, slow_scores.davis(root, results, 2017, "val", "480p"))
    assert [o.object_id for o in scores.objects] == [1, 2, 1, 2, 3, 1, 2, 1, 2]
    assert scores.objects[0].frames == ("00001", "00002", "00003", "00004", "00005")


@pytest.mark.parametrize("value", [1, 255])
def test_agrees_with_the_definition_2016(tmp_path, write_davis, write_results, value):
    """0 / 255 files on one side, 0 / 1 or 0 / 255 on the other: 255 is never void."""
    masks = blobs(3, 5, (50, 60), ids=(1,))
    root = write_davis(tmp_path / "DAVIS", {"dog": masks * 255}, year=2016)
    results = write_results(tmp_path / "results", {"dog": np.roll(masks, 2, 1) * value})
    scores = score_davis(root, results, year=2016)
    assert_agrees(scores, slow_scores.davis(root, results, 2016, "val", "480p"))
    assert 0 < scores.region.mean < 1


def test_more_than_256_frames(tmp_path, write_davis, write_results):
    truth = np.repeat(blobs(4, 1, (12, 16), ids=(1,)), 262, axis=0)
    predicted = truth.copy()
    predicted[200:, :, ::2] = 0
    root = write_davis(tmp_path / "DAVIS", {"long": truth})
    results = write_results(tmp_path / "results", {"long": predicted})
    scores = score_davis(root, results)
    assert len(scores.objects[0].frames) == 260
    assert_agrees(scores, slow_scores.davis(root, results, 2017, "val", "480p"))
    assert scores.region.decay > 0.3


def test_first_and_last_frame_do_not_count(two_squares):
    root, results = two_squares
    before = score_davis(root, results)
    for name in ("a", "b"):
        (results / name / "00000.png").unlink()
        Image.fromarray(np.full((10, 10), 9, np.uint8)).save(results / name / "00003.png")
    assert score_davis(root, results).j_and_f == before.j_and_f


def test_sequences_restrict(two_squares):
    scores = score_davis(*two_squares, sequences=["a"])
    assert [o.sequence for o in scores.objects] == ["a"]
    with pytest.raises(ValueError, match="camel"):
        score_davis(*two_squares, sequences=["camel"])
    with pytest.raises(ValueError, match="no sequence"):
        score_davis(*two_squares, sequences=[])


def test_number_of_threads_changes_nothing(two_squares):
    one, many = (score_davis(*two_squares, num_threads=n) for n in (1, 5))
    assert (one.region, one.boundary) == (many.region, many.boundary)


def test_tables_byte_for_byte(two_squares, tmp_path):
    """a: half of a square, J = 8 / 16, F = 22 / 28 (precision 11 / 12, recall 11 / 16); b: 1, 0."""
    scores = score_davis(*two_squares)
    paths = report.write_tables(scores, tmp_path / "tables", "val")
    assert [path.name for path in paths] == [
        "global_results-val.csv",
        "per-sequence_results-val.csv",
        "per-object_results-val.csv",
    ]
    assert [path.read_bytes() for path in paths] == [
        b"J&F-Mean,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay\n"
        b"0.571,0.500,0.250,0.500,0.643,0.750,0.500\n",
        b"Sequence,J-Mean,F-Mean\nb_1,0.500,0.500\na_1,0.500,0.786\n",
        b"Sequence,Object,Frames,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay\n"
        b"b,1,2,0.500000,0.500000,1.000000,0.500000,0.500000,1.000000\n"
        b"a,1,2,0.500000,0.000000,0.000000,0.785714,1.000000,0.000000\n",
    ]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(
        path.name for path in paths
    )
    screen = Console(file=io.StringIO(), width=100)
    report.show(scores, "val", screen)
    shown = screen.file.getvalue()
    assert "0.571" in shown and "0.786" in shown
    (row,) = (line for line in shown.splitlines() if "a_1" in line)
    assert re.findall(r"\d\.\d+", row) == ["0.500", "0.000", "0.000", "0.786", "1.000", "0.000"]


def test_brackets_in_names_are_shown(tmp_path, write_davis, write_results):
    masks = np.ones((3, 8, 8), np.uint8)
    root = write_davis(tmp_path / "DAVIS", {"a[b]": masks})
    results = write_results(tmp_path / "results", {"a[b]": masks})
    screen = Console(file=io.StringIO(), width=100)
    report.show(score_davis(root, results), "val", screen)
    assert "a[b]_1" in screen.file.getvalue()


def test_too_high_id_is_an_error(two_squares):
    root, results = two_squares
    for wrong in (2, 255):
        mask = np.zeros((10, 10), np.uint8)
        mask[3:6, 3:6] = wrong
        Image.fromarray(mask).save(results / "a" / "00002.png")
        hint = {2: "$", 255: r" \(0 and 255 are masks as DAVIS 2016"}[wrong]
        with pytest.raises(ValueError, match=rf"a.00002\.png.* id {wrong}.*\[1\]{hint}"):
            score_davis(root, results)


def test_missing_prediction_is_an_error_before_scoring(two_squares):
    root, results = two_squares
    Image.fromarray(np.full((10, 10), 7, np.uint8)).save(results / "b" / "00001.png")
    (results / "a" / "00001.png").unlink()
    (results / "a" / "00002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 predictions.*a.00001\.png"):
        score_davis(root, results)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        score_davis(root, results / "nowhere")


def test_prediction_of_another_size_or_kind_is_an_error(two_squares):
    root, results = two_squares
    path = results / "a" / "00002.png"
    Image.new("L", (10, 20)).save(path)
    with pytest.raises(ValueError, match=r"a.00002\.png.*\(20, 10\).*\(10, 10\)"):
        score_davis(root, results)
    Image.new("RGB", (10, 10)).save(path)
    with pytest.raises(ValueError, match=r"a.00002\.png: RGB colours"):
        score_davis(root, results)
    Image.new("L", (10, 10)).save(path, format="JPEG")
    with pytest.raises(ValueError, match=r"a.00002\.png.*JPEG"):
        score_davis(root, results)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a.00002\.png"):
        score_davis(root, results)


def test_no_public_truth_is_an_error(two_squares):
    root, results = two_squares
    for i in (1, 2, 3):
        (root / "Annotations" / "480p" / "a" / f"{i:05d}.png").unlink()
    with pytest.raises(FileNotFoundError, match="only the first mask.*test-dev"):
        score_davis(root, results)


def test_unusable_truth_is_an_error(tmp_path, write_davis, write_results):
    masks = np.zeros((3, 10, 10), np.uint8)
    root = write_davis(tmp_path / "DAVIS", {"empty": masks})
    results = write_results(tmp_path / "results", {"empty": masks})
    with pytest.raises(ValueError, match=r"empty.00000\.png.*empty first mask"):
        score_davis(root, results)
    root = write_davis(tmp_path / "short", {"empty": masks[:2] + 1})
    with pytest.raises(ValueError, match="has 2 frames, expected at least 3"):
        score_davis(root, results)
    with pytest.raises(FileNotFoundError, match=r"other\.txt"):
        score_davis(root, results, split="other")


def test_scarcely_visible_objects_are_scored(tmp_path, write_davis, write_results):
    """What would be an anti-aliased drawing as a given mask is truth, and a prediction, like any
    other."""
    truth = np.zeros((4, 60, 100), np.uint8)
    for i in range(20):
        truth[:, 10 * (i // 10) : 10 * (i // 10) + 9, 10 * (i % 10) : 10 * (i % 10) + 9] = 1 + i
    prediction = truth.copy()
    for i in range(15):
        prediction[prediction == 1 + i] = 0
        prediction[:, 10 * (i // 10) : 10 * (i // 10) + 9, 10 * (i % 10) : 10 * (i % 10) + 2] = (
            1 + i
        )
    assert shades_in(prediction[0])
    root = tmp_path / "DAVIS"
    write_davis(root, {"crowd": truth})
    results = write_results(tmp_path / "results", {"crowd": prediction})
    scores = score_davis(root, results, 2017, "val", "480p")
    regions = [one.region.mean() for one in scores.objects]
    np.testing.assert_allclose(regions, [2 / 9] * 15 + [1] * 5)
    write_davis(root, {"crowd": prediction})  # the first mask, too
    assert score_davis(root, results).region.mean == 1
    assert check_submission(results, root, split="val") == []


def test_palettes_of_predictions_are_of_any_colours(two_squares):
    """The official tool reads indices alone."""
    root, results = two_squares
    expected = score_davis(root, results)
    for path in results.glob("*/*.png"):
        image = Image.open(path)
        image.putpalette([255, 255, 255, 0, 0, 0])  # black on white
        image.save(path)
    assert score_davis(root, results).region == expected.region
    assert check_submission(results, root, split="val") == []


def test_another_resolution(two_squares):
    root, results = two_squares
    before = score_davis(root, results)
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p").rename(root / kind / "240p")
    assert score_davis(root, results, resolution="240p").j_and_f == before.j_and_f


def test_prediction_of_another_width_is_an_error(two_squares):
    root, results = two_squares
    Image.new("L", (20, 10)).save(results / "a" / "00002.png")
    with pytest.raises(ValueError, match=r"a.00002\.png: size is \(10, 20\).*\(10, 10\)"):
        score_davis(root, results)
