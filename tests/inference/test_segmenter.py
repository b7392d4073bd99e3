"""Propagation with a small network: what a user can rely on."""

import gc
import inspect
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from small import mask_of, random_video, small_network

import cfbi_jax
from cfbi_jax.compilation import use_compilation_cache
from cfbi_jax.inference import programs, state
from cfbi_jax.inference import segmenter as segmenters
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.propagation import Prediction, Propagation
from cfbi_jax.inference.state import padded_references, padded_rows
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.models.resizing import interpolation_matrix


def small_segmenter(**options):
    return cfbi_jax.VideoSegmenter(*small_network(), IMAGENET_FORMAT, Options(**options))


@pytest.fixture(scope="module")
def segmenter():
    return small_segmenter()


BOXES = {1: (4, 4, 20, 24), 2: (22, 30, 38, 52)}


def test_streaming_equals_the_whole_video(segmenter):
    frames = random_video(5)
    masks = {0: mask_of({1: BOXES[1]}), 3: mask_of({2: BOXES[2]})}
    whole = list(segmenter.segment(iter(frames), masks))
    streamed = [segmenter.start(frames[0], masks[0])]
    streamed += [segmenter.step(frames[t], mask=masks.get(t)) for t in range(1, 5)]
    np.testing.assert_array_equal(whole, streamed)
    assert whole[1].dtype == np.uint8 and whole[1].shape == (40, 56)
    assert 2 not in whole[2] and 2 in whole[3]
    np.testing.assert_array_equal(whole[3][masks[3] > 0], 2)


def test_two_videos_at_once_do_not_mix(segmenter):
    first, second = random_video(3, seed=1), random_video(3, seed=2)
    mask = {0: mask_of(BOXES)}
    expected = [list(segmenter.segment(v, mask)) for v in (first, second)]
    together = zip(segmenter.segment(first, mask), segmenter.segment(second, mask), strict=True)
    np.testing.assert_array_equal(list(zip(*together, strict=True)), expected)


def test_ids_with_gaps_and_late_smaller_ids(segmenter):
    """Ids are names: the labels are those of dense ids, renamed; rows ascend by id."""
    frames = random_video(4)
    dense = {0: mask_of(BOXES), 2: mask_of({3: (0, 40, 10, 56)})}
    names = np.array([0, 7, 255, 4], np.uint8)  # the late object has the smallest id
    named = {t: names[mask] for t, mask in dense.items()}
    expected = list(segmenter.segment(frames, dense, return_probabilities=True))
    found = list(segmenter.segment(frames, named, return_probabilities=True))
    for t, ((label, rows), (named_label, named_rows)) in enumerate(
        zip(expected, found, strict=True)
    ):
        np.testing.assert_array_equal(named_label, names[label])
        order = [0, 3, 1, 2] if t >= 2 else [0, 1, 2]  # of ids 0, 4, 7, 255
        np.testing.assert_array_equal(named_rows, rows[order])


def test_probabilities(segmenter):
    frames = random_video(3)
    masks = {0: mask_of({5: BOXES[1]}), 2: mask_of({9: BOXES[2]})}
    for t, (label, rows) in enumerate(segmenter.segment(frames, masks, return_probabilities=True)):
        ids = np.array([0, 5, 9] if t == 2 else [0, 5])
        assert rows.shape == (len(ids), 40, 56)
        np.testing.assert_allclose(rows.sum(axis=0), 1, atol=1e-5)
        np.testing.assert_array_equal(ids[rows.argmax(axis=0)], label)


def test_corrections_override_and_are_remembered(segmenter):
    frames = random_video(4)
    correction = np.zeros((40, 56), np.uint8)
    correction[:8] = 1
    plain = list(segmenter.segment(frames, {0: mask_of(BOXES)}))
    corrected = list(segmenter.segment(frames, {0: mask_of(BOXES), 1: correction}))
    np.testing.assert_array_equal(corrected[1], np.where(correction > 0, 1, plain[1]))
    assert (corrected[2] != plain[2]).any()


