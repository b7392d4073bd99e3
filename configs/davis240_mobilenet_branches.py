"""Last stages of `davis240_mobilenet.py`'s network: crops of 321 pixels, frames further apart.

    python -m cfbi_jax.main --config=configs/davis240_mobilenet_branches.py --workdir=OUT \
        --config.data.root=DAVIS240 --config.init_from=CKPT --config.mode=train
    python scripts/mean_of_checkpoints.py CKPT OUT/checkpoints/600 --output=MEAN
    python -m cfbi_jax.main --config=configs/davis240_mobilenet_branches.py --workdir=EVAL \
        --config.data.root=DAVIS240 --config.checkpoint=MEAN --config.mode=eval

To be run several times, from the weights of `davis240_mobilenet_larger.py` and then from means of
what came out, with another seed each time: "Further stages" in docs/real_video.md has the commands
and the scores. Frames are up to seven apart instead of three, and segmented at three scales.

Cost: 7 to 8.5 s per step of 2 clips on one core of an Intel Xeon, with other work beside, 70 to 86
minutes in all. Result: see there.
"""

from configs import davis240_mobilenet


def get_config():
    config = davis240_mobilenet.get_config()
    config.seed = 41  # not the clips of the stages before again
    config.clips.update(crop_size=321, short_edge=384, max_gap=7)
    config.sources.static.static_frames = 20  # slower clips of single pictures
    config.num_train_steps = 600
    config.learning_rate = 0.0005
    config.mask_errors_start = 0.0
    config.eval_every_steps = 600
    config.inference.scales = (1.25, 1.5, 1.75)
    return config
