"""The local YouTube-VOS scorer: objects that start late, ids with gaps, groups of categories."""

import io
import json
import shutil

import numpy as np
import pytest
import slow_scores
from rich.console import Console

from cfbi_jax.evaluation import report
from cfbi_jax.evaluation.youtube_vos import score_youtube_vos

FRAMES = ("00000", "00005", "00010", "00015")


def square(*objects):
    """A 20 x 24 mask with a 6 x 6 square per (id, top, left)."""
    mask = np.zeros((20, 24), np.uint8)
    for object_id, top, left in objects:
        mask[top : top + 6, left : left + 6] = object_id
    return mask


@pytest.fixture
def late_object(tmp_path, write_youtube_vos, write_results):
    """Object 2 from the start, absent in 00010; object 5 from 00005 on."""
    truth = [
        square((2, 1, 1)),
        square((2, 1, 2), (5, 12, 12)),
        square((5, 12, 13)),
        square((2, 2, 3), (5, 12, 14)),
    ]
    predicted = [np.roll(mask, 1, axis=0) for mask in truth]
    predicted[2][:3, :3] = 2
    objects = {
        "2": {"category": "dog", "frames": ["00000", "00005", "00015"]},
        "5": {"category": "zebra", "frames": ["00005", "00010", "00015"]},
    }
    root = write_youtube_vos(
        tmp_path / "YT", {"v": dict(zip(FRAMES, truth, strict=True))}, {"v": objects}, "held_out"
    )
    results = write_results(tmp_path / "out", {"v": dict(zip(FRAMES, predicted, strict=True))})
    slow = {
        2: [slow_scores.j_and_f(predicted[i] == 2, truth[i] == 2) for i in (1, 2, 3)],
        5: [slow_scores.j_and_f(predicted[i] == 5, truth[i] == 5) for i in (2, 3)],
    }
    return root, results, slow


def test_scored_frames_and_values(late_object):
    root, results, slow = late_object
    scores = score_youtube_vos(root, results, "held_out")
    assert [(o.sequence, o.object_id, o.frames) for o in scores.objects] == [
        ("v", 2, FRAMES[1:]),
        ("v", 5, FRAMES[2:]),
    ]
    for o in scores.objects:
        found = np.stack([o.region, o.boundary], axis=1)
        np.testing.assert_allclose(found, slow[o.object_id], rtol=0, atol=1e-9)
    assert scores.objects[0].region[1] == 0  # predicted where it is absent
    assert scores.categories == ("dog", "zebra")


def test_order_of_frames_and_of_objects(tmp_path, write_youtube_vos, write_results):
    """By number, and by id, whichever starts first."""
    frames = ("99990", "99995", "100000", "100005")
    masks = [square((5, 1, 1))] + [square((5, 1, 1), (2, 12, 12))] * 3
    named = {"v": dict(zip(frames, masks, strict=True))}
    objects = {
        "2": {"category": "cat", "frames": list(frames[1:])},
        "5": {"category": "dog", "frames": list(frames)},
    }
    root = write_youtube_vos(tmp_path / "YT", named, {"v": objects}, "train")
    scores = score_youtube_vos(root, write_results(tmp_path / "out", named))
    found = [(o.object_id, o.frames) for o in scores.objects]
    assert found == [(2, frames[2:]), (5, frames[1:])]
    assert scores.categories == ("cat", "dog")
    assert [g.name for g in scores.groups] == ["seen"]


