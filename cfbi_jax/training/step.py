"""One step of training: a batch of clips in, one update of the weights out.

    step = make_train_step(model, image_format, tx, options, mesh)
    state = replicate(create_state(variables, tx, seed), mesh)
    state, metrics, prediction = step(state, batch)

Within a clip the five frames are embedded once (the weights do not change within a step and batch
norm is frozen), then three frames are segmented one after the other:

    reference --+---------------+---------------+
    previous  --+--> current 1 -+--> current 2 -+--> current 3      embeddings
    mask      --+--> mask 1 ----+--> mask 2 ----+--> mask 3       truth, or prediction

The batch is spread over the mesh's axis `data`: every device works on its own clips with its own
copy of the weights, and the sum of the gradients is all that is exchanged.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from cfbi_jax.compilation import compiler_options, return_memory_after_compiling
from cfbi_jax.memory import MemoryPlan, tree_bytes, working_bytes
from cfbi_jax.models.cfbi import CFBI, Packing, mask_padding, parameter_shapes
from cfbi_jax.models.images import ImageFormat, prepare
from cfbi_jax.models.resizing import resize, resize_labels
from cfbi_jax.training.losses import IGNORED, bootstrapped_cross_entropy, mining_ratio
from cfbi_jax.training.mask_errors import with_error

REMAT = ("none", "segment", "all")
REFERENCE, PREVIOUS, FIRST_CURRENT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    max_objects: objects that a clip may have; its labels are 0..max_objects or 255.
    sequential_step: after this step (half of an odd number of steps lies between two) a frame's
        previous mask is the prediction (the number of all steps: never, "no sequential training"
        of Table 5).
    mining_step: when the loss has moved to the hardest pixels alone (`losses.mining_ratio`).
    accumulate: into how many parts each device's clips are cut to save memory.
    remat: what the backward pass computes again instead of keeping it: "none"; "segment", all but
        the embedding; "all".
    ema_decay: of the averaged weights; 0: none are kept.
    freeze_backbone: the backbone keeps its weights, and no gradient of them is computed.
    mask_errors: share of the clips whose first previous mask has an error (`mask_errors`).
    mask_errors_step: from this step on (the first is 0).
    """

    max_objects: int = 5
    sequential_step: float | int = 50_000
    mining_step: float | int = 50_000
    accumulate: int = 1
    remat: str = "none"
    ema_decay: float = 0.0
    freeze_backbone: bool = False
    mask_errors: float = 0.0
    mask_errors_step: float | int = 0

    def __post_init__(self):
        if not 1 <= self.max_objects < IGNORED:
            raise ValueError(f"max_objects is {self.max_objects}; expected 1 to {IGNORED - 1}")
        if self.remat not in REMAT:
            raise ValueError(f'remat is "{self.remat}"; expected one of {REMAT}')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected 0 <= ema_decay < 1")
        if not 0 <= self.mask_errors <= 1:
            raise ValueError(f"mask_errors is {self.mask_errors}; expected a share from 0 to 1")


