from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cfbi_jax.training import pictures, reports


def test_pace(monkeypatch, caplog):
    """Clips per second and waiting since the last restart; one warning, about more than half, and
    none where the device is steps behind: loading at 0.6 of its time, say."""
    now = 100.0
    monkeypatch.setattr(reports.time, "perf_counter", lambda: now)
    pace = reports.Pace(ConfigDict({"batch_size": 6, "workers": 3}))
    assert pace.metrics(0.0) == {}
    for waited in (0.5, 2.5):  # of 8 seconds
        pace.step(waited)
    now += 8
    assert pace.metrics(0.0) == {"clips_per_second": 6 * 2 / 8, "data_wait": 1.5}
    pace.restart()
    assert pace.metrics(0.0) == {}
    for _ in range(10):
        pace.step(0.6)
    now += 10
    assert pace.metrics(4.0)["data_wait"] == pytest.approx(0.6)
    assert not caplog.messages
    pace.restart()
    for _ in range(2):
        pace.step(3.0)
        now += 4
        assert pace.metrics(1.0)["data_wait"] == 3.0
    (warning,) = caplog.messages
    assert "75 % of the time" in warning and "config.workers than 3" in warning


def test_memory_is_in_mib(monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**20})
    monkeypatch.setattr(reports.jax, "local_devices", lambda: [device])
    usage = SimpleNamespace(ru_maxrss=2048)  # KiB
    monkeypatch.setattr(reports.resource, "getrusage", lambda _: usage)
    assert reports.peak_memory() == {"host_memory_mib": 2.0, "device_memory_mib": 3.0}


def test_a_picture_is_of_the_first_clip(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    clips = {
        "frames": rng.integers(0, 256, (2, 4, 16, 24, 3)).astype(np.uint8),
        "labels": rng.integers(0, 3, (2, 4, 16, 24)).astype(np.uint8),
    }
    predicted = rng.integers(0, 3, (2, 2, 16, 24)).astype(np.uint8)
    drawn, strip = [], pictures.strip
    monkeypatch.setattr(pictures, "strip", lambda *shown: drawn.append(shown) or strip(*shown))
    report = reports.Reports(tmp_path, first_step=0)
    report.picture(7, clips, jnp.asarray(predicted))
    report.close()
    frames, labels = clips["frames"][0], clips["labels"][0]
    for t, shown in zip((2, 3), drawn, strict=True):
        expected = frames[0], labels[0], frames[t - 1], labels[t - 1]
        expected += frames[t], predicted[0, t - 2], labels[t]
        for found, picture in zip(shown, expected, strict=True):
            np.testing.assert_array_equal(found, picture)


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path, monkeypatch, caplog):
    """It ends a run, as an OSError; at the end, with the weights safe, it is only told."""
    metrics = {"loss": np.float32(1), "iou": np.float32(0.5)}

    def full(self, *_):
        raise OSError(28, "No space left on device")

    report = reports.Reports(tmp_path, first_step=0)
    report.log(1, metrics)
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with pytest.raises(OSError, match="No space left"):
        report.log(2, metrics)
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
    report.close()
    (error,) = caplog.messages
    assert "the last metrics are not written" in error and "No space left" in error
