"""Ablation: no role scores reasoning and answer.

    python -m vigos_jax.main --config configs/no_reasoning.py

The paper's (3B): Overall 74.71 for 74.91, CV-Bench 90.37 for 91.51.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.roles.reasoning.weight = 0.0
    return config
