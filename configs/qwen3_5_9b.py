"""Qwen3.5-9B with the paper's settings, which the paper did not run on this family.

    python -m vigos_jax.main --config configs/qwen3_5_9b.py

9.4 B parameters. On eight H100s `--mode plan` finds a peak of 10.6 of 80 GB on each. Not evaluated.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    return of_the_paper("Qwen/Qwen3.5-9B")
