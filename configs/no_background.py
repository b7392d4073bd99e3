"""The paper's ablation without any background embedding (Table 4, first line), trained on DAVIS.

    python -m cfbi_jax.main --config=configs/no_background.py --workdir=OUT \\
        --config.data.root=DAVIS --config.init_from=deeplab_resnet101.pth

`configs/davis.py` without background maps and the previous frame's background embedding in
pixel-level matching, and without the background in the instance vectors.

Cost: as `configs/davis.py`. Result: paper, J&F on DAVIS 2017 validation 70.9 (74.9 with both); not
reproduced yet.
"""

from configs import davis


def get_config():
    config = davis.get_config()
    config.model.pixel_background = False
    config.model.instance_background = False
    return config
