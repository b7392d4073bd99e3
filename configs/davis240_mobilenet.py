"""MobileNetV2 and a narrow head on DAVIS at 240 lines: the smallest real training, for CPUs.

    python -m cfbi_jax.main --config=configs/davis240_mobilenet.py --workdir=OUT \
        --config.init_from=mobilenet_v2_pascal_deeplabv3.npz --config.data.root=DAVIS240 \
        --config.mode=train
    python -m cfbi_jax.main --config=configs/davis240_mobilenet.py --workdir=EVAL \
        --config.data.root=DAVIS240 --config.checkpoint=OUT/checkpoints/2400 --config.mode=eval

(without `mode` it evaluates on the way, too, and then the best weights of those; the results below
are the last weights'). The data are DAVIS videos reduced to 240 lines in DAVIS' layout, resolution
folder `240p`; docs/real_video.md lists them and says where the weights are from. Decoder and
ensembler have half of their usual widths, the local windows half of their reach.

Settings for a short training, unlike the paper's: a frozen backbone, Adam, averaged weights, the
network's own masks from the second step on; half of the clips are made of single pictures, and half
of all videos get another one's objects pasted in, as 27 of the 28 have one object only. In the
second half of the steps half of the first previous masks have an error. docs/real_video.md says
why, and has the ablations.

Cost: 1.5 s per step of 2 clips on one core of an Intel Xeon, 63 minutes in all and 5 GB of memory.
Result, J&F on 8 validation sequences with 10 objects: 0.747 with seed 0, 0.715 with seed 1; on the
seven with one object (DAVIS 2016's masks) 0.821 and 0.798. Without errors
(`--config.mask_errors=0`) 0.672 and 0.632.
To beat (`scripts/baselines.py`): first mask repeated 0.333; nearest neighbours of pretrained
features at stride 8, one 0.590, ten 0.597.
"""

from cfbi_jax.config import default_config, source


def get_config():
    config = default_config()
    config.model.update(
        backbone="mobilenet_v2",
        decoder_dim=128,
        embedding_dim=64,
        ensembler_dim=128,
        windows=(6, 1, 2, 3, 4, 5),
    )
    config.data.resolution = "240p"
    for name, static in (("davis", False), ("static", True)):
        config.sources[name] = source(
            root=config.data.get_oneway_ref("root"),
            resolution=config.data.get_oneway_ref("resolution"),
            static=static,
            paste=0.5,
        )
    config.clips.update(
        crop_size=161,
        short_edge=192,
        max_objects=2,
        min_object_pixels=40,
        min_reference_pixels=80,
    )
    config.batch_size = 2
    config.num_train_steps = 2400
    config.optimizer = "adam"
    config.learning_rate = 0.001
    config.warmup_steps = 30
    config.freeze_backbone = True
    config.sequential_start = 0.0
    config.mask_errors = 0.5
    config.mask_errors_start = 0.5
    config.ema_decay = 0.99
    config.workers = 0
    config.checkpoint_every_steps = 200
    config.eval_every_steps = 800
    config.log_every_steps = 10
    config.picture_every_steps = 200
    return config
