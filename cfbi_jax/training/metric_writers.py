"""Where a run's numbers go: files of JSON lines, and TensorBoard, without TensorFlow.

    metric_writers, periodic_actions = import_clu()
    with contextlib.closing(create_writer(workdir, first_step=1)) as writer:
        writer.write_scalars(10, {"loss": loss, "learning_rate": rate})

OUT/metrics.jsonl then holds `{"step": 10, "loss": 0.69, "learning_rate": 0.01}`, one such object
per call of `write_scalars`.
"""

import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfbi_jax.files import BadFile, write_file

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_EVALUATIONS = "tensorboard/evaluations"

_CLU_SUMMARY_WRITER = "clu.metric_writers.summary_writer"
_FLUSH_SECONDS = 30.0
_DEFAULT_BUCKETS = 30
_file_numbers = itertools.count()


def import_clu() -> tuple[types.ModuleType, types.ModuleType]:
    """clu's `metric_writers` and `periodic_actions`, which import TensorFlow if left to themselves.

    Where TensorFlow is not installed, `TensorBoardWriter` takes the place of clu's `SummaryWriter`;
    nothing may have imported `clu.metric_writers` before. Where it is installed, clu is left alone.
    """
    if _CLU_SUMMARY_WRITER not in sys.modules and importlib.util.find_spec("tensorflow") is None:
        stand_in = types.ModuleType(_CLU_SUMMARY_WRITER, "Writes TensorBoard's files.")
        stand_in.SummaryWriter = TensorBoardWriter
        sys.modules[_CLU_SUMMARY_WRITER] = stand_in
    metric_writers = importlib.import_module("clu.metric_writers")
    # Not base classes: those would have to be imported before the stand-in can be defined.
    metric_writers.MetricWriter.register(TensorBoardWriter)
    metric_writers.MetricWriter.register(JsonLinesWriter)
    return metric_writers, importlib.import_module("clu.periodic_actions")


def create_writer(
    workdir: Path | str, first_step: int, lines: str = METRICS_FILE, board: str = TENSORBOARD_FOLDER
) -> Any:
    """A clu MetricWriter to JSON lines and to TensorBoard: a file and a folder of `workdir`.

    `first_step` is the first step that this run will write: what an earlier run wrote for it and
    for later steps is removed from the JSON lines and hidden in TensorBoard. The lines are written
    at once, TensorBoard's file now and then and by `flush`.
    """
    metric_writers, _ = import_clu()
    line_writer = JsonLinesWriter(Path(workdir) / lines)
    line_writer.truncate_after(first_step - 1)
    board_writer = TensorBoardWriter(Path(workdir) / board, purge_step=first_step)
    return metric_writers.MultiWriter([line_writer, board_writer])


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; NaN and infinities are None.

    A last line without its end is being written or was when the run was killed: it is left out.
    Errors: FileNotFoundError; ValueError, naming the line, for one that is no object with a step.
    """
    return [entry for entry, _ in _read_lines(Path(path))]


def _read_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Each complete line, decoded and as it is."""
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    lines = complete.split(b"\n") if complete else []
    return [(_decode_line(line, f"{path}, line {i}"), line) for i, line in enumerate(lines, 1)]


