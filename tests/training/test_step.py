"""The training step: against a loop written out frame by frame, and against itself.

Tolerances: the same sums in another order differ by float32 rounding, 1e-7 of the largest term;
a network of a dozen layers with group norms turns that into some 1e-6 of a loss and 1e-5 of a
gradient. The bounds are ten times that, and far below what any mistake in a row, mask or clip does
(the tests assert that the cases told apart differ by more than 1e-3).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from small import random_variables, small_network
from tiny import QUICK, SIZE, batch_of, random_clips, tiny_model, tiny_parts

from cfbi_jax.compilation import compiler_options
from cfbi_jax.models import cfbi, matching_global
from cfbi_jax.models.cfbi import CFBI, mask_padding
from cfbi_jax.models.deeplab import DeepLab
from cfbi_jax.models.ensembler import CollaborativeEnsembler
from cfbi_jax.models.images import OFFICIAL_FORMAT, prepare
from cfbi_jax.models.matching_kernel import Blocks
from cfbi_jax.models.resizing import resize, resize_labels
from cfbi_jax.training.losses import bootstrapped_cross_entropy, mining_ratio
from cfbi_jax.training.schedule import optimizer
from cfbi_jax.training.step import (
    StepOptions,
    _recomputed,
    clip_losses,
    create_state,
    make_train_step,
    pack_rows,
    plan_step,
)

OBJECTS = [0, 1, 2]  # of the clips
MAX_OBJECTS = 2
SEQUENTIAL, MINING = 10, 40
OPTIONS = StepOptions(MAX_OBJECTS, sequential_step=SEQUENTIAL, mining_step=MINING)
TRUTH_STEP, PREDICTION_STEP = 10, 11  # the last and the first of their kind
RATE, DECAY, MOMENTUM = 0.05, 0.01, 0.9
LOSS = dict(rtol=2e-5)


def assert_close_trees(found, expected, tolerance=1e-4):
    """Of every array, the largest difference relative to the array's largest value.

    Or to a thousandth of the largest of all: a bias ahead of a norm with a group per channel has a
    gradient of 0, and float32 finds another rounding error every time.
    """
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), expected)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def compare(path, b, a):
        scale = max(np.abs(b).max(), 1e-3 * largest)
        error = np.abs(np.asarray(a, np.float64) - b).max() / scale
        assert error < tolerance, (jax.tree_util.keystr(path), error)

    jax.tree.map_with_path(compare, expected, found)


def assert_same_masks(found, expected):
    """Up to a pixel or two whose two largest logits are equal up to rounding."""
    assert np.count_nonzero(np.asarray(found) != np.asarray(expected)) <= 2


def compiled(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile(compiler_options=QUICK)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_parts():
        yield


@pytest.fixture(scope="module")
def variables(tiny):
    return jax.tree.map(jnp.asarray, random_variables(tiny_model(), seed=0))


# ------------------------------------------------------------------------------ losses of clips


@pytest.fixture(scope="module")
def losses_and_gradient(variables):
    """(step, batch for one part) -> (losses, counts, predictions), gradient of their mean."""

    def run(params, step, batch):
        def mean_loss(params):
            outputs = clip_losses(
                tiny_model(),
                OFFICIAL_FORMAT,
                OPTIONS,
                params,
                variables["frozen"],
                step,
                jax.random.key(0),
                batch,
            )
            return jnp.mean(outputs[0]), outputs

        gradient, outputs = jax.grad(mean_loss, has_aux=True)(params)
        return outputs, gradient

    programs = {}

    def call(step, batch):
        batch = batch._replace(packing=jax.tree.map(lambda x: x[0], batch.packing))
        arguments = (variables["params"], jnp.int32(step), batch)
        key = batch.labels.shape[0], batch.packing.row.shape
        if key not in programs:
            programs[key] = compiled(run, *arguments)
        return jax.tree.map(np.asarray, programs[key](*arguments))

    return call


@pytest.fixture(scope="module")
def by_hand(variables):
    """(step, clips, i) -> (loss, gradient, predictions of its two current frames) of clip i, alone.

    Written as the authors train: reference, previous and current frame are embedded anew for every
    current frame, without packing, and every previous mask is an array that is passed in.
    """
    model = tiny_model()

    def run(params, frames, labels, masks, count, step):
        def loss(params):
            network = model.bind({"params": params, "frozen": variables["frozen"]})
            total, predictions = 0.0, []
            for k in range(2):
                (reference, _), (previous, _), (current, low_level) = (
                    network.embed(prepare(frames[t : t + 1], SIZE, OFFICIAL_FORMAT))
                    for t in (0, 1 + k, 2 + k)
                )
                small = current.shape[1:3]
                logits = network.segment(
                    reference[:, None],
                    resize_labels(labels[0:1], small)[:, None],
                    jnp.ones(1, jnp.int32),
                    previous,
                    resize_labels(masks[k : k + 1], small),
                    current,
                    low_level,
                    count[None],
                    1 + MAX_OBJECTS,
                )
                logits = resize(logits.transpose(0, 2, 3, 1), SIZE).transpose(0, 3, 1, 2)
                logits = mask_padding(logits, count[None])
                ratio = mining_ratio(step, MINING)
                total += bootstrapped_cross_entropy(logits, labels[2 + k][None], ratio)[0]
                predictions.append(jnp.argmax(logits[0], axis=0))
            return total / 2, jnp.stack(predictions)

        (value, predictions), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradient, predictions

    program = None

    def call(step, clips, i):
        nonlocal program

        def evaluate(masks):
            nonlocal program
            arguments = (
                variables["params"],
                jnp.asarray(clips["frames"][i]),
                jnp.asarray(clips["labels"][i]),
                jnp.asarray(masks),
                jnp.asarray(clips["num_objects"][i]),
                jnp.int32(step),
            )
            if program is None:
                program = compiled(run, *arguments)
            return program(*arguments)

        truth = clips["labels"][i]
        masks = truth[1:3].copy()
        if step > SEQUENTIAL:
            masks[1] = evaluate(masks)[2][0]
        return evaluate(masks)

    return call


@pytest.fixture(scope="module")
def clips():
    return random_clips(OBJECTS, num_frames=4)


@pytest.mark.parametrize("step", [TRUTH_STEP, PREDICTION_STEP])
def test_step_is_the_loop_over_frames(losses_and_gradient, by_hand, clips, step):
    """Packed rows of clips with 0, 1 and 2 objects, embedded once, against each clip alone: masks
    are the truth up to `sequential_step` and predictions after it, and no gradient flows through.
    """
    (losses, counts, predictions), gradient = losses_and_gradient(
        step, batch_of(clips, MAX_OBJECTS)
    )
    alone = [by_hand(step, clips, i) for i in range(3)]
    np.testing.assert_allclose(losses, [loss for loss, _, _ in alone], **LOSS, atol=1e-6)
    assert losses[0] == 0 and losses.min() >= 0 and (losses[1:] > 0.1).all()
    assert_same_masks(predictions, np.stack([masks for _, _, masks in alone]))
    mean = jax.tree.map(lambda *g: sum(g) / 3, *(gradient for _, gradient, _ in alone))
    assert_close_trees(gradient, mean)
    for i, objects in enumerate(OBJECTS):
        np.testing.assert_allclose(
            counts[i], slow_iou(predictions[i], clips["labels"][i, 2:], objects), rtol=1e-5
        )


def slow_iou(predictions, truths, objects):
    """(sum of IoU, number of objects that are there) over the frames of a clip."""
    values = []
    for prediction, truth in zip(predictions, truths, strict=True):
        for row in range(1, 1 + objects):
            a, b = (prediction == row) & (truth != 255), truth == row
            if (a | b).any():
                values.append((a & b).sum() / (a | b).sum())
    return sum(values), len(values)


def test_the_two_ways_of_masks_differ(losses_and_gradient, clips):
    """Or the test above would show nothing. The mining ratio is the same up to 1/40."""
    batch = batch_of(clips, MAX_OBJECTS)
    truth = losses_and_gradient(TRUTH_STEP, batch)[0]
    predicted = losses_and_gradient(PREDICTION_STEP, batch)[0]
    np.testing.assert_array_equal(truth[2][:, 0], predicted[2][:, 0])
    assert (truth[2][1:, 1] != predicted[2][1:, 1]).mean() > 1e-3


def test_packed_rows_are_those_of_all_rows(losses_and_gradient, clips):
    batch, full = (batch_of(clips, MAX_OBJECTS, full=full) for full in (False, True))
    assert batch.packing.row.size == 6 and full.packing.row.size == 9
    (losses, counts, predictions), gradient = losses_and_gradient(PREDICTION_STEP, batch)
    expected, expected_gradient = losses_and_gradient(PREDICTION_STEP, full)
    np.testing.assert_allclose(losses, expected[0], **LOSS, atol=1e-6)
    assert_same_masks(predictions, expected[2])
    assert_close_trees(gradient, expected_gradient)


def test_packed_logits_of_the_real_head():
    """`CFBI.segment` with and without packing, with the real ensembler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfbi, "DeepLab", DeepLab)
        patch.setattr(cfbi, "CollaborativeEnsembler", CollaborativeEnsembler)
        model, variables = small_network()
        rng = np.random.default_rng(0)
        maps = rng.random((4, 3, 7, 9, 16)).astype(np.float32)
        low_level = rng.random((3, 7, 9, 32)).astype(np.float32)
        labels = rng.integers(0, 3, (2, 3, 7, 9)).astype(np.uint8)
        count = jnp.asarray(OBJECTS, jnp.int32)

        def segment(packing):
            return model.apply(
                jax.tree.map(jnp.asarray, variables),
                jnp.asarray(maps[0])[:, None],
                jnp.asarray(labels[0])[:, None],
                jnp.ones(3, jnp.int32),
                jnp.asarray(maps[1]),
                jnp.asarray(labels[1]),
                jnp.asarray(maps[2]),
                jnp.asarray(low_level),
                count,
                1 + MAX_OBJECTS,
                packing,
                method=CFBI.segment,
            )

        packing = jax.tree.map(lambda x: jnp.asarray(x[0]), pack_rows(np.array(OBJECTS), 1, 2))
        assert packing.row.shape == (6,)
        found = compiled(segment, packing)(packing)
        expected = compiled(partial(segment, None))()
    for i, objects in enumerate(OBJECTS):
        valid = np.asarray(expected[i, : 1 + objects])
        assert np.ptp(valid) > 1e-2
        np.testing.assert_allclose(found[i, : 1 + objects], valid, atol=5e-5 * np.abs(valid).max())


