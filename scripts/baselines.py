"""Masks that a trained network has to beat, without any training on videos.

    python scripts/baselines.py --method first-mask --root DAVIS --output OUT
    python scripts/baselines.py --method nearest --root DAVIS --output OUT \\
        --backbone mobilenet_v2.npz [--stride 8] [--neighbours 10]

`first-mask` repeats the first mask. `nearest` gives every pixel of a frame's features the labels of
its nearest neighbours among those of the first frame; no head of the network is used. The features
are the pixel embedding of `--checkpoint`, that of the untrained network of `--config`
(`--calibrated`: as a training starts), or those of block 13 of the MobileNetV2 in `--backbone`, of
length one.

Writes OUT/Annotations/<sequence>/*.png and, where there is truth, the CSV tables of the official
DAVIS tool, and prints the scores. Bad input gives a message and exit status 1.
"""

import argparse
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from cfbi_jax import evaluate, locks
from cfbi_jax.compilation import use_compilation_cache
from cfbi_jax.data import davis
from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.data.image_files import ids_in, read_frame
from cfbi_jax.data.prefetch import prefetch
from cfbi_jax.data.videos import EvaluationVideo, check_videos, read_given, split_names
from cfbi_jax.evaluation import report
from cfbi_jax.files import check_writable, path_of
from cfbi_jax.inference.dataset import results_folder
from cfbi_jax.inference.video import MaskWriter
from cfbi_jax.models.cfbi import CFBI, build_model
from cfbi_jax.models.images import network_size, prepare
from cfbi_jax.models.mobilenet_v2 import MobileNetV2
from cfbi_jax.models.resizing import interpolation_matrix, resize
from cfbi_jax.training import preparation
from cfbi_jax.weights.checkpoint import Checkpoint, load_checkpoint
from cfbi_jax.weights.initial import initial_checkpoint

BACKBONE_BLOCK = "block13"
QUERY_CHUNK = 1024  # bounds the memory of the distances
LOCK = "baselines.lock"  # in the output folder

# An RGB frame's features; the first pixel is at the frame's first pixel, the last at its last.
Features = Callable[[UInt8[np.ndarray, "height width 3"]], Float[Array, "h w c"]]


def nearest_labels(
    frames: Iterator[UInt8[np.ndarray, "height width 3"]],
    mask: UInt8[np.ndarray, "height width"],
    features: Features,
    neighbours: int,
) -> Iterator[UInt8[np.ndarray, "height width"]]:
    """The label of every frame; `mask` is the first one's, and its label."""
    ids = np.union1d(0, ids_in(mask)).astype(np.uint8)
    one_hot = jnp.asarray(mask[..., None] == ids, jnp.float32)
    reference = label = None
    for frame in frames:
        query = features(frame)
        if reference is None:
            reference, label = query, shrink(one_hot, query.shape[:2])
            yield mask
            continue
        rows = np.asarray(propagate(query, reference, label, neighbours, mask.shape))
        yield ids[rows]


@partial(jax.jit, static_argnames=("neighbours", "size"))
def propagate(
    query: Float[Array, "h w c"],
    reference: Float[Array, "h w c"],
    label: Float[Array, "h w rows"],
    neighbours: int,
    size: tuple[int, int],
) -> UInt8[Array, "height width"]:
    """The most likely row at `size`, for the query of a frame."""
    channels, rows = query.shape[-1], label.shape[-1]
    votes = vote(
        query.reshape(-1, channels),
        reference.reshape(-1, channels),
        label.reshape(-1, rows),
        neighbours,
    )
    probabilities = resize(votes.reshape(1, *query.shape[:2], rows), size)[0]
    return jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)


