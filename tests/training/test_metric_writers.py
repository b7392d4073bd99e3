"""JSON lines that survive kills, and TensorBoard's files decoded again."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard_events import decoded_events, scalars_and_images

from cfbi_jax.training import metric_writers
from cfbi_jax.training.metric_writers import JsonLinesWriter, TensorBoardWriter, read_metrics

ROOT = Path(__file__).parents[2]


def test_lines_are_json_objects_with_exact_floats(tmp_path):
    writer = JsonLinesWriter(tmp_path / "new" / "metrics.jsonl")
    loss = np.float32(0.1) * np.float32(1.0000001)
    writer.write_scalars(10, {"loss": jnp.asarray(loss), "rate": 1 / 3, "clips": np.int32(7)})
    writer.write_scalars(20, {"loss": np.float32("nan"), "rate": -np.inf, "clips": jnp.ones(1)})
    # Not closed: each line is there at once.
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first == {"step": 10, "loss": float(loss), "rate": 1 / 3, "clips": 7}
    assert np.float32(first["loss"]) == loss and isinstance(first["clips"], int)
    assert second == {"step": 20, "loss": None, "rate": None, "clips": 1.0}
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == [first, second]


@pytest.mark.parametrize("bad", [np.zeros(2), "high", None])
def test_what_is_no_number_is_an_error_and_leaves_no_line(tmp_path, bad):
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="'loss'"):
        writer.write_scalars(1, {"rate": 1.0, "loss": bad})
    with pytest.raises(ValueError, match="step"):
        writer.write_scalars(1, {"step": 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_cut_last_line_is_left_out_and_removed_on_opening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    for cut in (b'{"step": 3, "lo', b'{"step": 3}', b"{"):
        path.write_bytes(whole + cut)
        assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
        writer = JsonLinesWriter(path)
        assert path.read_bytes() == whole
        writer.write_scalars(3, {"loss": 1.0})
        writer.close()
        assert path.read_bytes() == whole + b'{"step": 3, "loss": 1.0}\n'
    path.write_bytes(b'{"step')
    assert read_metrics(path) == []
    JsonLinesWriter(path)
    assert path.read_bytes() == b""


def test_truncation_removes_later_steps_and_writing_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    for step in (10, 20, 30, 40):
        writer.write_scalars(step, {"loss": step / 3})
    before = path.read_bytes().splitlines(keepends=True)
    writer.truncate_after(20)
    assert path.read_bytes() == b"".join(before[:2])
    writer.write_scalars(30, {"loss": 5.0})
    assert [(e["step"], e["loss"]) for e in read_metrics(path)[1:]] == [(20, 20 / 3), (30, 5.0)]
    writer.truncate_after(30)
    assert len(read_metrics(path)) == 3
    writer.truncate_after(0)
    assert path.read_bytes() == b"" and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damaged in (b"\0\0\0", b'{"loss": 1.0}', b"[1]", b'{"step": true}', b'{"step": 1.5}', b""):
        data = b'{"step": 1}\n' + damaged + b'\n{"step": 9}\n'
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: damaged"):
            read_metrics(path)
        with pytest.raises(ValueError, match="line 2"):
            JsonLinesWriter(path).truncate_after(5)
        assert path.read_bytes() == data


def test_a_killed_process_leaves_all_its_lines(tmp_path):
    code = """
import itertools, sys
from cfbi_jax.training.metric_writers import JsonLinesWriter
writer = JsonLinesWriter(sys.argv[1])
for step in itertools.count(1):
    writer.write_scalars(step, {"loss": 1 / step})
    if step % 100 == 0: print(step, flush=True)
