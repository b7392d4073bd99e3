"""Errors of previous masks: what they are, and that training meets them where it should."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_variables
from tiny import QUICK, batch_of, random_clips, tiny_model, tiny_parts

from cfbi_jax.models.images import OFFICIAL_FORMAT
from cfbi_jax.training import step as step_module
from cfbi_jax.training.mask_errors import with_error
from cfbi_jax.training.step import PREVIOUS, StepOptions, clip_losses

DRAWS = 2000


def two_objects():
    label = np.zeros((12, 16), np.uint8)
    label[2:8, 2:7], label[3:10, 9:14], label[0] = 1, 2, 255
    return label


def drawn(label, num_objects, share):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = partial(with_error, jnp.asarray(label), jnp.int32(num_objects), share=share)
    return np.asarray(jax.jit(jax.vmap(draw))(keys))


def test_a_part_of_one_object_becomes_another_row():
    label = two_objects()
    found = drawn(label, 2, share=0.5)
    changed = (found != label).any(axis=(1, 2))
    assert abs(changed.mean() - 0.5) < 0.05
    kinds, whole = {}, 0
    quadrants, least = np.zeros((2, 2), int), 1.0
    for wrong in found[changed]:
        places = wrong != label
        (before,), (after,) = set(label[places]), set(wrong[places])
        kinds[int(before), int(after)] = kinds.get((int(before), int(after)), 0) + 1
        rest = (label == before) & ~places
        whole += not rest.any()
        # A straight line parts what is wrong from what is left.
        if rest.any():
            y, x = np.nonzero(label == before)
            side = places[y, x]
            angles = np.linspace(0, 2 * np.pi, 720)
            least = min(least, side.mean())
            quadrants[int(y[side].mean() > y.mean()), int(x[side].mean() > x.mean())] += 1
            along = np.outer(np.cos(angles), x) + np.outer(np.sin(angles), y)
            assert (along[:, side].max(axis=1) < along[:, ~side].min(axis=1)).any()
    # Both objects, each to the background and to the other one, equally often.
    assert set(kinds) == {(1, 0), (1, 2), (2, 0), (2, 1)}
    assert min(kinds.values()) > 0.8 * changed.sum() / 4
    assert abs(whole / changed.sum() - 1 / 3) < 0.05
    # From every direction, and parts of every size.
    assert quadrants.min() > 0.15 * quadrants.sum() and least < 0.15


def test_what_there_is_no_object_of_stays():
    label = two_objects()
    background = np.where(label == 255, label, 0)
    assert (drawn(background, 0, 1.0) == background).all()
    gone = np.where(label == 1, 0, label)  # object 1 is not in this frame
    for found in drawn(gone, 2, 1.0):
        assert (found[gone != 2] == gone[gone != 2]).all()
    assert (drawn(label, 2, 0.0) == label).all()


@pytest.fixture(scope="module")
def losses_of():
    """(clips, mask_errors, *steps, start=0) -> losses of the clips, in each of the steps."""
    with tiny_parts():
        model = tiny_model()
        variables = jax.tree.map(jnp.asarray, random_variables(model, seed=0))

        def run(clips, mask_errors, *steps, start=0):
            batch = batch_of(clips, 2)
            batch = batch._replace(packing=jax.tree.map(lambda x: x[0], batch.packing))

            def losses(step, batch):
                options = StepOptions(2, mask_errors=mask_errors, mask_errors_step=start)
                return clip_losses(
                    *(model, OFFICIAL_FORMAT, options, variables["params"], variables["frozen"]),
                    *(step, jax.random.key(0), batch),
                )[0]

            lowered = jax.jit(losses).lower(jnp.int32(0), batch)
            program = lowered.compile(compiler_options=QUICK)
            return [np.asarray(program(jnp.int32(step), batch)) for step in steps]

        yield run


def test_the_first_previous_mask_gets_the_error(losses_of, monkeypatch):
    """And nothing else does: neither the loss' truth, nor the later frames' masks."""

    def swapped(label):
        return jnp.where(label == 1, 2, jnp.where(label == 2, 1, label)).astype(jnp.uint8)

    clips = random_clips([2, 2], num_frames=4)
    by_hand = dict(clips, labels=clips["labels"].copy())
    by_hand["labels"][:, PREVIOUS] = swapped(clips["labels"][:, PREVIOUS])
    (expected,), (without,) = losses_of(by_hand, 0.0, 0), losses_of(clips, 0.0, 0)
    monkeypatch.setattr(step_module, "with_error", lambda label, *_, share: swapped(label))
    np.testing.assert_array_equal(losses_of(clips, 1.0, 0)[0], expected)
    assert (expected != without).all()


def test_errors_are_of_the_step_and_the_clip(losses_of):
    one = random_clips([2], num_frames=4)
    clips = {name: np.repeat(value, 6, axis=0) for name, value in one.items()}
    clips["index"] = np.arange(6, dtype=np.int32)
    (plain,) = losses_of(clips, 0.0, 3)
    np.testing.assert_allclose(plain, plain[0], rtol=1e-5)
    first, again, later = losses_of(clips, 1.0, 3, 3, 4)
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first)) > 3 and (first != later).sum() > 3


def test_errors_start_with_a_step(losses_of):
    clips = random_clips([2, 1], num_frames=4)
    without, always = losses_of(clips, 0.0, 3, 4), losses_of(clips, 1.0, 3, 4)
    assert (without[0] != always[0]).all()
    before, after = losses_of(clips, 1.0, 3, 4, start=4)
    np.testing.assert_allclose(before, without[0], rtol=1e-6)
    np.testing.assert_allclose(after, always[1], rtol=1e-6)