def _decode_line(line: bytes, name: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{name}: damaged ({error}); expected a JSON object") from error
    # bool is an int to Python.
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise BadFile(f'{name}: damaged; expected a JSON object with an integer "step"')
    return entry


class JsonLinesWriter:
    """A clu MetricWriter that appends one JSON object per call of `write_scalars` to a file.

    Floats are written in full, a float32 as the float64 of equal value; NaN and infinities, which
    JSON does not know, as null. Each line is handed to the system at once: a killed process loses
    at most the line being written, and the next writer cuts off the part of it that was. Anything
    but scalars is left to other writers.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")  # noqa: SIM115
        data = self._path.read_bytes()
        self._file.truncate(data.rfind(b"\n") + 1)

    def truncate_after(self, step: int) -> None:
        """Removes the lines of steps after `step`; the file is replaced as a whole.

        Errors: ValueError for a damaged line, named; the file stays as it is.
        """
        lines = _read_lines(self._path)
        kept = [line + b"\n" for entry, line in lines if entry["step"] <= step]
        if len(kept) < len(lines):
            self._file.close()
            write_file(self._path, b"".join(kept))
            self._file = open(self._path, "ab")  # noqa: SIM115

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends a line. Errors: ValueError for a metric that is no number or named "step"."""
        if "step" in scalars:
            raise ValueError('a metric named "step"; that name is taken by the step itself')
        entry = {"step": step} | {name: _number(name, value) for name, value in scalars.items()}
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Does nothing."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Does nothing."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Does nothing."""

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing: every line is flushed when it is written."""

    def close(self) -> None:
        self._file.close()


def _number(name: str, value: Any) -> int | float | None:
    array = np.asarray(value)
    item = array.item() if array.size == 1 else value
    if not isinstance(item, (bool, int, float)):
        raise ValueError(f"metric {name!r} is {value!r}; expected one number")
    return item if math.isfinite(item) else None


class TensorBoardWriter:
    """A clu MetricWriter of TensorBoard's event files that needs no TensorFlow.

    Events of `purge_step` and later in older files of the folder are hidden by TensorBoard.
    Written in the calling thread, so that errors are raised: tensorboardX's own writer loses them
    in a thread, and then blocks; clu's AsyncWriter makes them another kind of error, later.
    """

    def __init__(self, logdir: Path | str, purge_step: int | None = None):
        # Slow to import: brings torch, where that is installed.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._summary = summary
        self._event = event_pb2.Event
        Path(logdir).mkdir(parents=True, exist_ok=True)
        # The name holds the time in seconds: two writers within one would share a file.
        suffix = f".{os.getpid()}.{next(_file_numbers)}"
        self._file = event_file_writer.EventsWriter(str(Path(logdir) / "events"), suffix)
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write_event(purge_step, session_log=start)
        self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            # tensorboardX logs a warning per NaN if it gets an array.
            self._write(step, self._summary.scalar(name, np.asarray(value).item()))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images [n, h, w, c] or [h, w, c], uint8 or float of 0 to 1; c is 1 or 3."""
        for name, value in images.items():
            pixels = _to_uint8(name, np.asarray(value))
            for i, image in enumerate(pixels):
                tag = name if len(pixels) == 1 else f"{name}/{i}"
                self._write(step, self._image_summary(tag, image))

    def _image_summary(self, tag: str, image: UInt8[np.ndarray, "h w c"]) -> Any:
        height, width, channels = image.shape
        encoded = io.BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(encoded, format="PNG")
        picture = self._summary.Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=encoded.getvalue(),
        )
        value = self._summary.Summary.Value(tag=tag, image=picture)
        return self._summary.Summary(value=[value])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._write(step, self._summary.text(name, text))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for name, value in arrays.items():
            buckets = (num_buckets or {}).get(name) or _DEFAULT_BUCKETS
            values = np.asarray(value).astype(np.float64)
            self._write(step, self._summary.histogram(name, values, buckets))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hyper parameters, nested or flat; what is no number, bool or string is shown by repr."""
        flat = {
            name: value if isinstance(value, (bool, int, float, str)) else repr(value)
            for name, value in _flatten(hparams)
        }
        experiment, start, _ = self._summary.hparams(flat, {})
        self._write(0, experiment)
        self._write(0, start)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        raise NotImplementedError("TensorBoardWriter writes no audio")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        raise NotImplementedError("TensorBoardWriter writes no videos; write frames as images")

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        raise NotImplementedError("TensorBoardWriter writes no raw tensors; use histograms")

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, summary: Any) -> None:
        self._write_event(step, summary=summary)
        # A flush waits for the disk; someone who watches a run can wait a little, too.
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))


def _to_uint8(name: str, images: np.ndarray) -> UInt8[np.ndarray, "n h w c"]:
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"image {name!r} of shape {images.shape}; expected [n, h, w, 1 or 3]")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "biu":
        raise ValueError(f"image {name!r} of type {images.dtype}; expected uint8 or float")
    # Through float32, as NumPy does not count bfloat16 among the floats.
    scaled = np.nan_to_num(images.astype(np.float32).clip(0, 1)) * 255
    return np.rint(scaled).astype(np.uint8)


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in nested.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs
