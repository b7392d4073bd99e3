"""What went wrong in a step whose loss or gradient is not finite."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfbi_jax.data.loader import Clips
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import prepare
from cfbi_jax.models.resizing import resize_labels
from cfbi_jax.training.step import (
    FIRST_CURRENT,
    REFERENCE,
    Batch,
    StepOptions,
    TrainState,
    clip_losses,
    pack_rows,
)
from cfbi_jax.weights.checkpoint import Checkpoint


class NotFinite(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message says where that begins."""


def explain(
    start: Checkpoint, clips: Clips, options: StepOptions, state: TrainState, batch_size: int
) -> str:
    """The step, its clips and the first tensor that is not finite: weights, then activations in
    the order in which they are computed, clip by clip, then a clip's loss, or its gradient.

    `state` is that before the step, as a halted state is. Activations are those of true masks
    without dropout, loss and gradient those of the step: what only dropout or a predicted mask
    makes infinite is found in the loss.
    """
    state = _here(state)
    step = int(state.step)
    first = step * batch_size
    numbers = range(first, first + batch_size)
    names = ", ".join(f"{number} ({clips[number].name})" for number in numbers)
    looks = (
        partial(_first_bad_activation, start, clips, state),
        _look_at_losses(start, clips, options, state),
    )
    bad = _first_bad_array("weights", state.params)
    bad = bad or next(filter(None, (look(number) for look in looks for number in numbers)), None)
    bad = bad or "the sum of the clips' gradients: each of them is finite"
    return f"step {step + 1}: not finite, first in {bad}; clips {names}"


def _here(state: TrainState) -> TrainState:
    """What a step depends on, on this process' own device: the run's may be on other hosts, too."""
    key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.key)))
    rest = state._replace(key=None, optimizer=None, ema=None)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), rest)._replace(key=key)


def _first_bad_array(what: str, tree: Any) -> str | None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        values = np.asarray(leaf)
        if not np.isfinite(values).all():
            name = " " + jax.tree_util.keystr(path, simple=True, separator="/") if path else ""
            return f"{what}{name} ({np.count_nonzero(~np.isfinite(values))} of {values.size})"
    return None


def _look_at_losses(
    start: Checkpoint, clips: Clips, options: StepOptions, state: TrainState
) -> Callable[[int], str | None]:
    """A clip's number -> its loss or gradient, where that is not finite; one program for all."""

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params, batch):
        constants = state.frozen, state.step, state.key
        losses, *_ = clip_losses(
            start.model, start.image_format, options, params, *constants, batch
        )
        return losses[0]

    def look(number):
        clip = clips[number]
        num_objects = np.array([clip.num_objects], np.int32)
        packing = pack_rows(num_objects, 1, options.max_objects, full=True)  # of equal shapes
        batch = Batch(
            frames=clip.frames[None],
            labels=clip.labels[None],
            num_objects=num_objects,
            index=np.array([number], np.int32),
            packing=jax.tree.map(lambda x: x[0], packing),
        )
        loss, gradient = loss_and_gradient(state.params, jax.tree.map(jnp.asarray, batch))
        if not np.isfinite(loss):
            return f"the loss of clip {number}, {loss}"
        return _first_bad_array(f"the gradient of clip {number} to", gradient)

    return look


def _first_bad_activation(
    start: Checkpoint, clips: Clips, state: TrainState, number: int
) -> str | None:
    clip = clips[number]
    variables = {"params": state.params, "frozen": state.frozen}
    size = clip.labels.shape[1:]
    images = prepare(jnp.asarray(clip.frames), size, start.image_format)
    where = f"of clip {number}"

    def outputs(method, *arguments) -> tuple[Any, str | None]:
        result, captured = start.model.apply(
            variables,
            *arguments,
            method=method,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        return result, _first_bad_output(captured["intermediates"], where)

    (embedding, low_level), bad = outputs(CFBI.embed, images)
    if bad:
        return bad
    small = resize_labels(jnp.asarray(clip.labels), embedding.shape[1:3])
    for t in range(FIRST_CURRENT, len(clip.frames)):
        logits, bad = outputs(
            CFBI.segment,
            embedding[None, REFERENCE : REFERENCE + 1],
            small[None, REFERENCE : REFERENCE + 1],
            jnp.ones(1, jnp.int32),
            embedding[t - 1][None],
            small[t - 1][None],
            embedding[t][None],
            low_level[t][None],
            jnp.array([clip.num_objects], jnp.int32),
            1 + clip.num_objects,
        )
        if bad:
            return bad
    return None


def _first_bad_output(captured: dict, where: str, path: tuple[str, ...] = ()) -> str | None:
    """Depth first in the order of computation: what a module calls ends before the module does."""
    for name, value in captured.items():
        if isinstance(value, dict):
            found = _first_bad_output(value, where, (*path, name))
        else:
            module = "/".join(path if name == "__call__" else (*path, name))
            what = f"the output of {module} {where}"
            bad = (_first_bad_array(what, output) for output in jax.tree.leaves(value))
            found = next(filter(None, bad), None)
        if found:
            return found
    return None
