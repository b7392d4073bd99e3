"""A reproducible stream of batches of clips, made by worker processes (Grain).

    clips = Clips([(davis_videos, 30), (youtube_videos, 1)], ClipOptions(), seed=0)
    clips[123]                                      # any clip alone, always the same
    with batches(clips, batch_size=8, start=1000, stop=50_000) as stream:
        for batch in stream: ...                    # from step 1000 on

A clip is determined by the seed and its number, so the position of the stream is the step alone:
nothing else has to be saved, and neither the number of workers nor that of hosts changes a clip.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from typing import TypedDict

import numpy as np
from jaxtyping import Int, UInt8

from cfbi_jax.data.clips import Clip, ClipOptions, ClipSource, sample_clip

PARENT_SECONDS = 1  # how often a worker looks whether its parent lives
OBJECT_TRIES = 64  # clips looked at before saying that none of them shows an object


class ClipBatch(TypedDict):
    """b clips of n frames, as NumPy arrays; see `clips.Clip`. `index` are the clips' numbers."""

    frames: UInt8[np.ndarray, "b n crop crop 3"]
    labels: UInt8[np.ndarray, "b n crop crop"]
    num_objects: Int[np.ndarray, " b"]
    index: Int[np.ndarray, " b"]


class Clips:
    """All clips of a run, by number. An epoch is every video of every source, `weight` times.

    Args:
      sources: (source, weight): how often each of its videos comes in an epoch.
      options: how clips are drawn.
      seed: of every random choice.

    Errors: ValueError for no videos at all, or a weight below 1.
    """

    def __init__(self, sources: Sequence[tuple[ClipSource, int]], options: ClipOptions, seed: int):
        for _, weight in sources:
            if weight < 1:
                raise ValueError(f"a source has weight {weight}; expected 1 or more")
        self.sources = [source for source, _ in sources]
        self.options = options
        self.seed = seed
        self._ends = np.cumsum([len(source) * weight for source, weight in sources])
        if not len(self._ends) or not self._ends[-1]:
            raise ValueError("no videos to train on; expected a source with one at least")

    @property
    def epoch_length(self) -> int:
        """Clips in an epoch."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Clip:
        """Clip `index`, 0 or more. Errors: those of its source's files."""
        epoch, position = divmod(int(index), self.epoch_length)
        item = int(_permutation(self.seed, epoch, self.epoch_length)[position])
        number = int(np.searchsorted(self._ends, item, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        source = self.sources[number]
        rng = np.random.default_rng((self.seed, index))
        return sample_clip(source.video((item - start) % len(source), rng), rng, self.options)

    def check_objects(self, names: Sequence[str]) -> None:
        """Raises ValueError if a source, of those `names`, has clips without objects only."""
        for name, source in zip(names, self.sources, strict=True):
            tried = min(OBJECT_TRIES, 4 * len(source))
            rngs = (np.random.default_rng((self.seed, i)) for i in range(tried))
            clips = (
                sample_clip(source.video(i % len(source), rng), rng, self.options)
                for i, rng in enumerate(rngs)
            )
            if tried and not any(clip.num_objects for clip in clips):
                raise ValueError(
                    f"{name}: none of {tried} clips shows an object of more than "
                    f"{self.options.min_object_pixels} pixels in a reference of more than "
                    f"{self.options.min_reference_pixels}; expected masks with objects (255 is "
                    "nobody's: for DAVIS with masks of 0 and 255 set year=2016)"
                )


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> Int[np.ndarray, " length"]:
    # The third number keeps this apart from the generators of single clips.
    return np.random.default_rng((seed, epoch, 1)).permutation(length)


@contextmanager
def batches(
    clips: Clips,
    batch_size: int,
    start: int,
    stop: int,
    *,
    workers: int = 0,
    threads: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Iterator[ClipBatch]]:
    """The batches of steps `start` (from 0) to `stop`, exclusive, made ahead of their use.

    Args:
      batch_size: over all hosts.
      workers: processes that make batches; 0: threads of this process do.
      threads: in each process.
      shard: (number of this host, number of hosts): every host gets `batch_size / hosts` of a
        batch's clips, another part each.

    Errors: ValueError for a batch that the hosts cannot share; those of `Clips`, and
    ChildProcessError for a worker that was killed, raised where the batch would come.
    """
    import grain  # takes a second to import

    host, hosts = shard
    if batch_size % hosts:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the {hosts} hosts")
    dataset = grain.MapDataset.range(start * batch_size, stop * batch_size)
    dataset = dataset[host::hosts].map(partial(_read, clips)).batch(batch_size // hosts)
    # Counted in batches: each of them is made by one thread.
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    stream = dataset.to_iter_dataset(reading)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(options, worker_init_fn=_begin_worker)
    with closing(_copies(stream)) as iterator:
        yield iterator


def _begin_worker(*_) -> None:
    """A worker leaves signals to the process that it works for, and ends with it.

    Schedulers send SIGTERM to all processes of a job: this one's batches are needed until all hosts
    have agreed on the step that they save.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    program = multiprocessing.parent_process().pid  # it may be gone already
    threading.Thread(target=_end_with, args=(program,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _copies(stream: Iterable[ClipBatch]) -> Iterator[ClipBatch]:
    """The batches out of the workers' shared memory, which Python does not free at its exit."""
    from grain.multiprocessing import SharedMemoryArray

    iterator = iter(stream)
    try:
        # No variable here holds a batch, so that its memory is free long before the exit.
        yield from map(_copy, iterator)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise ChildProcessError(
            "a process that makes clips was killed, perhaps for want of memory; expected room for "
            "config.workers processes with config.threads each"
        ) from error
    finally:
        iterator.close()
        # The workers' last batches are in cycles, which would outlive the workers.
        del iterator
        gc.collect()
        # Grain frees in one thread, which the end of the program would interrupt: when an empty
        # job behind the others is done, they are, too.
        if freeing := getattr(SharedMemoryArray, "_del_thread_pool", None):
            freeing.apply(bool)


def _copy(batch: ClipBatch) -> ClipBatch:
    return {name: np.array(array) for name, array in batch.items()}


def _read(clips: Clips, index: int) -> dict[str, np.ndarray]:
    clip = clips[index]
    return {
        "frames": clip.frames,
        "labels": clip.labels,
        "num_objects": np.int32(clip.num_objects),
        "index": np.int32(index),
    }