@settings(max_examples=100, deadline=None)
@given(
    counts=st.sampled_from([1, 2, 4]).flatmap(
        lambda parts: st.lists(
            st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=parts, max_size=parts
        )
    ),
    full=st.booleans(),
)
def test_pack_rows(counts, full):
    """Every row of every clip once, in order; then padding. Lengths are multiples of the clips."""
    counts = np.array(counts, np.int32)
    packing = pack_rows(counts.reshape(-1), len(counts), 5, full)
    assert packing.sample.shape == packing.row.shape and packing.row.dtype == np.int32
    length = packing.row.shape[1]
    assert length % 3 == 0 and length <= 18  # 6 different ones
    needed = (1 + counts).sum(axis=1).max()
    assert length == 18 if full else 0 <= length - needed < 3
    for sample, row, objects in zip(*packing, counts, strict=True):
        expected = [(clip, row) for clip in range(3) for row in range(1 + objects[clip])]
        assert list(zip(sample, row, strict=True))[: len(expected)] == expected
        assert (sample[len(expected) :] == 3).all()


def test_options_are_checked():
    with pytest.raises(ValueError, match='remat is "some"'):
        StepOptions(remat="some")
    with pytest.raises(ValueError, match="ema_decay is 1"):
        StepOptions(ema_decay=1.0)
    with pytest.raises(ValueError, match="mask_errors is 2.0; expected a share"):
        StepOptions(mask_errors=2.0)


