"""CFBI on YouTube-VOS 2018 or 2019 validation (the folder decides which).

Evaluates weights: PNGs of the frames in `meta.json` and the zip for the server.

    python -m cfbi_jax.main --config=configs/youtube_vos.py --workdir=OUT --config.mode=eval \
        --config.checkpoint=CKPT --config.data.root=YOUTUBE_VOS

The network sees every fifth frame, as the data set has them; `--config.data.all_frames=True` runs
through all of them, which gives other scores. Held-out training videos have truth and are scored:
`--config.data.split=train --config.data.sequences=VIDEO,VIDEO`.
Multi-scale and flip as in the paper: `--config.inference.scales="(1.0, 1.15, 1.3, 1.5)"
--config.inference.flip=True`.

Result: paper, YouTube-VOS 2018 validation 81.4, multi-scale 82.7. Official weights are not part of
this repository: not measured.
"""

from cfbi_jax.config import default_config


def get_config():
    config = default_config()
    config.data.dataset = "youtube_vos"
    config.data.split = "valid"
    return config
