"""Evaluation from start to end: weights and a data set in; PNGs, scores and a zip out.

OUT/Annotations/<video>/00000.png      masks, indexed, at the video's size
OUT/submission.zip                     what the data set's server expects, of all its videos
OUT/*_results-<split>.csv              the official tool's tables, where there is truth
OUT/overlays/<video>.png               with --config.overlays=True
"""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from cfbi_jax.compilation import use_compilation_cache
from cfbi_jax.config import default_config
from cfbi_jax.data import davis, synthetic, youtube_vos
from cfbi_jax.data.image_files import ids_in
from cfbi_jax.data.sources import DATASETS
from cfbi_jax.data.videos import (
    EvaluationVideo,
    check_videos,
    in_threads,
    read_given,
    read_label,
    split_names,
)
from cfbi_jax.evaluation import davis as davis_scores
from cfbi_jax.evaluation import report
from cfbi_jax.evaluation import youtube_vos as youtube_vos_scores
from cfbi_jax.evaluation.submission import write_zip
from cfbi_jax.files import check_writable
from cfbi_jax.inference import dataset
from cfbi_jax.inference.options import BOUNDS, Options
from cfbi_jax.inference.segmenter import VideoSegmenter
from cfbi_jax.models.cfbi import build_model, initial_variables, model_config
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.weights.checkpoint import Checkpoint, digest, load_checkpoint

LOGGER = logging.getLogger(__name__)

SYNTHETIC_SEEDS = tuple(range(8))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that was read and checked before the work begins."""

    data: ConfigDict
    videos: list[EvaluationVideo]
    segmenter: VideoSegmenter
    made_by: dict
    workdir: Path
    overwrite: bool
    overlays: bool


def videos_of(config: ConfigDict) -> list[EvaluationVideo]:
    """The videos of an evaluation, none of them opened; no synthetic ones, which are still to be
    drawn. Errors: ValueError or OSError, also for options of inference out of their range."""
    Options(**config.inference)
    return [] if config.data.dataset == "synthetic" else _videos(config.data)


def prepare(config: ConfigDict, workdir: Path, checkpoint: Checkpoint | None = None) -> Evaluation:
    """Reads and checks all inputs. Raises ValueError or OSError, with what to do, for bad ones.

    `checkpoint` replaces the one that the configuration names.
    """
    for folder in (workdir, dataset.results_folder(workdir), workdir / "segmented"):
        check_writable(folder)
    options = Options(**config.inference)
    if checkpoint is None:
        _check_named_weights(config)
    data = config.data.copy_and_resolve_references()
    if data.dataset == "synthetic":
        data.root = str(workdir / "synthetic")
        synthetic.write_davis(data.root, SYNTHETIC_SEEDS, data.split, data.year, data.resolution)
    videos = _videos(data)
    check_videos(videos, options.max_objects)
    for video in videos:
        options.check_reference_count(len(video.given), video.name)
    _read_truth(videos)
    check_apart(videos, workdir)
    LOGGER.info(
        "%d videos, %d frames of %s%s",
        len(videos),
        sum(len(video.frames) for video in videos),
        data.root,
        " (all frames, not every fifth)" if data.all_frames else "",
    )

    use_compilation_cache(config.compilation_cache)
    checkpoint = checkpoint or _weights(config)
    made_by = {
        "weights": digest(checkpoint.variables),
        "model": model_config(checkpoint.model),
        "image_format": dataclasses.asdict(checkpoint.image_format),
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in BOUNDS},
        "data": {key: data[key] for key in ("dataset", "year", "resolution", "all_frames")},
    }
    if not config.overwrite:
        dataset.check_made_by(videos, workdir, made_by)
    segmenter = VideoSegmenter.from_loaded(checkpoint, options)
    return Evaluation(data, videos, segmenter, made_by, workdir, config.overwrite, config.overlays)


def _read_truth(videos: list[EvaluationVideo]) -> None:
    """Reads the true masks, of which `check_videos` sees the header and the end, to find damaged
    ones early. Warns of objects that are given nowhere. Errors: those of `read_mask`."""
    truth = [(video, path) for video in videos for path in video.truth.values()]
    shown: dict[str, set[int]] = {}
    for (video, _), ids in zip(truth, in_threads(_true_ids, truth), strict=True):
        shown.setdefault(video.name, set()).update(ids)
    for video in videos:
        if video.reading == "void_255":  # YouTube-VOS says which object comes when
            given = ids_in(read_given(video, 0)).tolist()
            late = sorted(shown.get(video.name, set()) - set(given))
            if late:
                LOGGER.warning(
                    "%s: objects %s are not in the first mask, so they are neither given nor "
                    "scored; expected the layout of YouTube-VOS for objects that come later",
                    *(video.name, ", ".join(map(str, late))),
                )


def _true_ids(truth: tuple[EvaluationVideo, Path]) -> list[int]:
    video, path = truth
    return ids_in(read_label(video, path, refuse_shades=False)).tolist()


def check_apart(videos: list[EvaluationVideo], workdir: Path) -> None:
    """Raises ValueError where masks would be written over the data set's own files."""
    results = dataset.results_folder(workdir).resolve()
    inputs = ((*v.frames, *v.given.values(), *v.truth.values()) for v in videos)
    for folder in {path.parent for paths in inputs for path in paths}:
        if folder.resolve().is_relative_to(results):
            raise ValueError(
                f"{workdir}: the data set's files in {folder} are where masks would be written; "
                "expected another folder for the results"
            )