# ------------------------------------------------------------------------------------- dropout


@pytest.fixture(scope="module")
def dropout_losses(variables):
    def run(key, step, batch):
        return clip_losses(
            tiny_model(dropout=0.5),
            OFFICIAL_FORMAT,
            OPTIONS,
            variables["params"],
            variables["frozen"],
            step,
            key,
            batch,
        )[0]

    program = None

    def call(seed, step, clips):
        nonlocal program
        batch = batch_of(clips, MAX_OBJECTS)
        batch = batch._replace(packing=jax.tree.map(lambda x: x[0], batch.packing))
        arguments = (jax.random.key(seed), jnp.int32(step), batch)
        if program is None:
            program = compiled(run, *arguments)
        return np.asarray(program(*arguments))

    return call


def test_dropout_is_of_the_seed_the_step_and_the_clip(dropout_losses):
    clips = random_clips([1, 1, 1], num_frames=3)
    for name in ("frames", "labels"):  # three times the same
        clips[name][:] = clips[name][:1]
    losses = dropout_losses(0, 5, clips)
    np.testing.assert_array_equal(losses, dropout_losses(0, 5, clips))
    assert np.abs(np.diff(losses[[0, 1, 2, 0]])).min() > 1e-3  # another clip
    assert np.abs(losses - dropout_losses(1, 5, clips)).min() > 1e-3  # another seed
    assert np.abs(losses - dropout_losses(0, 6, clips)).min() > 1e-3  # another step

    # The place in the batch is immaterial, and clips of one number draw the same.
    order = np.array([2, 0, 1])
    turned = {name: value[order] for name, value in clips.items()}
    np.testing.assert_allclose(dropout_losses(0, 5, turned), losses[order], **LOSS)
    one_number = clips | {"index": clips["index"][[1, 1, 1]]}
    np.testing.assert_allclose(dropout_losses(0, 5, one_number), losses[[1, 1, 1]], **LOSS)