def vote(
    query: Float[Array, "q c"],
    reference: Float[Array, "p c"],
    label: Float[Array, "p rows"],
    neighbours: int,
) -> Float[Array, "q rows"]:
    """The mean label of every query's nearest reference pixels, of all where there are fewer."""
    neighbours = min(neighbours, len(reference))
    squared_norm = jnp.sum(jnp.square(reference), axis=-1)

    def one(query: Float[Array, " c"]) -> Float[Array, " rows"]:
        # Less |query|^2, in which the reference pixels do not differ.
        squared = squared_norm - 2 * jnp.matmul(reference, query, precision="highest")
        _, nearest = jax.lax.top_k(-squared, neighbours)
        return jnp.mean(label[nearest], axis=0)

    return jax.lax.map(one, query, batch_size=QUERY_CHUNK)


def shrink(x: Float[Array, "height width rows"], size: tuple[int, int]) -> Float[Array, "h w rows"]:
    """Averages around the pixels of a smaller map: each of them over those that it is spread to by
    the bilinear enlargement."""
    rows, columns = (
        interpolation_matrix(small, large, "bilinear", align_corners=True)
        for small, large in zip(size, x.shape[:2], strict=True)
    )
    return jnp.einsum(
        "ih,jw,ijr->hwr", rows / rows.sum(axis=0), columns / columns.sum(axis=0), x,
        precision="highest",
    )  # fmt: skip


# -------------------------------------------------------------------------------------- features


def embedding_features(checkpoint: Checkpoint) -> Features:
    """The network's pixel embedding, at stride 4."""

    @jax.jit
    def features(variables, frame):
        size = network_size(frame.shape[:2])
        image = prepare(frame[None], size, checkpoint.image_format)
        return checkpoint.model.apply(variables, image, method=CFBI.embed)[0][0]

    return partial(features, checkpoint.variables)


def backbone_features(checkpoint: Checkpoint, stride: int) -> Features:
    """Those of `BACKBONE_BLOCK` of the network's MobileNetV2, of length one, at `stride`."""
    backbone = MobileNetV2(output_stride=stride)

    @jax.jit
    def features(variables, frame):
        size = network_size(frame.shape[:2])
        image = prepare(frame[None], size, checkpoint.image_format)
        _, state = backbone.apply(
            variables,
            image,
            capture_intermediates=lambda module, _: module.name == BACKBONE_BLOCK,
            mutable=["intermediates"],
        )
        x = state["intermediates"][BACKBONE_BLOCK]["__call__"][0][0]
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    variables = {k: v["deeplab"]["backbone"] for k, v in checkpoint.variables.items()}
    return partial(features, variables)


def load_features(arguments: argparse.Namespace) -> Features:
    use_compilation_cache()
    if arguments.checkpoint:
        return embedding_features(load_checkpoint(arguments.checkpoint))
    if arguments.backbone:
        model = CFBI(backbone="mobilenet_v2")
        checkpoint = initial_checkpoint(model, str(arguments.backbone), seed=0)
        return backbone_features(checkpoint, arguments.stride or 8)
    content = runpy.run_path(str(arguments.config))
    if "get_config" not in content:
        raise ValueError(f"{arguments.config}: no get_config(); expected a file like configs/*.py")
    config = content["get_config"]()
    config.seed, config.calibrate = arguments.seed or 0, True
    config.data.update(root=str(arguments.root), resolution=arguments.resolution)
    model = build_model(config.model.to_dict())
    if not arguments.calibrated:
        return embedding_features(initial_checkpoint(model, config.init_from, config.seed))
    sources = preparation.used_sources(config)
    clips = preparation.training_clips(config, sources, ClipOptions(**config.clips))
    return embedding_features(preparation.first_weights(config, model, clips))


