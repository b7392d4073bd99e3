"""CFBI with ResNet-101 on YouTube-VOS 2018 or 2019 (the folder decides which).

    python -m cfbi_jax.main --config=configs/youtube_vos.py --workdir=OUT \
        --config.data.root=YOUTUBE_VOS --config.init_from=deeplab_resnet101.pth

Rate, batch and number of steps are the paper's (4 videos on each of 2 GPUs), as its figures are
what there is to compare with, and half of the memory; the released weights were made with
`--config.batch_size=16 --config.learning_rate=0.02`. The validation set has no
public truth: the last weights are evaluated, and OUT/submission.zip is for the server. To keep the
best by J&F, hold training videos out: `--config.data.split=train --config.data.sequences=A,B
--config.sources.youtube_vos.exclude=A,B --config.eval_every_steps=5000`.

Evaluates weights alone:

    python -m cfbi_jax.main --config=configs/youtube_vos.py --workdir=OUT --config.mode=eval \
        --config.checkpoint=CKPT --config.data.root=YOUTUBE_VOS

The network sees every fifth frame, as the data set has them; `--config.data.all_frames=True` runs
through all of them, which gives other scores. Multi-scale and flip as in the paper:
`--config.inference.scales="(1.0, 1.15, 1.3, 1.5)" --config.inference.flip=True`.

Cost: not measured whole; a step as in `configs/davis.py`. Result: paper, YouTube-VOS 2018
validation 81.4, multi-scale 82.7; not reproduced yet.
"""

from cfbi_jax.config import default_config, source


def get_config():
    config = default_config()
    config.data.dataset = "youtube_vos"
    config.data.split = "valid"
    config.sources.youtube_vos = source(
        dataset="youtube_vos", root=config.data.get_oneway_ref("root"), split="train"
    )
    config.eval_every_steps = 0
    return config
