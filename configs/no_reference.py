"""Ablation: no reference role; the two segment teachers both score every token of an invalid rollout.

    python -m vigos_jax.main --config configs/no_reference.py

The paper's (3B): Overall 73.60 for 74.91, ViLP 63.25 for 69.84: the format is lost more often.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    del config.roles.reference
    # An invalid rollout has no parts, so whoever applies to it scores all of it.
    config.roles.perception.when = "always"
    config.roles.reasoning.when = "always"
    return config
