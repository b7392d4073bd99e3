"""Every field of the configuration, with its default. `configs/*.py` change what they need."""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cfbi_jax.inference.segmenter import Options


def default_config() -> ConfigDict:
    config = ConfigDict()
    # "eval": segment the videos of a data set, score them, pack the submission.
    config.mode = "eval"
    # Folder of the weights to evaluate (scripts/convert_weights.py makes one of official weights).
    config.checkpoint = ""
    # Evaluate random weights: to try the machinery, not the network.
    config.untrained = False
    config.seed = 0
    # The untrained network: fields of `cfbi_jax.models.cfbi.CFBI` that differ from its defaults.
    # A checkpoint carries its own.
    config.model = ConfigDict()

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

    # How videos are segmented: the fields of `cfbi_jax.inference.segmenter.Options`.
    config.inference = ConfigDict()
    for field in dataclasses.fields(Options):
        optional = field.default is None
        config.inference[field.name] = placeholder(int) if optional else field.default

    # Segment finished videos again, and replace results of other weights or options.
    config.overwrite = False
    # Also write a strip of a few frames with their masks for every video.
    config.overlays = False
    # Folder for compiled programs; "" turns it off. "default": ~/.cache/cfbi_jax.
    config.compilation_cache = "default"
    return config
