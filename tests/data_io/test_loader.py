"""The stream of clips: the same for any workers, hosts and starts, and nothing left behind."""

import collections
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.data.loader import Clips, batches
from cfbi_jax.data.synthetic import SyntheticVideos

ROOT = Path(__file__).parents[2]
OPTIONS = ClipOptions(crop_size=33, short_edge=40, max_objects=2, min_object_pixels=20)


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
    """As in a program that was started by absl; Grain's worker processes ask for it."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class Videos:
    """Small videos without disk; every pixel of frame t is 10 t."""

    def __init__(self, prefix, count, empty=False):
        self.prefix, self.count, self.empty = prefix, count, empty

    def __len__(self):
        return self.count

    def video(self, index, rng):
        return Video(f"{self.prefix}-{range(self.count)[index]}", self.empty)


class Video:
    def __init__(self, name, empty):
        self.name, self.empty = name, empty

    def __len__(self):
        return 12

    def frame(self, t):
        return np.full((20, 20, 3), 10 * t, np.uint8)

    def mask(self, t):
        return np.full((20, 20), 0 if self.empty else 1, np.uint8)


def tiny_clips(*sources, seed=0):
    options = ClipOptions(crop_size=17, short_edge=20, min_object_pixels=1)
    return Clips(sources, options, seed)


def synthetic_clips(seed=0):
    videos = SyntheticVideos(seed, num_videos=5, num_frames=8, size=(48, 64), max_objects=2)
    return Clips([(videos, 1)], OPTIONS, seed)


def read(clips, *args, **kwargs):
    with batches(clips, *args, **kwargs) as stream:
        return list(stream)


def assert_batch_is(batch, clips, numbers):
    assert batch["index"].tolist() == list(numbers)
    expected = [clips[i] for i in numbers]
    for name in ("frames", "labels", "num_objects"):
        found = np.stack([getattr(clip, name) for clip in expected])
        np.testing.assert_array_equal(batch[name], found, err_msg=name)
    assert batch["frames"].shape == (len(numbers), 5, 33, 33, 3)
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "frames": "uint8",
        "labels": "uint8",
        "num_objects": "int32",
        "index": "int32",
    }


# ---- The stream ----


@pytest.mark.parametrize("workers, threads", [(0, 0), (0, 3), (1, 1), (2, 2)])
def test_stream_is_the_clips_one_by_one(workers, threads):
    """Over the border of an epoch, and from the middle of the run."""
    clips = synthetic_clips()
    found = read(clips, 3, 1, 5, workers=workers, threads=threads)
    assert len(found) == 4
    for step, batch in enumerate(found, 1):
        assert_batch_is(batch, clips, range(3 * step, 3 * step + 3))
        assert all(type(array) is np.ndarray for array in batch.values())
    assert not multiprocessing.active_children()


def test_clips_differ_by_number_and_seed():
    clips = synthetic_clips()
    pictures = {clips[i].frames.tobytes() for i in range(10)}
    pictures |= {synthetic_clips(seed=1)[i].frames.tobytes() for i in range(10)}
    assert len(pictures) == 20


def test_clips_of_the_same_video_differ_by_seed():
    video = SyntheticVideos(0, num_videos=1, num_frames=8, size=(48, 64), max_objects=2)
    drawn = [[Clips([(video, 1)], OPTIONS, seed)[i].frames for i in range(3)] for seed in (0, 1)]
    assert not any(np.array_equal(*clips) for clips in zip(*drawn, strict=True))


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_every_batch(hosts):
    clips = synthetic_clips()
    parts = [read(clips, 6, 2, 4, shard=(host, hosts)) for host in range(hosts)]
    for step in (2, 3):
        numbers = [batch["index"].tolist() for batch in (part[step - 2] for part in parts)]
        assert [len(own) for own in numbers] == [6 // hosts] * hosts
        assert sorted(sum(numbers, [])) == list(range(6 * step, 6 * step + 6))
        for part, own in zip(parts, numbers, strict=True):
            assert_batch_is(part[step - 2], clips, own)


def test_batch_that_hosts_cannot_share():
    with pytest.raises(ValueError, match="batch_size is 4; expected a multiple of the 3 hosts"):
        read(synthetic_clips(), 4, 0, 1, shard=(0, 3))


def test_few_batches_are_made_ahead():
    """At 465 x 465 a batch of 8 has 35 MB."""

    class Counted(Clips):
        count = 0

        def __getitem__(self, index):
            self.count += 1
            return super().__getitem__(index)

    clips = Counted([(Videos("v", 3), 1)], tiny_clips((Videos("v", 1), 1)).options, 0)
    with batches(clips, 8, 0, 100, threads=1) as stream:
        next(stream)
        deadline = time.monotonic() + 30
        while clips.count < 2 * 8:
            assert time.monotonic() < deadline, "nothing is made ahead"
            time.sleep(0.01)
        time.sleep(0.3)
        assert clips.count <= 4 * 8


# ---- Epochs ----


def test_epoch_has_every_video_as_often_as_its_weight():
    clips = tiny_clips((Videos("davis", 2), 30), (Videos("youtube", 9), 1), (Videos("x", 1), 2))
    assert clips.epoch_length == 2 * 30 + 9 + 2
    expected = {"davis-0": 30, "davis-1": 30, "x-0": 2} | {f"youtube-{i}": 1 for i in range(9)}
    length = clips.epoch_length
    epochs = [[clips[e * length + i].name for i in range(length)] for e in range(3)]
    for epoch in epochs:
        assert collections.Counter(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = tiny_clips((Videos("davis", 2), 30), (Videos("youtube", 9), 1), (Videos("x", 1), 2))
    assert [other[i].name for i in range(length)] == epochs[0]
    other.seed = 1
    assert [other[i].name for i in range(length)] != epochs[0]


def test_a_video_gives_other_clips_every_time():
    clips = tiny_clips((Videos("v", 1), 1))
    assert len({clips[i].frames.tobytes() for i in range(20)}) > 10


def test_sources_that_make_no_epoch():
    with pytest.raises(ValueError, match="weight 0; expected 1 or more"):
        tiny_clips((Videos("v", 1), 1), (Videos("w", 1), 0))
    for sources in ([], [(Videos("v", 0), 1)]):
        with pytest.raises(ValueError, match="no videos to train on"):
            tiny_clips(*sources)


def test_check_objects():
    tiny_clips((Videos("v", 1), 1), (Videos("w", 2), 3)).check_objects(["a", "b"])
    clips = tiny_clips((Videos("v", 1), 5), (Videos("empty", 3, empty=True), 1))
    with pytest.raises(ValueError, match="b: none of 12 clips shows an object of more than"):
        clips.check_objects(["a", "b"])

    class OneOfTwo(Videos):
        def video(self, index, rng):
            return Video("v", empty=index == 0)

    tiny_clips((OneOfTwo("v", 2), 1)).check_objects(["a"])


# ---- Errors and ends ----


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_come_where_the_batch_would(workers):
    class Damaged:  # inside a function, so that it travels to a worker by value
        def __len__(self):
            return 4

        def video(self, index, rng):
            if index == 2:
                raise ValueError("dog/00003.jpg: damaged picture")
            return good.video(index, rng)

    good = SyntheticVideos(0, num_videos=4, num_frames=8, size=(48, 64), max_objects=1)
    clips = Clips([(Damaged(), 1)], OPTIONS, seed=0)
    bad = 0
    while True:
        try:
            clips[bad]
        except ValueError:
            break
        bad += 1
    with batches(clips, 1, 0, 8, workers=workers) as stream:
        assert [next(stream)["index"].item() for _ in range(bad)] == list(range(bad))
        with pytest.raises(ValueError, match=r"dog/00003\.jpg: damaged picture"):
            next(stream)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_told():
    with batches(synthetic_clips(), 1, 0, 1000, workers=1) as stream:
        next(stream)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(ChildProcessError, match="makes clips was killed, .*config.workers"):
            for _ in stream:
                pass


PROGRAM = """
import sys
import time
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.data.loader import Clips, batches
from cfbi_jax.data.synthetic import SyntheticVideos

