"""Every field of the configuration, with its default. `configs/*.py` change what they need."""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cfbi_jax.data.clips import ClipOptions
from cfbi_jax.inference.options import Options
from cfbi_jax.models.cfbi import CFBI, model_config


def default_config() -> ConfigDict:
    config = ConfigDict()
    # "train"; "eval": segment the videos of a data set, score them, pack the submission;
    # "train_and_eval": train, evaluate now and then, and at the end evaluate the best weights.
    config.mode = "train_and_eval"
    config.seed = 0
    # The network: the fields of `cfbi_jax.models.cfbi.CFBI`. A checkpoint to evaluate carries its
    # own, but for the types, which are those of `inference`.
    config.model = ConfigDict(
        {k: tuple(v) if isinstance(v, list) else v for k, v in model_config(CFBI()).items()}
    )
    # Folder for compiled programs; "" turns it off. "default": JAX' own if that is set
    # (JAX_COMPILATION_CACHE_DIR, or off by JAX_ENABLE_COMPILATION_CACHE=false), else
    # $XDG_CACHE_HOME/cfbi_jax, ~/.cache/cfbi_jax.
    config.compilation_cache = "default"

    # ---- Evaluation ----
    # Folder of the weights to evaluate (scripts/convert_weights.py makes one of official weights).
    config.checkpoint = ""
    # Evaluate random weights: to try the machinery, not the network.
    config.untrained = False

    # The data set to evaluate on.
    config.data = ConfigDict()
    # "davis", "youtube_vos", or "synthetic": videos that are made in the work directory.
    config.data.dataset = "davis"
    config.data.root = ""
    # DAVIS: 2016 (one object) or 2017.
    config.data.year = 2017
    # DAVIS: val, train, test-dev. YouTube-VOS: valid, test, or train for held-out videos.
    config.data.split = "val"
    # DAVIS: folder name below JPEGImages and Annotations.
    config.data.resolution = "480p"
    # Restrict to these, with commas: "blackswan,dog".
    config.data.sequences = ""
    # YouTube-VOS: run through all frames (30 per second) instead of every fifth. Other scores!
    config.data.all_frames = False

    # How videos are segmented: the fields of `cfbi_jax.inference.options.Options`.
    config.inference = ConfigDict()
    for field in dataclasses.fields(Options):
        optional = field.default is None
        config.inference[field.name] = placeholder(int) if optional else field.default

    # Segment finished videos again, and replace results of other weights or options.
    config.overwrite = False
    # Also write a strip of a few frames with their masks for every video.
    config.overlays = False

    # ---- Training: where from, how long (cfbi_jax/training) ----
    # "": random weights; a checkpoint folder; a backbone's .pth or .npz (`weights.initial`).
    config.init_from = ""
    # Give layers that `init_from` leaves random their scales from a few frames
    # (`weights.calibration`); of no effect where it covers all of DeepLab or is a checkpoint.
    config.calibrate = True
    # Clips of a step, over all devices and hosts.
    config.batch_size = 8
    config.num_train_steps = 100_000
    # Videos to train on, by any name; all of them make up an epoch.
    config.sources = ConfigDict()

    # How clips are drawn: the fields of `cfbi_jax.data.clips.ClipOptions`.
    config.clips = ConfigDict(dataclasses.asdict(ClipOptions()))
    # Where copies of the videos are kept as records; "": ~/.cache/cfbi_jax/records.
    config.records = ""
    # Processes that make clips (0: none but this one), and threads in each.
    config.workers = 2
    config.threads = 2

    # ---- Training: the optimiser and the loss ----
    # "sgd" (the paper's) or "adam", for short trainings; it wants a tenth of the rate.
    config.optimizer = "sgd"
    config.learning_rate = 0.01
    config.min_learning_rate = 1e-5
    config.warmup_steps = 1000
    config.momentum = 0.9
    config.weight_decay = 15e-5
    config.max_gradient_norm = 5.0
    # Train all but the backbone, which keeps the weights that it starts from.
    config.freeze_backbone = False
    # From this share of all steps on a frame's previous mask is the network's own; 1.0: never.
    config.sequential_start = 0.5
    # Share of the clips whose first previous mask gets an error (`training.mask_errors`).
    config.mask_errors = 0.0
    # From this share of all steps on.
    config.mask_errors_start = 0.0
    # At this share of all steps the loss has moved to the hardest pixels alone.
    config.mining_end = 0.5
    # Decay of the averaged weights, which are evaluated where they are kept; 0: none.
    config.ema_decay = 0.0
    # Cut each device's clips into this many parts, one after the other, to save memory.
    config.accumulate = 1
    # Compute again instead of keeping, to save memory: "none", "segment", "all".
    config.remat = "none"

    # ---- Training: what is kept and shown ----
    # The next three: 0 means at the last step only. Every evaluation comes with a checkpoint.
    config.checkpoint_every_steps = 1000
    config.eval_every_steps = 5000
    config.log_every_steps = 20
    # 0: never.
    config.picture_every_steps = 1000
    # Checkpoints of the last steps, beside the best one.
    config.keep_checkpoints = 3
    # Write a profile of a few steps from this one on; 0: never.
    config.profile_at_step = 0
    config.lock()  # a misspelt field in a file of configs/ is an error
    config.sources.unlock()
    return config


def source(**fields) -> ConfigDict:
    """Videos to train on: one of `config.sources`."""
    config = ConfigDict()
    # "davis", "youtube_vos" or "synthetic" (drawn on the fly, other ones in every epoch).
    config.dataset = "davis"
    config.root = ""
    config.year = 2017
    config.split = "train"
    config.resolution = "480p"
    # DAVIS: in place of "480p" take the full-resolution pictures where there are those of all
    # sequences.
    config.full_resolution = False
    # Only these, or all but these, with commas: "bear,dog".
    config.sequences = ""
    config.exclude = ""
    # How often every video comes in an epoch; 0: this source is not used.
    config.weight = 1
    # Take single pictures and their masks, and move them at random (pre-training).
    config.static = False
    # Frames of the videos made of them: with more the motion from one to the next is smaller.
    config.static_frames = 8
    # Paste another video's objects into this share of the videos (`data.pasted`).
    config.paste = 0.0
    # Of these, the share whose pasted objects are the video's own: two that look alike.
    config.paste_doubles = 0.25
    config.lock()
    config.update(fields)
    return config