class TrainState(NamedTuple):
    """All that changes from step to step. `ema` is None where no average is kept.

    `halted`: a loss or gradient was not finite, and no step changes the state any more.
    """

    step: Int[Array, ""]
    params: Any
    frozen: Any
    optimizer: Any
    ema: Any
    key: PRNGKeyArray
    halted: Bool[Array, ""]

    @property
    def evaluated(self) -> dict:
        """The variables to evaluate and to publish: the average where there is one."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "frozen": self.frozen}


class Batch(NamedTuple):
    """b clips of one reference, one previous and n - 2 current frames, and the rows they need.

    Labels are rows 0..num_objects; 255 is ignored. `index` are the clips' numbers. `packing` is
    that of `pack_rows`, one line for every part of every device's share.
    """

    frames: UInt8[Array, "b n height width 3"]
    labels: UInt8[Array, "b n height width"]
    num_objects: Int[Array, " b"]
    index: Int[Array, " b"]
    packing: Packing


def create_state(
    variables: dict, tx: optax.GradientTransformation, seed: int, ema: bool = False
) -> TrainState:
    """The state before the first step."""
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        frozen=variables["frozen"],
        optimizer=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=jax.random.key(seed),
        halted=jnp.array(False),
    )


def replicate(state: TrainState, mesh: Mesh) -> TrainState:
    """The state on every device of the mesh, and of all processes, which hold the same one."""
    sharding = NamedSharding(mesh, P())
    # JAX 0.10 refuses to send a key, unlike its data, to another process' devices.
    data = jax.device_put(jax.random.key_data(state.key), sharding)
    return jax.device_put(state._replace(key=jax.random.wrap_key_data(data)), sharding)


def pack_rows(
    num_objects: Int[np.ndarray, " b"], parts: int, max_objects: int, full: bool = False
) -> Packing:
    """Lists the rows that each of `parts` equal shares of a batch needs: arrays `[parts, n]`.

    n is the largest share's number of rows, rounded up to a multiple of the clips in a share: at
    most `max_objects + 1` different shapes ever occur, each of which is compiled once. `full`: as
    many rows as `max_objects` needs, whatever the clips hold.
    """
    shares = num_objects.reshape(parts, -1)
    clips = shares.shape[1]
    needed = int((1 + shares).sum(axis=1).max())
    length = clips * (1 + max_objects) if full else -(-needed // clips) * clips
    sample = np.full((parts, length), clips, np.int32)
    row = np.zeros((parts, length), np.int32)
    for part, counts in enumerate(1 + shares):
        used = counts.sum()
        sample[part, :used] = np.repeat(np.arange(clips), counts)
        row[part, :used] = np.concatenate([np.arange(count) for count in counts])
    return Packing(sample, row)


def make_train_step(
    model: CFBI,
    image_format: ImageFormat,
    tx: optax.GradientTransformation,
    options: StepOptions,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict, UInt8[Array, "b n height width"]]]:
    """Compiles the step; its first argument's memory is reused.

    It returns the new state, the metrics (scalars) and the predicted masks. From a step on whose
    loss or gradient is not finite the state stays as it was before it (`halted`), so that the step
    can be looked into whenever the host next reads the metrics.
    """
    return_memory_after_compiling()
    gradients = jax.shard_map(
        partial(_device_gradients, model, image_format, options),
        mesh=mesh,
        in_specs=(P(), P(), P(), P(), P("data")),
        out_specs=(P(), P(), P("data")),
        # Gradients are averaged once, explicitly, after the last part.
        check_vma=False,
    )

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    def train_step(state: TrainState, batch: Batch):
        gradient, metrics, prediction = gradients(
            state.params, state.frozen, state.step, state.key, batch
        )
        norm = optax.global_norm(gradient)
        updates, optimizer = tx.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Early on the average is over the steps so far, or the first weights would linger.
            decay = jnp.minimum(options.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            frozen=state.frozen,
            optimizer=optimizer,
            ema=ema,
            key=state.key,
            halted=state.halted,
        )
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & ~state.halted
        new_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_state, state)
        new_state = new_state._replace(halted=~good)
        metrics |= {"gradient_norm": norm}
        return new_state, metrics, prediction

    return train_step


def plan_step(
    model: CFBI,
    image_format: ImageFormat,
    tx: optax.GradientTransformation,
    options: StepOptions,
    mesh: Mesh,
    num_objects: Int[np.ndarray, " b"],
    clip_shape: tuple[int, int, int],
) -> MemoryPlan:
    """What a step takes on one device; compiles it and runs nothing.

    Args:
      num_objects: of the clips of a batch. clip_shape: (frames, height, width) of a clip.
    """
    variables = parameter_shapes(model)
    state = jax.eval_shape(
        lambda variables: create_state(variables, tx, 0, options.ema_decay > 0), variables
    )
    batch = len(num_objects)
    packing = pack_rows(num_objects, mesh.size * options.accumulate, options.max_objects)
    shapes = Batch(
        frames=jax.ShapeDtypeStruct((batch, *clip_shape, 3), np.uint8),
        labels=jax.ShapeDtypeStruct((batch, *clip_shape), np.uint8),
        num_objects=jax.ShapeDtypeStruct((batch,), np.int32),
        index=jax.ShapeDtypeStruct((batch,), np.int32),
        packing=packing,
    )
    step = make_train_step(model, image_format, tx, options, mesh)
    compiled = step.lower(state, shapes).compile()
    # The new state takes the old one's memory, where the backend can reuse it.
    return MemoryPlan(
        {
            "weights and optimiser": tree_bytes(state),
            "clips": tree_bytes(shapes) // mesh.size,
            "computation": working_bytes(compiled),
        }
    )


def _device_gradients(model, image_format, options, params, frozen, step, key, batch):
    """One device's share: gradient and metrics (averaged over all devices), predictions."""
    parts = options.accumulate
    batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    batch = batch._replace(packing=Packing(*(x[:, 0] for x in batch.packing)))
    loss_of = partial(clip_losses, model, image_format, options)

    def part_gradient(total, part):
        def mean_loss(params):
            losses, counts, prediction = loss_of(params, frozen, step, key, part)
            return jnp.mean(losses), (losses, counts, prediction)

        # The network asks for exact products itself, but of those before its backward rules only.
        with jax.default_matmul_precision("highest"):
            gradient, (losses, counts, prediction) = jax.grad(mean_loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, gradient), (losses, counts, prediction)

    if parts == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        zeros = jax.tree.map(lambda x: jnp.float32(0), params)
        gradient, outputs = part_gradient(zeros, only)
        outputs = jax.tree.map(lambda x: x[None], outputs)
    else:
        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, outputs = jax.lax.scan(part_gradient, zeros, batch)
        gradient = jax.tree.map(lambda x: x / parts, gradient)
    losses, counts, prediction = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    gradient, loss = jax.lax.pmean((gradient, jnp.mean(losses)), "data")
    iou_sum, objects = jax.lax.psum(jnp.sum(counts, axis=0), "data")
    metrics = {"loss": loss, "iou": iou_sum / objects}  # NaN for background only
    return gradient, metrics, prediction


