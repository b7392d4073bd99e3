"""CFBI on DAVIS 2017 validation (or 2016, test-dev, any folder of that layout).

Evaluates weights: PNGs, the official tool's CSV tables and the zip for the server.

    python -m cfbi_jax.main --config=configs/davis.py --workdir=OUT --config.mode=eval \
        --config.checkpoint=CKPT --config.data.root=DAVIS

DAVIS 2016: `--config.data.year=2016`. test-dev: `--config.data.split=test-dev`.
Multi-scale and flip as in the paper: `--config.inference.scales="(2.0, 2.15, 2.3)"
--config.inference.flip=True`.

Result: paper, J&F on DAVIS 2017 validation with YouTube-VOS in training 81.9, multi-scale 83.3;
trained on DAVIS alone 74.9. Official weights are not part of this repository: not measured.
"""

from cfbi_jax.config import default_config


def get_config():
    return default_config()
