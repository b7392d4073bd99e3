"""The configuration of a training run of seconds: `--config=tests/tiny_run.py`."""

from ml_collections import ConfigDict

from cfbi_jax.config import default_config, source

MODEL = dict(
    resnet_blocks=(1, 1, 1, 1),
    resnet_width=4,
    decoder_dim=16,
    embedding_dim=8,
    matching_dim=8,
    ensembler_dim=16,
    windows=(1,),
    head="feelvos",
)


def get_config() -> ConfigDict:
    """Eight steps, a checkpoint after every second one; with dropout and averaged weights."""
    config = default_config()
    config.mode = "train"
    config.model.update(MODEL)
    config.sources.drawn = source(dataset="synthetic")
    config.clips.update(
        # One object in every clip: one shape, one compilation.
        crop_size=33,
        short_edge=40,
        max_objects=1,
        num_current=1,
        min_object_pixels=5,
        min_reference_pixels=10,
    )
    config.batch_size = 2
    config.num_train_steps = 8
    config.learning_rate = 0.02
    config.warmup_steps = 2
    config.ema_decay = 0.9
    config.workers = 0
    config.log_every_steps = 1
    config.checkpoint_every_steps = 2
    config.keep_checkpoints = 10
    config.eval_every_steps = 4
    config.picture_every_steps = 4
    return config