def test_seen_and_unseen(late_object, caplog):
    root, results, slow = late_object
    dog, zebra = np.mean(slow[2], axis=0), np.mean(slow[5], axis=0)

    scores = score_youtube_vos(root, results, "held_out", seen_categories=["dog"])
    assert [(g.name, g.num_objects) for g in scores.groups] == [("seen", 1), ("unseen", 1)]
    assert (scores.groups[0].region, scores.groups[0].boundary) == pytest.approx(tuple(dog))
    assert (scores.groups[1].region, scores.groups[1].boundary) == pytest.approx(tuple(zebra))
    assert scores.overall == pytest.approx(np.mean([dog, zebra]))

    scores = score_youtube_vos(root, results, "held_out", seen_categories=["dog", "zebra"])
    assert [(g.name, g.num_objects) for g in scores.groups] == [("seen", 2)]
    assert not caplog.messages

    scores = score_youtube_vos(root, results, "held_out", seen_categories=["dog", "zebbra"])
    assert [(g.name, g.num_objects) for g in scores.groups] == [("seen", 1), ("unseen", 1)]
    (warning,) = caplog.messages
    assert "meta.json has the category zebbra" in warning

    # Every group counts the same, however many objects it has.
    meta = root / "held_out" / "meta.json"
    plain = meta.read_text()
    objects = json.loads(plain)["videos"]["v"]["objects"]
    others = {i: {**one, "category": "zebra"} for i, one in objects.items()}
    more = {"v": {"objects": objects}, "w": {"objects": others}}
    meta.write_text(json.dumps({"videos": more}))
    for source, name in ((root / "held_out" / "Annotations", "w"), (results, "w")):
        shutil.copytree(source / "v", source / name)
    scores = score_youtube_vos(root, results, "held_out", seen_categories=["dog"])
    assert [g.num_objects for g in scores.groups] == [1, 3]
    assert scores.overall == pytest.approx(np.mean([dog, (dog + 2 * zebra) / 3]))
    meta.write_text(plain)

    # Nothing says which categories were seen.
    scores = score_youtube_vos(root, results, "held_out")
    assert [(g.name, g.num_objects) for g in scores.groups] == [("all", 2)]
    assert scores.overall == pytest.approx(np.mean([dog, zebra]))


def test_seen_categories_of_the_training_set(late_object, write_youtube_vos):
    root, results, _ = late_object
    objects = {"1": {"category": "zebra", "frames": ["00000"]}}
    write_youtube_vos(root, {"t": {"00000": square((1, 0, 0))}}, {"t": objects}, "train")
    scores = score_youtube_vos(root, results, "held_out")
    assert [g.name for g in scores.groups] == ["seen", "unseen"]
    assert scores.groups[0].region == pytest.approx(np.mean(scores.objects[1].region))
    meta = root / "held_out" / "meta.json"
    meta.write_text(meta.read_text().replace('"dog"', "null"))
    scores = score_youtube_vos(root, results, "held_out")
    assert scores.categories == ("", "zebra") and [g.name for g in scores.groups] == ["all"]
    with pytest.raises(ValueError, match="meta.json: an object has no category; expected one"):
        score_youtube_vos(root, results, "held_out", seen_categories=["zebra"])


def test_tables(late_object, tmp_path):
    root, results, _ = late_object
    scores = score_youtube_vos(root, results, "held_out", seen_categories=["dog"])
    paths = report.write_tables(scores, tmp_path, "held_out")
    header, values = paths[0].read_text().splitlines()
    assert header == "Overall,J-Seen,J-Unseen,F-Seen,F-Unseen"
    seen, unseen = scores.groups
    expected = [scores.overall, seen.region, unseen.region, seen.boundary, unseen.boundary]
    assert values.split(",") == [f"{value:.3f}" for value in expected]
    assert len(set(expected[1:])) == 4
    assert paths[1].read_text().splitlines()[2].startswith("v,5,zebra,2,")
    screen = Console(file=io.StringIO(), width=100)
    report.show(scores, "held_out", screen)
    assert "J-Unseen" in screen.file.getvalue() and "Assumed" in screen.file.getvalue()


def test_bad_input(late_object, write_results):
    root, results, _ = late_object
    with pytest.raises(ValueError, match="nobody"):
        score_youtube_vos(root, results, "held_out", videos=["nobody"])
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        score_youtube_vos(root, results, "valid")
    with pytest.raises(ValueError, match=r"\['blobb'\]: no object of .*meta\.json has one"):
        score_youtube_vos(root, results, "held_out", seen_categories=["blobb"])

    write_results(results, {"v": {"00010": square((3, 0, 0))}})
    with pytest.raises(ValueError, match=r"00010\.png.* id 3.*\[2, 5\]"):
        score_youtube_vos(root, results, "held_out")
    (results / "v" / "00010.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 predictions.*00010\.png"):
        score_youtube_vos(root, results, "held_out")
    (root / "held_out" / "Annotations" / "v" / "00015.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 true masks.*00015\.png"):
        score_youtube_vos(root, results, "held_out")


def test_frames_before_the_first_scored_one_are_not_needed(late_object):
    root, results, _ = late_object
    (results / "v" / "00000.png").unlink()
    assert len(score_youtube_vos(root, results, "held_out").objects) == 2
