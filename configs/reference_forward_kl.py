"""Ablation: invalid rollouts are pulled towards the reference role by KL(teacher || student).

    python -m vigos_jax.main --config configs/reference_forward_kl.py

The paper's (3B): Overall 74.82 for 74.91, CV-Bench 90.86 for 91.51.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.roles.reference.divergence = "forward_kl"
    return config