freed = SharedMemoryArray.close_shm_async

def freed_late(*args):
    time.sleep(0.05)
    freed(*args)

if __name__ == "__main__":
    SharedMemoryArray.close_shm_async = freed_late
    flags.FLAGS.mark_as_parsed()
    videos = SyntheticVideos(0, num_videos=4, num_frames=8, size=(48, 64))
    clips = Clips([(videos, 1)], ClipOptions(crop_size=33, short_edge=40), 0)
    workers, stop = map(int, sys.argv[1:])
    with batches(clips, 2, 0, stop, workers=workers) as stream:
        kept = [next(stream) for _ in range(3)]
    print(len(kept))
"""


@pytest.mark.parametrize("workers, stop", [(0, 100), (2, 100), (2, 3)])
def test_stopping_leaves_nothing_behind(tmp_path, workers, stop):
    """Early, and after the last batch: no shared memory, no traceback at the end of the program,
    which still has its batches."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, str(workers), str(stop)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_workers_leave_signals_to_the_program(tmp_path):
    """A scheduler sends SIGTERM to all processes of a job; the program decides when it ends."""
    program = tmp_path / "program.py"
    signalled = "[next(stream), *map(signal_to, active_children()), next(stream)]"
    program.write_text(
        "import os\nfrom multiprocessing import active_children\n"
        + PROGRAM.replace("[next(stream) for _ in range(3)]", signalled).replace(
            "if __name__",
            "def signal_to(child):\n"
            "    os.kill(child.pid, 15)\n    os.kill(child.pid, 2)\n    return child.pid\n\n"
            "if __name__",
        )
    )
    done = subprocess.run(
        [sys.executable, program, "1", "100"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_workers_end_with_a_program_that_is_killed(tmp_path):
    """Even by SIGKILL, after which it can end nothing itself. They hold the same pipe, whose end
    comes with the last of them."""
    program = tmp_path / "program.py"
    killed = PROGRAM.replace("    print(len(kept))\n", "        os.kill(os.getpid(), 9)\n")
    program.write_text(f"import os\n{killed}")
    done = subprocess.run(
        [sys.executable, program, "2", "100"],
        stdout=subprocess.PIPE,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -9


def test_a_worker_that_starts_after_the_program_was_killed_ends(tmp_path):
    """A worker imports for seconds before it can look whom it works for."""
    program = tmp_path / "program.py"
    program.write_text("""
import multiprocessing, os, time

def work(pipe):
    pipe.send("started")
    time.sleep(1)
    from cfbi_jax.data.loader import _begin_worker
    _begin_worker()
    time.sleep(100)

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=work, args=(theirs,)).start()
    ours.recv()
    os.kill(os.getpid(), 9)
""")
    done = subprocess.run(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -9
