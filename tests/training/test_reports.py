import numpy as np
import pytest
from ml_collections import ConfigDict

from cfbi_jax.training import reports


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