def test_every_frame_drops_others(variables, monkeypatch):
    class Seen(Exception):
        pass

    def embed(network, images, keys):
        raise Seen(keys)

    monkeypatch.setattr(CFBI, "embed", embed)
    batch = batch_of(random_clips([1, 1], num_frames=4), MAX_OBJECTS)
    arguments = variables["params"], variables["frozen"], jnp.int32(0), jax.random.key(0), batch
    with pytest.raises(Seen) as seen:
        clip_losses(tiny_model(), OFFICIAL_FORMAT, OPTIONS, *arguments)
    keys = np.asarray(jax.random.key_data(seen.value.args[0]))
    assert len(keys) == len(np.unique(keys, axis=0)) == 2 * 4


# ---------------------------------------------------------------------------------- whole steps


def new_state(variables, ema=False):
    """With copies of the variables: a step deletes what it is given."""
    return create_state(jax.tree.map(jnp.copy, variables), TX, seed=0, ema=ema)


TX = optimizer(lambda step: RATE, DECAY, MOMENTUM, max_gradient_norm=0.5)
MESH = Mesh(np.array(jax.devices()[:1]), ("data",))
STEP_OBJECTS = [0, 1, 2, 1]


@pytest.fixture(scope="module")
def step_clips():
    return random_clips(STEP_OBJECTS, num_frames=3, seed=1)


@pytest.fixture(scope="module")
def train_steps(variables, step_clips):
    """Options -> (compiled step, its batch of `step_clips`)."""
    programs, products = {}, {}

    def get(ema_decay=0.15, accumulate=1, remat="none", freeze_backbone=False):
        key = ema_decay, accumulate, remat, freeze_backbone
        batch = batch_of(step_clips, MAX_OBJECTS, parts=accumulate)
        if key not in programs:
            options = StepOptions(
                MAX_OBJECTS,
                SEQUENTIAL,
                MINING,
                ema_decay=ema_decay,
                accumulate=accumulate,
                remat=remat,
                freeze_backbone=freeze_backbone,
            )
            step = make_train_step(tiny_model(), OFFICIAL_FORMAT, TX, options, MESH)
            state = new_state(variables, ema_decay > 0)
            lowered = step.lower(state, batch)
            products[key] = lowered.as_text().count("dot_general")
            programs[key] = lowered.compile(compiler_options=QUICK)
        return programs[key], batch

    def products_of(ema_decay=0.15, accumulate=1, remat="none"):
        get(ema_decay, accumulate, remat)
        return products[ema_decay, accumulate, remat, False]

    get.products_of = products_of
    return get


@pytest.fixture(scope="module")
def after_one_step(train_steps, variables):
    step, batch = train_steps()
    return step(new_state(variables, ema=True), batch)


@pytest.mark.parametrize(
    "options", [dict(accumulate=2, remat="segment"), dict(remat="all")], ids=str
)
def test_ways_to_save_memory_change_nothing(train_steps, after_one_step, variables, options):
    """But the order of sums. The trace of the optimiser is the gradient plus weight decay."""
    step, batch = train_steps(**options)
    state, metrics, prediction = step(new_state(variables, ema=True), batch)
    expected_state, expected_metrics, expected_prediction = after_one_step
    assert_close_trees(state.optimizer, expected_state.optimizer)
    assert_close_trees(state.params, expected_state.params, 1e-5)
    assert_close_trees(metrics, expected_metrics, 1e-4)
    assert_same_masks(prediction, expected_prediction)
    assert prediction.shape == (4, 1, *SIZE)