# --------------------------------------------------------------------------------- a data set


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", required=True, choices=("first-mask", "nearest"))
    parser.add_argument("--root", required=True, type=path_of, help="folder of the data set")
    parser.add_argument("--output", required=True, type=path_of, help="folder of masks and tables")
    parser.add_argument("--year", type=int, default=2017, choices=(2016, 2017))
    parser.add_argument("--split", default="val")
    parser.add_argument("--resolution", default="480p", help="folder under JPEGImages")
    parser.add_argument("--sequences", type=split_names, help="only these: blackswan,dog")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=path_of, help="nearest: a trained network's embedding")
    source.add_argument("--config", type=path_of, help="nearest: an untrained network's embedding")
    source.add_argument("--backbone", type=path_of, help="nearest: a MobileNetV2 (.npz or .pth)")
    parser.add_argument("--seed", type=int, help="--config: of the untrained network; default: 0")
    parser.add_argument(
        "--calibrated", action="store_true", help="--config: with scales from a few frames"
    )
    parser.add_argument(
        "--stride", type=int, choices=(8, 16), help="--backbone: of its features; default: 8"
    )
    parser.add_argument("--neighbours", type=int, help="nearest: how many; default: 1")
    found = parser.parse_args(arguments)
    has_source = bool(found.checkpoint or found.config or found.backbone)
    if has_source != (found.method == "nearest"):
        parser.error("--method nearest, and no other, takes --checkpoint, --config or --backbone")
    for name, needs in (("seed", "config"), ("calibrated", "config"), ("stride", "backbone")):
        if getattr(found, name) not in (None, False) and not getattr(found, needs):
            parser.error(f"--{name} is for --{needs}")
    if found.neighbours is not None and found.method != "nearest":
        parser.error("--neighbours is for --method nearest")
    if found.sequences is not None and not found.sequences:
        parser.error("--sequences names no sequence")
    if found.neighbours is not None and found.neighbours < 1:
        parser.error(f"--neighbours is {found.neighbours}; expected 1 or more")
    return found


def video_labels(
    video: EvaluationVideo, features: Features | None, neighbours: int
) -> Iterator[UInt8[np.ndarray, "height width"]]:
    """The label of every frame; without features the first mask again and again."""
    mask = read_given(video, 0)
    if features is None:
        return (mask for _ in video.frames)
    frames = prefetch(read_frame(path) for path in video.frames)
    return nearest_labels(frames, mask, features, neighbours)


def write_and_score(
    arguments: argparse.Namespace, videos: list[EvaluationVideo], features: Features | None
) -> dict[str, float]:
    """Masks and tables of all videos; returns the means, where there is truth."""
    output = arguments.output
    results = results_folder(output)
    for split in (arguments.split, report.subset_name(arguments.split)):
        report.remove_tables(output, split)  # of the masks that go
    for video in videos:
        with MaskWriter() as writer:
            labels = video_labels(video, features, arguments.neighbours or 1)
            for path, label in zip(video.frames, labels, strict=True):
                writer.write(results / video.name / f"{path.stem}.png", label)
        print(f"{video.name}: {len(video.frames)} frames", flush=True)
    data = ConfigDict(
        {
            "dataset": "davis",
            "root": str(arguments.root),
            "year": arguments.year,
            "split": arguments.split,
            "resolution": arguments.resolution,
            "sequences": arguments.sequences,
        }
    )
    return evaluate.summary(evaluate.score(data, videos, results, output))


def main(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if (output / "segmented").exists():
        raise ValueError(f"{output}: holds the results of a network; expected another --output")
    videos = davis.evaluation_videos(
        arguments.root, arguments.year, arguments.split, arguments.resolution, arguments.sequences
    )
    check_videos(videos)
    evaluate.check_apart(videos, output)
    features = load_features(arguments) if arguments.method == "nearest" else None
    check_writable(output)
    with open(output / LOCK, "a") as lock:
        if not locks.take(lock):
            raise ValueError(f"{output}: another process writes there; expected another --output")
        means = write_and_score(arguments, videos, features)
    if means:
        print("  ".join(f"{name} {value:.4f}" for name, value in means.items()))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("cfbi_jax").setLevel(logging.INFO)
    try:
        main(parse_arguments())
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