"""
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        reported = int(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    JsonLinesWriter(path)
    entries = read_metrics(path)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    assert len(entries) >= reported == 100


def test_tensorboard_values_read_back(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    # Between the steps of 1/255 and outside 0..1.
    grey = np.array([[0.0, 0.5, 1.0], [-1.0, 2.0, 0.1]], np.float32)[..., None]
    writer.write_scalars(3, {"loss": jnp.float32(0.1), "train/iou": np.nan, "clips": 4})
    writer.write_images(4, {"pair": pixels, "one": pixels[:1], "grey": grey})
    writer.write_images(5, {"half": jnp.full((1, 2, 2, 3), 0.5, jnp.bfloat16)})
    writer.write_texts(6, {"note": "größer"})
    writer.write_histograms(7, {"weights": np.arange(8.0)}, {"weights": 4})
    writer.write_hparams({"model": {"rate": 0.5, "name": "r101"}, "scales": (1, 2), "ema": True})
    writer.close()
    found = scalars_and_images(decoded_events(tmp_path))

    assert np.float32(found[3, "loss"].simple_value) == np.float32(0.1)
    assert np.isnan(found[3, "train/iou"].simple_value) and found[3, "clips"].simple_value == 4

    def image(step, tag):
        picture = found[step, tag].image
        array = np.array(Image.open(io.BytesIO(picture.encoded_image_string)))
        assert (picture.height, picture.width) == array.shape[:2]
        assert picture.colorspace == (1 if array.ndim == 2 else 3)
        return array

    np.testing.assert_array_equal(image(4, "pair/0"), pixels[0])
    np.testing.assert_array_equal(image(4, "pair/1"), pixels[1])
    np.testing.assert_array_equal(image(4, "one"), pixels[0])
    np.testing.assert_array_equal(image(4, "grey"), [[0, 128, 255], [0, 255, 26]])
    assert (image(5, "half") == 128).all()
    assert found[6, "note/text_summary"].tensor.string_val[0].decode() == "größer"
    histogram = found[7, "weights"].histo
    assert (histogram.num, histogram.sum, histogram.max) == (8, 28, 7)
    assert list(histogram.bucket) == [0, 2, 2, 2, 2]

    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    content = found[0, "_hparams_/session_start_info"].metadata.plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(hparams) == {"model.rate", "model.name", "scales", "ema"}
    assert hparams["model.rate"].number_value == 0.5 and hparams["ema"].bool_value
    assert hparams["model.name"].string_value == "r101"
    assert hparams["scales"].string_value == "(1, 2)"


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2)), np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 3), int)]
)
def test_images_of_another_kind_are_errors(tmp_path, bad):
    with pytest.raises(ValueError, match="'strips'"):
        TensorBoardWriter(tmp_path).write_images(1, {"strips": bad})


def test_a_resumed_run_repeats_no_line_and_purges_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    with contextlib.closing(metric_writers.create_writer(tmp_path, first_step=1)) as writer:
        for step in (1, 2, 3):
            writer.write_scalars(step, {"loss": 1.0})
            writer.write_images(step, {"strips": np.zeros((1, 2, 2, 3), np.uint8)})
    # At once, within the second that the name of the event file holds.
    with contextlib.closing(metric_writers.create_writer(tmp_path, first_step=3)) as writer:
        for step in (3, 4):
            writer.write_scalars(step, {"loss": 2.0})
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [(e["step"], e["loss"]) for e in entries] == [(1, 1), (2, 1), (3, 2), (4, 2)]

    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2 and all("tfevents" in file.name for file in files)
    events = decoded_events(tmp_path / "tensorboard")
    losses = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss"]
    assert sorted(losses) == [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert sorted(starts) == [1, 3]


def test_errors_of_tensorboard_are_raised(tmp_path, monkeypatch):
    writer = metric_writers.create_writer(tmp_path, first_step=1)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write_scalars(1, {"loss": 1.0})
    monkeypatch.undo()
    # What cannot be written at all is no silent gap either.
    with pytest.raises(NotImplementedError, match="no videos"):
        writer.write_videos(2, {"clip": np.zeros((1, 2, 4, 4, 3))})
    writer.close()


def test_the_writers_have_all_of_clus_interface():
    clu_writers, _ = metric_writers.import_clu()
    needed = clu_writers.MetricWriter.__abstractmethods__
    for kind in (JsonLinesWriter, TensorBoardWriter):
        assert needed <= set(vars(kind)) and issubclass(kind, clu_writers.MetricWriter)


def run_python(code, *arguments, path=()):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="has TensorFlow")
def test_clu_reports_progress_without_tensorflow(tmp_path):
    code = """
import sys
from cfbi_jax.training.metric_writers import TensorBoardWriter, create_writer, import_clu
writers, actions = import_clu()
assert import_clu() == (writers, actions)
assert writers.SummaryWriter is TensorBoardWriter
writer = create_writer(sys.argv[1], first_step=1)
report = actions.ReportProgress(num_train_steps=4, writer=writer, every_steps=2, every_secs=None)
for step in range(1, 5):
    report(step)
writer.close()
default = writers.create_default_writer(sys.argv[1] + "/default")
default.write_scalars(5, {"loss": 0.5})
default.close()
assert "tensorflow" not in sys.modules
"""
    run_python(code, tmp_path)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    rates = [(e["step"], e["steps_per_sec"] > 0) for e in entries if "steps_per_sec" in e]
    assert rates == [(2, True), (4, True)]
    found = scalars_and_images(decoded_events(tmp_path / "tensorboard"))
    assert {(2, "steps_per_sec"), (4, "steps_per_sec")} <= set(found)
    assert scalars_and_images(decoded_events(tmp_path / "default"))[5, "loss"].simple_value == 0.5


def test_steps_aside_where_tensorflow_is_installed(tmp_path):
    """With packages that only look like TensorFlow, clu's own writer is the one imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    plugin = tmp_path / "tensorboard" / "plugins" / "hparams"
    plugin.mkdir(parents=True)
    for folder in (plugin, plugin.parent, plugin.parent.parent):
        (folder / "__init__.py").touch()
    (plugin / "api.py").touch()
    code = """
from cfbi_jax.training.metric_writers import TensorBoardWriter, import_clu
writers, _ = import_clu()
print(writers.SummaryWriter.__module__)
assert issubclass(TensorBoardWriter, writers.MetricWriter)
"""
    assert run_python(code, path=[tmp_path]).strip() == "clu.metric_writers.tf.summary_writer"


def test_what_is_written_is_there_after_a_while(tmp_path, monkeypatch):
    writer = TensorBoardWriter(tmp_path)
    writer.write_scalars(1, {"loss": 0.5})
    assert (1, "loss") not in scalars_and_images(decoded_events(tmp_path))
    monkeypatch.setattr(metric_writers, "_FLUSH_SECONDS", 0.0)
    writer.write_scalars(2, {"loss": 0.25})
    assert {(1, "loss"), (2, "loss")} <= set(scalars_and_images(decoded_events(tmp_path)))
    writer.close()