def test_single_frame_and_first_mask_later(segmenter):
    frames = random_video(4)
    mask = mask_of(BOXES)
    np.testing.assert_array_equal(list(segmenter.segment(frames[:1], {0: mask})), [mask])
    late = list(segmenter.segment(frames, {2: mask}))
    np.testing.assert_array_equal(late[:2], 0)
    expected = list(segmenter.segment(frames[2:], {0: mask}))
    np.testing.assert_array_equal(late[2:], expected)


def test_empty_first_mask_is_a_reference_of_background(segmenter):
    frames = random_video(4)
    empty = np.zeros((40, 56), np.uint8)
    found = list(segmenter.segment(frames, {0: empty, 2: mask_of(BOXES)}, True))
    np.testing.assert_array_equal(found[1][0], 0)
    np.testing.assert_array_equal(found[1][1], np.ones((1, 40, 56)))
    np.testing.assert_array_equal(found[2][0], mask_of(BOXES))
    without = list(segmenter.segment(frames, {2: mask_of(BOXES)}, True))
    assert np.abs(found[3][1] - without[3][1]).max() > 1e-6  # frame 0 counts as a reference


def test_before_there_is_an_object_nothing_is_predicted():
    segmenter = small_segmenter()
    masks = {0: np.zeros((40, 56), np.uint8), 2: mask_of(BOXES)}
    found = list(segmenter.segment(random_video(3), masks))
    np.testing.assert_array_equal(found, [masks[0], masks[0], masks[2]])
    assert segmenter.programs.num_compilations == 1  # embedding


def test_padding_to_max_objects_changes_nothing():
    frames, masks = random_video(3), {0: mask_of(BOXES)}
    expected = list(small_segmenter().segment(frames, masks, True))
    for max_objects in (2, 6):
        found = list(small_segmenter(max_objects=max_objects).segment(frames, masks, True))
        for (label, rows), (padded_label, padded) in zip(expected, found, strict=True):
            np.testing.assert_allclose(padded, rows, atol=1e-4)
            clear = np.sort(rows, axis=0)[-1] - np.sort(rows, axis=0)[-2] > 1e-3
            np.testing.assert_array_equal(padded_label[clear], label[clear])


def test_flip_makes_the_result_mirror_symmetric():
    segmenter = small_segmenter(flip=True)
    frames, mask = random_video(3, (41, 49)), mask_of({1: (5, 5, 30, 20)}, (41, 49))
    size = (40, 48)
    frames, mask = frames[:, : size[0], : size[1]], mask[: size[0], : size[1]]
    straight = list(segmenter.segment(np.ascontiguousarray(frames), {0: mask}, True))
    mirrored = list(segmenter.segment(frames[:, :, ::-1].copy(), {0: mask[:, ::-1].copy()}, True))
    for (_, rows), (_, mirrored_rows) in zip(straight[:2], mirrored[:2], strict=True):
        np.testing.assert_allclose(mirrored_rows[..., ::-1], rows, atol=1e-4)


def test_one_compilation_per_size_objects_and_references():
    segmenter = small_segmenter()
    masks = {0: mask_of(BOXES)}
    list(segmenter.segment(random_video(5), masks))
    assert segmenter.programs.num_compilations == 2  # embedding, prediction
    list(segmenter.segment(random_video(3, seed=4), masks))
    assert segmenter.programs.num_compilations == 2
    list(segmenter.segment(random_video(3), {0: mask_of({3: BOXES[1]})}))  # one object
    assert segmenter.programs.num_compilations == 3
    list(segmenter.segment(random_video(3), {0: mask_of(BOXES), 1: mask_of(BOXES)}))
    assert segmenter.programs.num_compilations == 4  # two references
    list(segmenter.segment(random_video(3, (24, 32)), {0: mask_of({1: BOXES[1]}, (24, 32))}))
    assert segmenter.programs.num_compilations == 6


def test_programs_of_many_sizes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(programs, "MAX_VIEWS", 4)
    segmenter = small_segmenter(flip=True)  # two views in each program
    state.forget_programs()  # of other tests
    labels = []
    for size in ((40, 56), (48, 56), (40, 56)):
        video = random_video(2, size)
        labels.append(list(segmenter.segment(video, {0: mask_of({1: BOXES[1]}, size)})))
        assert segmenter.programs.embed._cache_size() == 1
        assert segmenter.programs.predict._cache_size() == 1
        assert state._small_label._cache_size() == 2
        assert interpolation_matrix.cache_info().currsize <= 12  # those of one size
    assert segmenter.programs.num_compilations == 6
    np.testing.assert_array_equal(labels[2], labels[0])