def use_weights(evaluation: Evaluation, variables: dict) -> Evaluation:
    """The same evaluation of other weights, in place of the old results; compiles nothing anew.

    Both have the same segmenter: the evaluation before is not to be run any more.
    """
    variables = jax.tree.map(np.asarray, variables)  # a training's are on all its devices
    evaluation.segmenter.programs.use(variables)
    made_by = evaluation.made_by | {"weights": digest(variables)}
    return dataclasses.replace(evaluation, made_by=made_by, overwrite=True)


def run(evaluation: Evaluation, on_the_way: bool = False) -> report.Scores | None:
    """Segments what is not finished; whoever finishes the last video scores and packs all.

    Returns the scores, where there is truth and this process finished the last video. `on_the_way`:
    tables are written, but not shown, and nothing is packed.
    """
    workdir, videos, made_by = evaluation.workdir, evaluation.videos, evaluation.made_by
    archive = workdir / "submission.zip"
    if evaluation.overwrite or not all(
        dataset.is_finished(video, workdir, made_by) for video in videos
    ):
        # They are of other masks than those to come, also where only some are done again.
        report.remove_tables(workdir, evaluation.data.split)
        report.remove_tables(workdir, report.subset_name(evaluation.data.split))
        archive.unlink(missing_ok=True)
    done = dataset.segment_videos(
        evaluation.segmenter,
        videos,
        workdir,
        made_by,
        evaluation.overwrite,
        evaluation.overlays,
    )
    if done:
        frames = sum(video.frames for video in done)
        seconds = sum(video.seconds for video in done)
        compute = sum(video.compute_seconds for video in done)
        LOGGER.info(
            "%d frames in %.1f s: %.2f per second with decoding and writing, %.2f without; "
            "%d compilations",
            frames,
            seconds,
            frames / seconds,
            frames / compute,
            evaluation.segmenter.programs.num_compilations,
        )
    left = dataset.unfinished(videos, workdir)
    if left:
        LOGGER.info(
            "other processes still work on %s; the last one scores (if none does, repeat the "
            "command)",
            ", ".join(left),
        )
        return None

    # Another process, with other weights or options, may have done some since the first look.
    dataset.check_made_by(videos, workdir, made_by)
    results = dataset.results_folder(workdir)
    if not on_the_way:
        if evaluation.data.sequences:
            LOGGER.info("no %s: config.data.sequences names some videos only", archive)
        else:
            layout = "youtube_vos" if evaluation.data.dataset == "youtube_vos" else "davis"
            write_zip(results, archive, layout, [video.name for video in videos])
            LOGGER.info("wrote %s", archive)
        if evaluation.overlays:
            LOGGER.info("pictures of the masks: %s", workdir / "overlays")
    return score(evaluation.data, videos, results, workdir, show=not on_the_way)


