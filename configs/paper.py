"""ViGOS as the paper states it (Section 4, equations 18-21): `configs/base.py` with its clip.

    python -m vigos_jax.main --config configs/paper.py

Three roles on the student's own prefix, weights 1, 1, 2, each token's divergence clipped at 0.05 after the sum over
the vocabulary. What `configs/base.py` leaves out for the demo's sake, and what the other configs of the paper start
from. Its numbers are checked token by token in tests/test_goldens.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    for role in config.roles.values():
        role.clip = 0.05
    return config