def test_the_second_predicted_frame_compiles_nothing():
    """Not even what the persistent cache would answer: the program of the first is used."""
    model, variables = small_network()
    loaded = jax.device_put(variables, jax.devices()[0])  # as a checkpoint's are
    segmenter = cfbi_jax.VideoSegmenter(model, loaded, IMAGENET_FORMAT)
    frames = random_video(4)
    segmenter.start(frames[0], mask_of(BOXES))
    segmenter.step(frames[1])
    compiled = []

    def listen(event, seconds, **_):
        if "compile" in event:
            compiled.append((event, seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        segmenter.step(frames[2])
        segmenter.step(frames[3])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_padded_sizes():
    assert [padded_rows(n) for n in (1, 2, 8, 9, 12, 13, 254)] == [2, 3, 9, 13, 13, 17, 255]
    assert [padded_references(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 3, 4, 8, 8, 12]


def test_many_references(segmenter):
    """More than the padded steps of 1, 2, 3, 4, 8; every one is used."""
    frames = random_video(8)
    masks = {t: mask_of({1: (4 * t, 4, 4 * t + 8, 24)}) for t in range(6)}
    found = list(segmenter.segment(frames, masks, True))
    masks[5] = mask_of({1: (0, 0, 40, 50)})
    other = list(segmenter.segment(frames, masks, True))
    np.testing.assert_array_equal(found[4][0], other[4][0])
    assert np.abs(found[7][1] - other[7][1]).max() > 1e-6


def test_decoding_is_ahead_of_the_consumer(segmenter):
    taken = []

    def frames():
        for t, frame in enumerate(random_video(8)):
            taken.append(t)
            yield frame

    labels = segmenter.segment(frames(), {0: mask_of(BOXES)})
    next(labels)
    assert 2 <= len(taken) <= 6  # some ahead, and not the whole video
    labels.close()


@pytest.mark.parametrize("slow", ["reader", "consumer"])
def test_times_are_of_the_computation_alone(segmenter, slow):
    masks, times = {0: mask_of(BOXES)}, []
    list(segmenter.segment(random_video(2), masks))  # compile

    def frames():
        for frame in random_video(5):
            time.sleep(0.4 if slow == "reader" else 0)
            yield frame

    for _ in segmenter.segment(frames(), masks, times=times):
        time.sleep(0.4 if slow == "consumer" else 0)
    assert len(times) == 5
    assert 0 < sum(times) < 5 * 0.2


def test_times_have_the_hosts_work_in_them(segmenter, monkeypatch):
    advance, times = Propagation.advance, []

    def slow(self, frame, mask):
        time.sleep(0.1)
        return advance(self, frame, mask)

    monkeypatch.setattr(Propagation, "advance", slow)
    start = time.perf_counter()
    list(segmenter.segment(random_video(5), {0: mask_of(BOXES)}, times=times))
    assert 5 * 0.1 < sum(times) < time.perf_counter() - start


def test_options_from_checkpoint(tmp_path):
    model, variables = small_network()
    trained = model.clone(global_atrous_rate=3, local_atrous_rate=3)
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", trained, variables, IMAGENET_FORMAT)
    before = jax.config.jax_compilation_cache_dir
    try:
        segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(
            tmp_path / "ckpt",
            compilation_cache=str(tmp_path / "cache"),
            scales=[1.0, 1.5],
            global_atrous_rate=2,
            compute_dtype="bfloat16",
        )
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    finally:
        use_compilation_cache(before)
    assert segmenter.options.scales == (1.0, 1.5)
    model = segmenter.programs.model  # the rate that is not given is the one in training
    assert (model.global_atrous_rate, model.local_atrous_rate) == (2, 3)
    labels = list(segmenter.segment(random_video(2), {0: mask_of(BOXES)}))
    assert labels[1].shape == (40, 56)
    assert Options(scales=1.15) == Options(scales=[1.15])
    with pytest.raises(TypeError, match="scale"):
        cfbi_jax.VideoSegmenter.from_checkpoint(tmp_path / "ckpt", scale=2)


# ------------------------------------------------------------------------------------ bad input


def test_bad_masks_are_refused_before_the_first_frame(segmenter):
    frames = random_video(2)

    def consume(masks, **options):
        chosen = small_segmenter(**options) if options else segmenter
        list(chosen.segment((pytest.fail("a frame was read") for _ in frames), masks))

    with pytest.raises(ValueError, match="no mask holds an object"):
        consume({0: np.zeros((40, 56), np.uint8)})
    with pytest.raises(ValueError, match=r"mask of frame 0: shape \(40, 56, 3\)"):
        consume({0: np.zeros((40, 56, 3), np.uint8)})
    with pytest.raises(ValueError, match="mask of frame 0: ids from 0 to 300"):
        consume({0: mask_of(BOXES).astype(int) * 150})
    with pytest.raises(ValueError, match="2 objects, and max_objects is 1: no row is left"):
        consume({0: mask_of({1: BOXES[1]}), 1: mask_of({4: BOXES[2]})}, max_objects=1)
    with pytest.raises(ValueError, match=r"frames \[-1, 0\]; the first frame is 0"):
        consume({0: mask_of(BOXES), -1: mask_of(BOXES)})
    with pytest.raises(ValueError, match="masks of one video have different sizes"):
        consume({0: mask_of(BOXES), 5: mask_of({1: (0, 0, 8, 8)}, (16, 16))})
    with pytest.raises(ValueError, match="masks for 2 frames, and max_references is 1"):
        consume({0: mask_of(BOXES), 1: mask_of(BOXES)}, max_references=1)


def test_bad_frames(segmenter):
    mask = {0: mask_of(BOXES)}
    with pytest.raises(ValueError, match="mask of frame 0 has 40 x 56 pixels; expected 32 x 40"):
        list(segmenter.segment(random_video(2, (32, 40)), mask))
    labels = segmenter.segment(random_video(4), {2: mask_of({1: (0, 0, 8, 8)}, (16, 16))})
    with pytest.raises(ValueError, match="mask of frame 2 has 16 x 16 pixels; expected 40 x 56"):
        next(labels)  # not at frame 2
    unchecked = inspect.unwrap(cfbi_jax.VideoSegmenter.segment)  # as outside the tests
    with pytest.raises(TypeError, match="expected {index of the frame: mask}"):
        unchecked(segmenter, random_video(2), mask[0])
    with pytest.raises(TypeError, match="'video.mp4'; expected arrays, such as read_frames gives"):
        unchecked(segmenter, "video.mp4", mask)
    mixed = [*random_video(2), *random_video(1, (32, 40))]
    found = []
    with pytest.raises(ValueError, match="frame 2 has 32 x 40 pixels; expected 40 x 56"):
        found.extend(segmenter.segment(mixed, mask))
    assert len(found) == 2  # nothing that was computed is lost

    def unplugged():
        yield from random_video(3)
        raise RuntimeError("no camera")

    found = []
    with pytest.raises(RuntimeError, match="no camera"):
        found.extend(segmenter.segment(unplugged(), mask))
    assert len(found) == 3
    with pytest.raises(ValueError, match=r"frame 0 is float64 \(40, 56, 3\); expected uint8"):
        list(segmenter.segment(random_video(1) / 255.0, mask))
    with pytest.raises(ValueError, match="4 channels"):
        list(segmenter.segment([np.zeros((40, 56, 4), np.uint8)], mask))
    with pytest.raises(ValueError, match=r"masks were given for frames \[7\], the video has 2"):
        segmenter.segment(random_video(2), {**mask, 7: mask_of(BOXES)})  # the length is known
    labels = segmenter.segment(iter(random_video(2)), {**mask, 7: mask_of(BOXES)})
    assert next(labels).shape == next(labels).shape == (40, 56)
    with pytest.raises(ValueError, match=r"masks were given for frames \[7\], the video has 2"):
        next(labels)


def test_bad_streams():
    segmenter = small_segmenter(max_references=2, max_objects=2)
    frames = random_video(4)
    with pytest.raises(ValueError, match="step was called before start"):
        segmenter.step(frames[0])
    segmenter.start(frames[0], mask_of(BOXES))
    with pytest.raises(ValueError, match="3 objects, and max_objects is 2"):
        segmenter.step(frames[1], mask=mask_of({3: BOXES[1]}))
    segmenter.step(frames[1], mask=mask_of(BOXES))
    with pytest.raises(ValueError, match="masks for 3 frames, and max_references is 2"):
        segmenter.step(frames[2], mask=mask_of(BOXES))
    with pytest.raises(ValueError, match="mask of frame 0 has 8 x 8 pixels"):
        segmenter.start(frames[0], np.ones((8, 8), np.uint8))
    label = segmenter.step(frames[2])  # what was refused leaves the video as it was
    assert label.shape == (40, 56)
    assert label.any()


def test_a_label_that_does_not_come_is_not_replaced_by_the_next(monkeypatch):
    fetch = Prediction.fetch
    calls = []

    def fails_once(self):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        return fetch(self)

    frames, found = random_video(4), []
    monkeypatch.setattr(Prediction, "fetch", fails_once)
    with pytest.raises(MemoryError):
        found.extend(small_segmenter().segment(frames, {0: mask_of(BOXES)}))
    assert len(found) == 1 and len(calls) == 2


@pytest.mark.parametrize("fails", ["embed", "predict", "fetch"])
def test_a_step_that_failed_can_be_tried_again(monkeypatch, fails):
    """With a new object: it must not count as known, as its mask was not taken in. Ctrl-C comes
    anywhere."""
    segmenter = small_segmenter()
    frames, first, second = random_video(3), mask_of({1: BOXES[1]}), mask_of({2: BOXES[2]})
    segmenter.start(frames[0], first)
    expected = [segmenter.step(frames[1], mask=second), segmenter.step(frames[2])]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    segmenter.start(frames[0], first)
    with monkeypatch.context() as patch:
        patch.setattr(Prediction if fails == "fetch" else segmenter.programs, fails, interrupted)
        with pytest.raises(KeyboardInterrupt):
            segmenter.step(frames[1], mask=second)
    found = [segmenter.step(frames[1], mask=second), segmenter.step(frames[2])]
    np.testing.assert_array_equal(found, expected)


def test_more_objects_than_a_label_map_can_tell_apart(segmenter):
    ids = np.arange(40 * 56, dtype=np.uint8).reshape(40, 56)
    masks = {i: np.where(ids // 32 == i, ids, 0).astype(np.uint8) for i in range(8)}
    with pytest.raises(ValueError, match="255 objects; expected at most 254"):
        small_segmenter()._check_masks(masks)


@pytest.mark.parametrize("counts", [(0, 1), (1, 0)])
def test_plan_of_nothing(segmenter, counts):
    with pytest.raises(ValueError, match="is 0; expected 1 or more"):
        segmenter.plan((40, 56), *counts)


def test_one_array_for_all_frames_and_a_mask_that_changes(segmenter):
    frames, mask = random_video(5), mask_of(BOXES)
    expected = list(segmenter.segment(frames, {0: mask}))

    def camera():
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer

    labels = segmenter.segment(camera(), {0: mask})
    mask[:] = 0
    for label, same in zip(labels, expected, strict=True):
        np.testing.assert_array_equal(label, same)


def test_arrays_that_look_anti_aliased_are_only_told(segmenter, caplog):
    """Files are refused; an array's ids are ids, clicks of one pixel, say."""
    clicks = np.zeros((40, 56), np.uint8)
    clicks[4::8, 4::16] = np.arange(1, 21).reshape(5, 4)
    (label,) = segmenter.segment(random_video(1), {0: clicks})
    np.testing.assert_array_equal(label, clicks)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "mask of frame 0: 20 ids, 20 of them only in edges" in warning.getMessage()


class Bar:
    """A progress bar around a generator: its length is not known."""

    def __init__(self, frames):
        self.frames, self.closed = iter(frames), False

    def __len__(self):
        return None

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.frames)

    def close(self):
        self.closed = True


def test_frames_in_a_progress_bar_and_a_camera_that_stays_open(segmenter):
    frames, mask = random_video(3), {0: mask_of(BOXES)}
    camera = Bar(frames)
    found = list(segmenter.segment(camera, mask))
    np.testing.assert_array_equal(found, list(segmenter.segment(frames, mask)))
    assert not camera.closed
    with pytest.raises(ValueError, match=r"masks were given for frames \[3\]"):
        list(segmenter.segment(Bar(frames), mask | {3: mask[0]}))


def test_a_source_that_waits_does_not_hold_up_who_stops(segmenter, monkeypatch):
    monkeypatch.setattr(segmenters, "PATIENCE", 0.1)
    more = threading.Event()

    def stream():
        yield from random_video(5)
        more.wait(60)

    labels = segmenter.segment(stream(), {0: mask_of(BOXES)})
    for _ in range(3):
        next(labels)
    began = time.monotonic()
    labels.close()
    assert time.monotonic() - began < 30
    more.set()


def test_weights_are_freed_with_the_segmenter():
    """At once, not when Python next looks for cycles: a GPU may not hold two networks."""
    segmenter = small_segmenter()
    list(segmenter.segment(random_video(2), {0: mask_of(BOXES)}))
    segmenter.start(random_video(1)[0], mask_of(BOXES))
    kernel = weakref.ref(segmenter.programs.variables["params"]["ensembler"]["conv1"]["kernel"])
    gc.collect()
    gc.disable()
    try:
        del segmenter
        assert kernel() is None
    finally:
        gc.enable()


INSIDE = """
import sys
import jax, numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_transfer_guard", "disallow")
jax.set_mesh(jax.make_mesh((3,), ("x",)))

import cfbi_jax

from cfbi_jax import compilation
from cfbi_jax.models import matching_global

blocks_here, traced_for = matching_global.blocks_here, set()
def asked(*arguments):
    traced_for.add(compilation.default_device())
    return blocks_here(*arguments)
matching_global.blocks_here = asked

with jax.default_device(jax.devices()[2]):
    segmenter = cfbi_jax.VideoSegmenter.from_checkpoint(sys.argv[1])
kinds = {str(x.dtype) for x in jax.tree.leaves(segmenter.programs.variables)}
places = set().union(*(x.devices() for x in jax.tree.leaves(segmenter.programs.variables)))
assert kinds == {"float32"} and places == {jax.devices()[2]}, (kinds, places)
given = np.load(sys.argv[2])
segmenter.plan((40, 56), 2)
found = list(segmenter.segment(given["frames"], {0: given["mask"], 2: given["mask"]}))
np.testing.assert_array_equal(found, given["expected"])
assert traced_for == {jax.devices()[2]}, traced_for
assert jax.config.jax_enable_x64
"""


def test_settings_of_the_program_around_it_change_nothing(segmenter, tmp_path):
    """64 bits, strict promotions, no implicit transfers, a mesh, another device."""
    cfbi_jax.save_checkpoint(tmp_path / "ckpt", *small_network(), IMAGENET_FORMAT)
    frames, mask = random_video(4), mask_of(BOXES)
    expected = list(segmenter.segment(frames, {0: mask, 2: mask}))
    np.savez(tmp_path / "video.npz", frames=frames, mask=mask, expected=expected)
    command = [sys.executable, "-c", INSIDE, tmp_path / "ckpt", tmp_path / "video.npz"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_frames_may_be_written_over(monkeypatch):
    """As a camera's buffer is: JAX may read the array that it was given later."""
    segmenter = small_segmenter()
    embed, seen = segmenter.programs.embed, []

    def embed_and_look(variables, frame, views):
        seen.append(frame)
        return embed(variables, frame, views=views)

    monkeypatch.setattr(segmenter.programs, "embed", embed_and_look)
    frames = random_video(2)
    segmenter.start(frames[0], mask_of({1: (4, 4, 20, 20)}))
    segmenter.step(frames[1])
    for frame, given in zip(frames, seen, strict=True):
        np.testing.assert_array_equal(given, frame)
        assert not np.shares_memory(given, frame)