def score(
    data: ConfigDict,
    videos: list[EvaluationVideo],
    results: Path,
    output: Path,
    show: bool = True,
) -> report.Scores | None:
    """Writes the tables where the data set has truth, and shows them. Those of some videos only
    (`data.sequences`, or because others have no frame that counts) are called so."""
    split = report.subset_name(data.split) if data.sequences else data.split
    report.remove_tables(output, split)
    without = [video.name for video in videos if not video.truth]
    if without:
        LOGGER.info("no true masks of %s: not scored", _some(without, len(videos)))
        return None
    names = [video.name for video in videos]
    if data.dataset == "youtube_vos":
        try:
            scores = youtube_vos_scores.score_youtube_vos(data.root, results, data.split, names)
        except youtube_vos_scores.NothingToScore as error:
            LOGGER.warning("%s: not scored", error)
            return None
    else:
        short = [video.name for video in videos if len(video.frames) < davis_scores.MIN_FRAMES]
        if short:
            LOGGER.warning("first and last frames are not scored: %s left out", ", ".join(short))
            names = [name for name in names if name not in short]
            split = report.subset_name(data.split)
        if not names:
            return None
        scores = davis_scores.score_davis(
            data.root, results, data.year, data.split, data.resolution, names
        )
    for path in report.write_tables(scores, output, split):
        LOGGER.info("wrote %s", path)
    if show:
        report.show(scores, split)  # last: a reader may close the pipe
    return scores


def summary(scores: report.Scores | None) -> dict[str, float]:
    """The means as one line says them; nothing where there is no truth."""
    if scores is None:
        return {}
    if isinstance(scores, youtube_vos_scores.Scores):
        return {"J&F": scores.overall}
    return {"J&F": scores.j_and_f, "J": scores.region.mean, "F": scores.boundary.mean}


def _some(names: list[str], of: int) -> str:
    if len(names) == of:
        return f"any of the {of} videos"
    return f"{len(names)} of {of} videos ({', '.join(names[:5])})"


def _videos(data: ConfigDict) -> list[EvaluationVideo]:
    if data.dataset not in DATASETS:
        raise ValueError(f'config.data.dataset is "{data.dataset}"; expected one of {DATASETS}')
    if not data.root:
        raise ValueError("config.data.root is empty; expected the folder of the data set")
    if data.all_frames and data.dataset != "youtube_vos":
        raise ValueError(
            f"config.data.all_frames is for YouTube-VOS; {data.dataset} has masks for all frames"
        )
    if data.dataset == "youtube_vos":
        usual = default_config().data
        for name in ("year", "resolution"):
            if data[name] != usual[name]:
                raise ValueError(
                    f"config.data.{name} is {data[name]!r}, which is for DAVIS; expected "
                    f"{usual[name]!r}, the default (config.data.root has one edition)"
                )
    names = split_names(data.sequences) or None
    if data.sequences and not names:
        raise ValueError(f"config.data.sequences is {data.sequences!r}; expected names")
    if data.dataset == "youtube_vos":
        return youtube_vos.evaluation_videos(data.root, data.split, data.all_frames, names)
    return davis.evaluation_videos(data.root, data.year, data.split, data.resolution, names)


def _check_named_weights(config: ConfigDict) -> None:
    if not config.checkpoint and not config.untrained:
        raise ValueError(
            "config.checkpoint is empty; expected a checkpoint folder (config.untrained=True runs "
            "with random weights)"
        )
    if config.checkpoint and not Path(config.checkpoint).exists():
        raise FileNotFoundError(f"no such checkpoint folder: {config.checkpoint}")


def _weights(config: ConfigDict) -> Checkpoint:
    if config.checkpoint:
        return load_checkpoint(config.checkpoint)
    LOGGER.warning("UNTRAINED network: random weights, so the masks and scores mean nothing")
    model = build_model(config.model.to_dict())
    return Checkpoint(model, initial_variables(model, config.seed), IMAGENET_FORMAT)
