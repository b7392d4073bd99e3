"""tbd"""

from cfbi_jax.config import default_config, source


def get_config():
    config = default_config()
    config.model = dict(
        resnet_blocks=(1, 1, 1, 1),
        resnet_width=16,
        decoder_dim=64,
        embedding_dim=32,
        matching_dim=32,
        ensembler_dim=64,
        windows=(6, 1, 2, 3, 4, 5),
    )
    config.sources.synthetic = source(dataset="synthetic")
    config.clips.update(
        crop_size=81, short_edge=96, max_objects=2, min_object_pixels=20, min_reference_pixels=40
    )
    config.batch_size = 4
    config.num_train_steps = 900
    config.learning_rate = 0.02
    config.warmup_steps = 50
    config.workers = 0
    config.checkpoint_every_steps = 300
    config.eval_every_steps = 300
    config.picture_every_steps = 300
    config.data.dataset = "synthetic"
    config.overlays = True
    return config
