"""`configs/youtube_vos.py` with MobileNetV2: 12.6 million weights instead of 66.

    python -m cfbi_jax.main --config=configs/youtube_vos_mobilenet.py --workdir=OUT \
        --config.init_from=mobilenet_v2.pth ...

The rest is as in `configs/youtube_vos.py`. Cost and result: not measured; the paper trains
ResNet-101 alone, and the authors' later MobileNetV2 weights are published without a recipe.
"""

from configs import youtube_vos


def get_config():
    config = youtube_vos.get_config()
    config.model.backbone = "mobilenet_v2"
    return config
