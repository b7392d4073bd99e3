"""The whole path in a minute or two on a laptop, on videos that it makes itself.

    python -m cfbi_jax.main --config=configs/quickstart.py --workdir=OUT

Makes two synthetic videos, segments them with a small UNTRAINED network of the same classes (only
widths and depths are smaller), and writes PNGs, overlay pictures, scores and the submission zip.
Result: the scores of random weights mean nothing; they show that every stage runs.
"""

from cfbi_jax.config import default_config


def get_config():
    config = default_config()
    config.untrained = True
    config.model = dict(
        resnet_blocks=(1, 1, 1, 1),
        resnet_width=16,
        decoder_dim=64,
        embedding_dim=32,
        matching_dim=32,
        ensembler_dim=64,
    )
    config.data.dataset = "synthetic"
    config.overlays = True
    return config