def clip_losses(
    model: CFBI,
    image_format: ImageFormat,
    options: StepOptions,
    params: Any,
    frozen: Any,
    step: Int[Array, ""],
    key: PRNGKeyArray,
    batch: Batch,
) -> tuple[Float[Array, " b"], Float[Array, "b 2"], UInt8[Array, "b n height width"]]:
    """Loss of each clip, (sum of IoU, number of objects) of each, and the predicted masks.

    The loss is the mean over the current frames. `batch.packing` is that of this part alone.
    """
    if options.freeze_backbone:
        backbone = jax.lax.stop_gradient(params["deeplab"]["backbone"])
        params = params | {"deeplab": params["deeplab"] | {"backbone": backbone}}
    variables = {"params": params, "frozen": frozen}
    count, frames, height, width = batch.labels.shape
    size = (height, width)

    def embed(variables, frames, keys):  # of all clips
        images = prepare(frames, size, image_format)
        return model.apply(variables, images, keys, method=CFBI.embed)

    def segment(variables, packing, *arrays):
        num_rows = 1 + options.max_objects
        return model.apply(variables, *arrays, num_rows, packing, method=CFBI.segment)

    def kept(fn):
        return lambda turn, *arguments: (turn, fn(*arguments))

    embed = (_recomputed if options.remat == "all" else kept)(embed)
    segment = (kept if options.remat == "none" else _recomputed)(segment)
    turn = jnp.float32(0)

    # A clip's dropout depends on the step and the clip alone: not on how many devices there are.
    key = jax.random.fold_in(key, step)
    clip_keys = jax.vmap(partial(jax.random.fold_in, key))(batch.index)
    keys = jax.vmap(partial(jax.random.split, num=frames))(clip_keys).reshape(-1)
    turn, embedded = embed(turn, variables, batch.frames.reshape(-1, *size, 3), keys)
    embedding, low_level = (x.reshape(count, frames, *x.shape[1:]) for x in embedded)
    small = resize_labels(batch.labels, embedding.shape[2:4])
    ratio = mining_ratio(step, options.mining_step)

    losses, counts, predictions = 0.0, 0.0, []
    previous_label = small[:, PREVIOUS]
    if options.mask_errors:
        error_keys = jax.vmap(partial(jax.random.fold_in, data=frames))(clip_keys)
        share = jnp.where(step >= options.mask_errors_step, options.mask_errors, 0.0)
        of_clip = partial(with_error, share=share)
        previous_label = jax.vmap(of_clip)(previous_label, batch.num_objects, error_keys)
    for t in range(FIRST_CURRENT, frames):
        turn, logits = segment(
            turn,
            variables,
            batch.packing,
            embedding[:, REFERENCE, None],
            small[:, REFERENCE, None],
            jnp.ones(count, jnp.int32),
            embedding[:, t - 1],
            previous_label,
            embedding[:, t],
            low_level[:, t],
            batch.num_objects,
        )
        logits = jnp.moveaxis(resize(jnp.moveaxis(logits, 1, -1), size), -1, 1)
        logits = mask_padding(logits, batch.num_objects)
        truth = batch.labels[:, t]
        losses += bootstrapped_cross_entropy(logits, truth, ratio)
        prediction = jnp.argmax(logits, axis=1).astype(jnp.uint8)
        counts += _iou(prediction, truth, options.max_objects)
        predictions.append(prediction)
        predicted = resize_labels(prediction, embedding.shape[2:4])
        previous_label = jnp.where(step > options.sequential_step, predicted, small[:, t])
    return losses / (frames - FIRST_CURRENT), counts, jnp.stack(predictions, axis=1)


