"""Qwen3.5-27B with the paper's settings, which the paper did not run on this family.

    python -m vigos_jax.main --config configs/qwen3_5_27b.py

27.4 B parameters: 51 GiB in bfloat16, split over 8 devices. Not evaluated.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    return of_the_paper("Qwen/Qwen3.5-27B")
