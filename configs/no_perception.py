"""Ablation: no role scores the description.

    python -m vigos_jax.main --config configs/no_perception.py

The paper's (3B): Overall 74.81 for 74.91, ViLP 67.58 for 69.84.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.roles.perception.weight = 0.0
    return config
