"""Pre-training on single pictures: each becomes a clip by moving picture and objects at random.

    python -m cfbi_jax.main --config=configs/static_pretraining.py --workdir=PRE \
        --config.data.root=DAVIS --config.init_from=deeplab_resnet101.pth
    python -m cfbi_jax.main --config=configs/davis.py --workdir=OUT \
        --config.data.root=DAVIS --config.init_from=PRE/best

Any folder in DAVIS' layout is a source of pictures; pictures of different sizes are sequences of
one frame each. Not part of the paper, which found it unnecessary; the field uses it where videos
are few. Cost and result: not measured.
"""

from configs import davis


def get_config():
    config = davis.get_config()
    config.sources.davis.static = True
    config.num_train_steps = 20_000
    return config
