"""Memory: chunks change nothing but rounding, plans say what programs need, errors what helps."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mask_of, random_variables, random_video, small_network
from tiny import tiny_model, tiny_parts

import cfbi_jax
from cfbi_jax import memory
from cfbi_jax.inference import propagation, test_time
from cfbi_jax.inference.options import Options
from cfbi_jax.inference.test_time import View
from cfbi_jax.memory import Chunks, MemoryPlan, choose_chunks, tree_bytes
from cfbi_jax.models.cfbi import CFBI, rows_in_groups
from cfbi_jax.models.images import IMAGENET_FORMAT

FOUR_OBJECTS = mask_of(
    {1: (0, 0, 20, 20), 2: (0, 30, 20, 50), 3: (22, 2, 40, 20), 4: (25, 30, 36, 50)}
)


def small_segmenter(**options):
    return cfbi_jax.VideoSegmenter(*small_network(), IMAGENET_FORMAT, Options(**options))


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 6])
def test_rows_in_groups_are_all_rows(rows_at_once):
    """With a last group that is full, and one that is not; batches of two videos."""
    with tiny_parts():
        model = tiny_model()
        rng = np.random.default_rng(0)
        features = jnp.asarray(rng.random((3, 2, 7, 9, model.embedding_dim)), jnp.float32)
        low_level = jnp.asarray(rng.random((2, 7, 9, 12)), jnp.float32)
        labels = jnp.asarray(rng.integers(0, 4, (2, 2, 7, 9)), jnp.uint8)

        @jax.jit
        def segment(variables, packing):
            return model.apply(
                variables,
                features[0][:, None],
                labels[0][:, None],
                jnp.ones(2, jnp.int32),
                features[1],
                labels[1],
                features[2],
                low_level,
                jnp.array([3, 2]),
                4,
                packing,
                method=CFBI.segment,
            )

        variables = jax.tree.map(jnp.asarray, random_variables(model, seed=0))
        found = segment(variables, rows_in_groups(2, 4, rows_at_once))
        expected = segment(variables, None)
    assert np.ptp(expected) > 0.1
    valid = np.arange(4)[None] <= np.array([3, 2])[:, None]
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-5)


def test_lines_in_groups_are_all_lines():
    rng = np.random.default_rng(0)
    views = (View((33, 49), False), View((33, 49), True), View((49, 65), False))
    logits = [
        jnp.asarray(rng.normal(size=(5, -(-view.size[0] // 4), -(-view.size[1] // 4))), jnp.float32)
        for view in views
    ]
    size, count = (37, 51), jnp.int32(3)  # the fifth row is padding
    mean = np.asarray(test_time.mean_probabilities(logits, views, size, count))
    np.testing.assert_allclose(mean.sum(axis=0), 1, atol=1e-6)
    assert (mean[4] == 0).all() and len(np.unique(mean.argmax(axis=0))) == 4
    ordered = np.sort(mean, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    for lines in (1, 8, 37):
        found = np.asarray(test_time.most_likely_rows(logits, views, size, count, lines))
        assert found.dtype == np.uint8 and found.shape == size
        np.testing.assert_array_equal(found[clear], mean.argmax(axis=0)[clear])


def test_chunks_are_chosen_for_the_references_that_there_are(monkeypatch):
    segmenter = small_segmenter()
    budget, counts = segmenter.programs.budget, []
    choose = budget.chunks

    def chunks(*arguments):
        counts.append(arguments[-1])
        return choose(*arguments)

    monkeypatch.setattr(budget, "chunks", chunks)
    frames = random_video(5, (40, 56))
    masks = {i: np.asarray(FOUR_OBJECTS) for i in (0, 1, 2)}
    list(segmenter.segment(frames, masks))
    assert counts == [1, 2, 3, 3]


def test_choice_of_chunks():
    """Equal parts, as large as fit; never nothing."""
    row = memory.row_bytes(head_channels=10, pixels=100)
    small = dict(row=row, num_rows=6, size=(48, 64))
    assert choose_chunks(2**30, **small) == Chunks(None, None)
    assert choose_chunks(int(4.5 * row), **small).rows_at_once == 3  # 4 fit: two groups of 3
    assert choose_chunks(int(2.5 * row), **small).rows_at_once == 2
    assert choose_chunks(0, **small) == Chunks(1, 8)
    # However much there is, lines of the output take a bounded part of it.
    lines = choose_chunks(2**40, 1.0, 21, (2160, 3840)).lines_at_once
    assert 64 * 2**20 < lines * 4 * memory.LINE_COPIES * 21 * 3840 <= 256 * 2**20
    lines = choose_chunks(20 * 4 * 6 * 6 * 64, **small).lines_at_once
    assert lines == 16  # 20 fit: three groups


def test_a_small_budget_gives_the_same_masks(monkeypatch):
    frames, masks = random_video(4), {0: FOUR_OBJECTS}
    chosen = []

    def choose(*arguments):
        chosen.append(choose_chunks(*arguments))
        return chosen[-1]

    monkeypatch.setattr(memory, "choose_chunks", choose)
    expected = list(small_segmenter().segment(frames, masks, return_probabilities=True))
    assert set(chosen) == {Chunks(None, None)}
    chosen.clear()
    bounded = small_segmenter(memory_mib=1)
    found = list(bounded.segment(frames, masks))
    assert set(chosen) == {Chunks(1, 8)}
    for label, (expected_label, probabilities) in zip(found, expected, strict=True):
        ordered = np.sort(probabilities, axis=0)
        clear = ordered[-1] - ordered[-2] > 1e-3
        np.testing.assert_array_equal(label[clear], expected_label[clear])
    assert len(np.unique(found[-1])) > 1


def test_a_long_video_holds_no_more_than_a_short_one():
    held = []
    for _ in small_segmenter().segment(random_video(24), {0: FOUR_OBJECTS}):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(set(held[3:-3])) <= 2  # the reader's thread may be a frame ahead, or not yet
    assert max(held[12:]) <= max(held[3:12])


def test_plan():
    segmenter = small_segmenter()
    plan = segmenter.plan((40, 56), num_objects=2)
    _, variables = small_network()
    assert plan.parts["weights"] == sum(x.nbytes for x in jax.tree.leaves(variables))
    channels = segmenter.programs.model.embedding_dim
    # The network sees 33 x 49 pixels; reference and previous frame with a label each.
    assert plan.parts["references"] == 2 * 9 * 13 * (4 * channels + 1)
    assert plan.peak == sum(plan.parts.values()) and "weights" in str(plan)
    several = segmenter.plan((40, 56), num_objects=2, num_references=3)
    assert several.parts["references"] == 2 * plan.parts["references"]
    larger = segmenter.plan((40, 56), num_objects=6)
    assert larger.parts["computation"] > 1.5 * plan.parts["computation"]


def test_plan_of_more_than_the_options_allow():
    bounded = small_segmenter(max_objects=2, max_references=1)
    with pytest.raises(ValueError, match="hold 20 objects, and max_objects is 2"):
        bounded.plan((40, 56), num_objects=20)
    with pytest.raises(ValueError, match="masks for 5 frames, and max_references is 1"):
        bounded.plan((40, 56), num_objects=2, num_references=5)


def test_plan_compiles_what_the_video_runs():
    compiled = []

    def note(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration" and "_views" in fun_name:
            compiled.append(fun_name)

    segmenter = small_segmenter()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        segmenter.plan((40, 56), num_objects=4)
        assert compiled == ["jit(embed_views)", "jit(predict_views)"]
        list(segmenter.segment(random_video(3), {0: FOUR_OBJECTS}))
        assert len(compiled) == 2
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_more_than_the_default_budget_is_told(monkeypatch, caplog):
    """By a plan, and by a video once, unless less at a time helps."""

    def warnings():
        found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        caplog.clear()
        return found

    monkeypatch.setattr(memory, "CPU_BUDGET", 2 * 2**20)
    segmenter = small_segmenter()
    plan = segmenter.plan((40, 56), num_objects=4)
    assert plan.peak > 2 * 2**20
    (warning,) = warnings()
    assert f"40 x 56 with 4 objects takes {plan}, and memory_mib is 2; less memory" in warning
    for _ in range(2):
        list(segmenter.segment(random_video(3), {0: FOUR_OBJECTS}))
    (warning,) = warnings()
    assert "40 x 56 with 4 objects takes about" in warning
    monkeypatch.setattr(memory, "CPU_BUDGET", 200 * 2**20)
    list(small_segmenter().segment(random_video(3), {0: FOUR_OBJECTS}))
    assert not warnings()


@pytest.mark.parametrize(
    "rate, dtype, size", [(1, "float32", 4), (2, "float32", 4), (1, "float16", 2)]
)
def test_the_memory_told_counts_references(caplog, rate, dtype, size):
    """What they take themselves, and three sorted copies of the pixels that matching looks at."""
    options = Options(memory_mib=1, global_atrous_rate=rate, matching_dtype=dtype)
    budget = cfbi_jax.VideoSegmenter(*small_network(), IMAGENET_FORMAT, options).programs.budget
    features = (tuple(jax.ShapeDtypeStruct((1, 61, 81, c), np.float32) for c in (16, 32)),)
    told, held = [], []
    for references in (32, 64):
        budget.warn(features, (240, 320), 3, references)
        told.append(int(re.search(r"takes about (\d+) MiB", caplog.messages[-1])[1]))
        held.append(budget.held(features, (240, 320), references)["references"])
    looked_at = 32 * 61 * 81 / rate**2
    expected = (held[1] - held[0] + 3 * looked_at * 16 * size) / 2**20
    assert told[1] - told[0] == pytest.approx(expected, abs=1) and expected > 14


def test_a_wide_head_is_computed_in_parts():
    """Its inside is wider than its input. Planned as a whole it would take 252 MiB."""
    model, variables = small_network()
    wide = model.clone(ensembler_dim=256)
    segmenter = cfbi_jax.VideoSegmenter(wide, variables, IMAGENET_FORMAT, Options(memory_mib=200))
    shapes = [jax.ShapeDtypeStruct((1, 61, 81, c), np.float32) for c in (16, 32)]
    chunks = segmenter.programs.budget.chunks((tuple(shapes),), (240, 320), 13, 1)
    assert chunks.rows_at_once is not None


def test_a_result_in_an_arguments_memory_takes_none():
    def takes(**donated):
        program = jax.jit(lambda x: x + 1, **donated).lower(jnp.zeros(1000)).compile()
        return memory.working_bytes(program)

    assert takes() - takes(donate_argnums=0) == 4000


def test_lines_are_those_of_the_height():
    """4,000 short lines, of which hundreds fit; of 100 long ones two dozen would."""
    budget = small_segmenter(memory_mib=60).programs.budget
    shapes = [jax.ShapeDtypeStruct((1, 251, 9, c), np.float32) for c in (16, 32)]
    chunks = budget.chunks((tuple(shapes),), (4000, 100), 13, 1)
    assert 100 < chunks.lines_at_once < 4000


def test_plan_over_budget_says_what_helps():
    with pytest.raises(ValueError, match="memory_mib is 1; .*max_long_edge") as raised:
        small_segmenter(memory_mib=1).plan((400, 560), num_objects=2)
    assert "400 x 560 with 2 objects takes" in str(raised.value)


def test_groups_bound_the_computation():
    """Sixteen objects, one row at a time, against all 17 at once."""
    unbounded = small_segmenter(memory_mib=10_000).plan((240, 320), 16)
    bounded = small_segmenter(memory_mib=30).plan((240, 320), 16)
    assert unbounded.chunks.rows_at_once is None and bounded.chunks.rows_at_once <= 4
    assert bounded.peak < 30 * 2**20 < unbounded.peak


def test_groups_leave_room_for_every_view():
    bounded = small_segmenter(memory_mib=70, scales=(1.0, 1.5), flip=True).plan((240, 320), 16)
    assert bounded.peak < 70 * 2**20


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")


@pytest.mark.parametrize("function", ["embed", "predict", "to_device"])
def test_out_of_memory_says_what_helps(monkeypatch, function):
    segmenter = small_segmenter()
    monkeypatch.setattr(segmenter.programs, function, exhausted)
    with pytest.raises(MemoryError, match="(?s)max_long_edge.*allocating 99 bytes"):
        list(segmenter.segment(random_video(3), {0: FOUR_OBJECTS}))


def test_out_of_memory_is_explained_where_results_are_waited_for(monkeypatch):
    result = propagation.Prediction(np.zeros((4, 4), np.uint8), None, None, (1,), False)
    monkeypatch.setattr(propagation.cv2, "LUT", exhausted)
    with pytest.raises(MemoryError, match="(?s)max_long_edge.*allocating 99 bytes"):
        result.fetch()


def test_other_errors_of_the_device_go_on(monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    segmenter = small_segmenter()
    monkeypatch.setattr(segmenter.programs, "embed", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        list(segmenter.segment(random_video(3), {0: FOUR_OBJECTS}))


def test_plan_is_immutable_and_sizes_are_of_shapes():
    plan = MemoryPlan({"weights": 3, "references": 4})
    assert plan.peak == 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.parts = {}
    assert tree_bytes([jax.ShapeDtypeStruct((2, 3), np.int16), np.zeros(5, np.uint8)]) == 17


@pytest.mark.parametrize(
    ("stats", "expected"),
    [({"bytes_limit": 10 * 2**30}, 8 * 2**30), ({}, 2**30), (None, 2**30)],
)
def test_the_default_budget_is_a_part_of_the_device(stats, expected):
    device = mock.Mock(spec=jax.Device)
    device.memory_stats.return_value = stats
    assert memory.default_budget(device) == expected
