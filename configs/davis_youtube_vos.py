"""CFBI with ResNet-101 on DAVIS 2017 and YouTube-VOS together ("(Y)" in the paper's tables).

    python -m cfbi_jax.main --config=configs/davis_youtube_vos.py --workdir=OUT \
        --config.data.root=DAVIS --config.sources.youtube_vos.root=YOUTUBE_VOS \
        --config.init_from=deeplab_resnet101.pth

Every DAVIS video comes 30 times in an epoch: 1,800 clips beside 3,471. The paper does not say with
which rate, batch and number of steps; here they are those that it has for YouTube-VOS, two thirds
of the clips. Evaluates on DAVIS 2017 validation.

Cost: not measured whole; a step as in `configs/davis.py`. Result: paper, J&F on DAVIS 2017
validation 81.9; not reproduced yet.
"""

from cfbi_jax.config import source
from configs import davis


def get_config():
    config = davis.get_config()
    config.sources.davis.weight = 30
    config.sources.youtube_vos = source(dataset="youtube_vos", split="train")
    config.batch_size = 8
    config.num_train_steps = 100_000
    config.learning_rate = 0.01
    return config