def test_the_kernel_of_global_matching_changes_nothing(
    monkeypatch, variables, step_clips, after_one_step
):
    """Interpreted, in the step with its gradient, over the clips of a batch and in `shard_map`."""
    asked = []

    def blocks_here(dtype, channels):
        asked.append((jnp.dtype(dtype).name, channels))
        return Blocks(16, 16, 2)

    monkeypatch.setattr(matching_global, "blocks_here", blocks_here)
    options = StepOptions(MAX_OBJECTS, SEQUENTIAL, MINING, ema_decay=0.15)
    step = make_train_step(tiny_model(), OFFICIAL_FORMAT, TX, options, MESH)
    state, batch = new_state(variables, ema=True), batch_of(step_clips, MAX_OBJECTS)
    program = step.lower(state, batch).compile(compiler_options=QUICK)
    state, metrics, prediction = program(state, batch)
    assert ("float32", tiny_model().embedding_dim) in asked
    assert_close_trees(state.optimizer, after_one_step[0].optimizer)
    assert_close_trees(metrics, after_one_step[1], 1e-4)
    assert_same_masks(prediction, after_one_step[2])


def test_a_frozen_backbone_has_no_gradient(train_steps, after_one_step, variables):
    """The others keep theirs; they are read from the optimiser's trace."""
    step, batch = train_steps(freeze_backbone=True)
    state, metrics, _ = step(new_state(variables, ema=True), batch)

    def gradient(state, metrics):
        clipped = min(1, 0.5 / float(metrics["gradient_norm"]))
        trace = optax.tree_utils.tree_get(state.optimizer, "trace")
        return jax.tree.map(
            lambda v, p: (np.asarray(v) - DECAY * p) / clipped, trace, variables["params"]
        )

    found, expected = gradient(state, metrics), gradient(*after_one_step[:2])
    frozen, trained = (tree["deeplab"].pop("backbone") for tree in (found, expected))
    assert max(np.abs(x).max() for x in jax.tree.leaves(frozen)) < 1e-6
    assert min(np.abs(x).max() for x in jax.tree.leaves(trained)) > 1e-3
    assert_close_trees(found, expected)


def test_remat_computes_again(train_steps):
    """Or the test above would show nothing."""
    ways = [dict(), dict(accumulate=2, remat="segment"), dict(remat="all")]
    none, segment, everything = (train_steps.products_of(**way) for way in ways)
    assert none < segment < everything


def test_what_is_computed_again_exists_once():
    """Three calls of which each keeps twelve arrays of 256 KiB, unless they are recomputed."""

    def layers(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return x

    def kept(turn, *arguments):
        return turn, layers(*arguments)

    def loss(fn, weights, inputs):
        turn, total = jnp.float32(0), 0.0
        for x in inputs:
            turn, y = fn(turn, weights, x)
            total += jnp.sum(jnp.square(y))
        return total

    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(12, 64, 64)) / 8, jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(3, 1024, 64)), jnp.float32)
    programs = [
        jax.jit(jax.grad(partial(loss, fn)), compiler_options=compiler_options())
        .lower(weights, inputs)
        .compile()
        for fn in (kept, _recomputed(layers))
    ]
    np.testing.assert_array_equal(*(program(weights, inputs) for program in programs))
    plain, again = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert again < 0.5 * plain


def test_plan_of_a_step(variables):
    """State, clips, and what the compiled program says; parts of a batch take less."""
    clips = random_clips([1, 2, 1, 2], num_frames=3)

    def plan(accumulate):
        options = StepOptions(MAX_OBJECTS, SEQUENTIAL, MINING, accumulate=accumulate)
        counts, shape = clips["num_objects"], clips["labels"].shape[1:]
        return plan_step(tiny_model(), OFFICIAL_FORMAT, TX, options, MESH, counts, shape)

    whole, halves = plan(1), plan(2)
    weights = sum(x.nbytes for x in jax.tree.leaves(variables))
    trained = sum(x.nbytes for x in jax.tree.leaves(variables["params"]))
    counters = 4 + 4 + 1  # two steps and `halted`
    assert whole.parts["weights and optimiser"] == weights + trained + counters
    pixels = clips["labels"].size
    assert 0 < whole.parts["clips"] - 4 * pixels < 200  # frames, labels; the rest is small
    assert halves.parts["computation"] < 0.75 * whole.parts["computation"]


def test_metrics(after_one_step, train_steps, variables):
    _, metrics, _ = after_one_step
    assert metrics["gradient_norm"] > 0.5  # so that it is clipped
    assert 0 < metrics["iou"] < 1


