"""What went wrong in a step whose loss or gradient is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfbi_jax.data.loader import Clips
from cfbi_jax.models.cfbi import CFBI
from cfbi_jax.models.images import prepare
from cfbi_jax.models.resizing import resize_labels
from cfbi_jax.training.step import FIRST_CURRENT, REFERENCE, TrainState
from cfbi_jax.weights.checkpoint import Checkpoint


class NotFinite(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message says where that begins."""


def explain(start: Checkpoint, clips: Clips, state: TrainState, batch_size: int) -> str:
    """The step, its clips and the first tensor that is not finite: weights, then activations in
    the order in which they are computed, clip by clip; else a gradient.

    `state` is that before the step, as a halted state is. The masks are the true ones, without
    dropout: a tensor that only dropout or a predicted mask makes infinite is not found.
    """
    step = int(state.step)
    first = step * batch_size
    numbers = range(first, first + batch_size)
    names = ", ".join(f"{number} ({clips[number].name})" for number in numbers)
    bad = _first_bad_array("weights", state.params) or next(
        (
            found
            for number in numbers
            if (found := _first_bad_activation(start, clips, state, number))
        ),
        "a gradient: weights are finite, and activations (true masks, no dropout)",
    )
    return f"step {step + 1}: not finite, first in {bad}; clips {names}"


def _first_bad_array(what: str, tree: Any) -> str | None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        values = np.asarray(leaf)
        if not np.isfinite(values).all():
            name = " " + jax.tree_util.keystr(path, simple=True, separator="/") if path else ""
            return f"{what}{name} ({np.count_nonzero(~np.isfinite(values))} of {values.size})"
    return None


def _first_bad_activation(start: Checkpoint, clips: Clips, state: TrainState, number: int):
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
