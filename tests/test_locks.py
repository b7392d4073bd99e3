"""One process at a time, where the file system can."""

import errno
import fcntl

from cfbi_jax import locks


def test_one_at_a_time(tmp_path):
    with open(tmp_path / "lock", "a") as first, open(tmp_path / "lock", "a") as second:
        assert locks.take(first) and not locks.take(second)
        first.close()
        assert locks.take(second, wait=True)


def test_everybody_where_there_are_no_locks(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with open(tmp_path / "lock", "a") as first, open(tmp_path / "lock", "a") as second:
        assert locks.take(first) and locks.take(second)
    assert f"{tmp_path / 'lock'}: Function not implemented; start one process" in caplog.text