def test_step_is_the_optimizer_after_the_gradient(after_one_step, variables):
    """First step: v = g + decay * p, then p - rate * (1 + momentum) * v, with |g| clipped."""
    state, metrics, _ = after_one_step
    params = jax.tree.leaves(variables["params"])
    moved = [
        (old - new) / (RATE * (1 + MOMENTUM)) - DECAY * old
        for old, new in zip(params, jax.tree.leaves(state.params), strict=True)
    ]
    # Differences of nearly equal numbers: of 1e-7 of a parameter, over the rate.
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in moved))
    np.testing.assert_allclose(norm, 0.5, rtol=1e-3)
    assert state.step == 1 and not state.halted


def test_every_parameter_moves_and_frozen_batch_norm_does_not(after_one_step, variables):
    state, _, _ = after_one_step
    jax.tree.map(np.testing.assert_array_equal, state.frozen, variables["frozen"])
    for path, old in jax.tree.leaves_with_path(variables["params"]):
        new = state.params
        for key in path:
            new = new[key.key]
        assert (new != old).mean() > 0.5, path


def test_decay_alone_shrinks_every_parameter(train_steps, variables, step_clips):
    """Clips without objects have a loss and a gradient of exactly 0."""
    step, batch = train_steps()
    background = step_clips | {"num_objects": np.zeros(4, np.int32)}
    background["labels"] = np.zeros_like(step_clips["labels"])
    empty = batch_of(background, MAX_OBJECTS)
    packing = jax.tree.map(lambda x: jnp.full_like(x, 0), batch.packing)
    length = batch.packing.row.shape[1]
    packing = packing._replace(sample=jnp.asarray([[0, 1, 2, 3] + [4] * (length - 4)], jnp.int32))
    state, metrics, _ = step(new_state(variables, ema=True), empty._replace(packing=packing))
    assert metrics["loss"] == metrics["gradient_norm"] == 0 and not state.halted
    shrunk = jax.tree.map(
        lambda p: np.float64(p) * (1 - RATE * (1 + MOMENTUM) * DECAY), variables["params"]
    )
    assert_close_trees(state.params, shrunk, 1e-6)  # twice float32's resolution, and some


def test_three_steps_average_the_weights_and_reuse_memory(train_steps, variables):
    step, batch = train_steps()
    state = new_state(variables, ema=True)
    average = jax.tree.map(np.float64, variables["params"])
    for decay in (0.1, 0.15, 0.15):  # min(0.15, (1 + t) / (10 + t))
        old = jax.tree.leaves(state)
        state, _, _ = step(state, batch)
        assert all(leaf.is_deleted() for leaf in old)
        # Copies: what NumPy has looked at may stay.
        params, ema = jax.tree.map(jnp.copy, (state.params, state.ema))
        average = jax.tree.map(
            lambda a, p, decay=decay: decay * a + (1 - decay) * np.float64(p), average, params
        )
        assert_close_trees(ema, average, 1e-6)
    assert state.step == 3
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.ema, state.params)
    assert max(jax.tree.leaves(difference)) > 1e-3
    assert state.evaluated["params"] is state.ema
    assert state._replace(ema=None).evaluated["params"] is state.params


def test_a_bad_loss_halts_for_good(train_steps, variables, step_clips):
    """Clip 1 shows object 2, which it does not have: its loss is infinite."""
    step, good = train_steps()
    labels = step_clips["labels"].copy()
    labels[1, 2] = 2
    bad = good._replace(labels=jnp.asarray(labels))
    state, _, _ = step(new_state(variables, ema=True), good)
    before = jax.tree.map(np.asarray, state._replace(key=(), halted=()))

    def assert_as_before(state):
        assert state.halted
        assert (jax.random.key_data(state.key) == jax.random.key_data(jax.random.key(0))).all()
        found = state._replace(key=(), halted=())
        jax.tree.map(np.testing.assert_array_equal, found, before)

    state, metrics, _ = step(state, bad)
    assert np.isinf(metrics["loss"])
    assert_as_before(state)
    for _ in range(2):
        state, metrics, _ = step(state, good)
        assert np.isfinite(metrics["loss"])
        assert_as_before(state)


def test_not_a_number_in_the_weights_halts(train_steps, variables):
    step, batch = train_steps()
    state = new_state(variables, ema=True)
    state.params["background_bias"] = jnp.float32(np.nan)
    state, metrics, _ = step(state, batch)
    assert state.halted and np.isnan(metrics["loss"]) and state.step == 0
    np.testing.assert_array_equal(
        state.params["foreground_bias"], variables["params"]["foreground_bias"]
    )