def _recomputed(fn: Callable) -> Callable:
    """`(turn, *arguments) -> (turn, fn(*arguments))`, whose backward pass starts from the arguments
    and keeps nothing else.

    Calls that hand on `turn`, a float32 scalar of no meaning, go backwards one after the other.
    In `jax.checkpoint` neither computing again waits for the gradient of the result, nor one call
    for another: the compiler may have all that is computed again exist at once.
    """

    @jax.custom_vjp
    def recomputed(turn, *arguments):
        return turn, fn(*arguments)

    def forward(turn, *arguments):
        return recomputed(turn, *arguments), arguments

    def backward(arguments, gradient):
        arguments, (turn, gradient) = jax.lax.optimization_barrier((arguments, gradient))
        # It is 0. What nothing is computed from would be removed.
        gradient = jax.tree.map(lambda x: x + turn.astype(x.dtype), gradient)
        gradients = jax.vjp(fn, *arguments)[1](gradient)
        return jax.lax.optimization_barrier((turn, *gradients))

    recomputed.defvjp(forward, backward)
    return recomputed


def _iou(prediction, truth, max_objects: int) -> Float[Array, "b 2"]:
    """(sum over the objects of intersection / union, number of objects that are in either)."""
    objects = jnp.arange(1, 1 + max_objects)
    known = (truth != IGNORED)[..., None]
    predicted = (prediction[..., None] == objects) & known
    true = truth[..., None] == objects
    intersection = jnp.sum(predicted & true, axis=(1, 2))
    union = jnp.sum(predicted | true, axis=(1, 2))
    iou = jnp.where(union > 0, intersection / jnp.maximum(union, 1), 0.0)
    return jnp.stack([jnp.sum(iou, axis=-1), jnp.sum(union > 0, axis=-1).astype(jnp.float32)], -1)
