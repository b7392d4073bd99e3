"""The baseline of Table 5 (line 6): FEELVOS' matching and head, none of CFBI's ingredients.

    python -m cfbi_jax.main --config=configs/feelvos_baseline.py --workdir=OUT \
        --config.data.root=DAVIS --config.init_from=deeplab_resnet101.pth

The single ablations of Tables 4 and 5 are one override of `configs/davis.py` each, or
`configs/no_background.py`; README lists them.

Cost: not measured. Result: paper, J&F on DAVIS 2017 validation 68.3; not reproduced yet.
"""

from configs import davis


def get_config():
    config = davis.get_config()
    config.model.update(
        pixel_background=False,
        instance_background=False,
        distance_bias=False,
        windows=(12,),
        instance_attention=False,
        head="feelvos",
    )
    config.sequential_start = 1.0
    config.clips.balanced_crop = False
    return config
