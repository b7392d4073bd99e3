"""CFBI with ResNet-101 on DAVIS 2017: training on its 60 sequences, evaluation on validation.

    python -m cfbi_jax.main --config=configs/davis.py --workdir=OUT --config.data.root=DAVIS \
        --config.init_from=deeplab_resnet101.pth

Trains on the full-resolution pictures where the folder has them, as trainers of the authors' family
do, made small bicubically as theirs, that is without a low-pass filter: they are sharper than the
480p ones, which `--config.sources.davis.full_resolution=False` takes. Those decode faster: one core
makes 22 clips per second of 480 x 854 pictures, 6.4 of 1080 x 1920 and 1.9 of 2160 x 3840, so give
a fast GPU `--config.workers=8` or more. Rate and number of steps are the paper's (batch 6: 3 videos
on each of 2 GPUs), as its figures are what there is to compare with; a rate of 0.01 works, too,
the authors said later. The set is small and over-fits: the best weights by J&F are kept, which the
authors found around step 30,000. Half the batch costs 3 to 4 points unless the rate is halved and
the steps doubled, or `--config.accumulate=2` makes room for the whole one.

Evaluates weights alone (PNGs, the official tool's tables, the server's zip):

    python -m cfbi_jax.main --config=configs/davis.py --workdir=OUT --config.mode=eval \
        --config.checkpoint=CKPT --config.data.root=DAVIS

DAVIS 2016: `--config.data.year=2016`. test-dev: `--config.data.split=test-dev`. Multi-scale and
flip as in the paper: `--config.inference.scales="(2.0, 2.15, 2.3)" --config.inference.flip=True`.

Cost: not measured whole; with an earlier version a step of 8 clips of two objects took 0.21 s and
24 GiB (38 GiB while XLA tunes) on an NVIDIA H200 with `--config.model.compute_dtype=bfloat16`.
Result: paper, J&F on DAVIS 2017 validation 74.9 trained on DAVIS alone (81.9 with YouTube-VOS,
multi-scale 83.3); not reproduced yet.
"""

from cfbi_jax.config import default_config, source


def get_config():
    config = default_config()
    config.sources.davis = source(
        root=config.data.get_oneway_ref("root"),
        resolution=config.data.get_oneway_ref("resolution"),
        full_resolution=True,
    )
    config.batch_size = 6
    config.num_train_steps = 50_000
    config.learning_rate = 0.006
    return config
