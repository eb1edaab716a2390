"""Qwen2.5-VL-32B-Instruct with the paper's settings, which the paper did not run at this size.

    python -m vigos_jax.main --config configs/qwen2_5_vl_32b.py

33.5 B parameters: 62 GiB in bfloat16, split over 8 devices. Not evaluated.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    config = of_the_paper("Qwen/Qwen2.5-VL-32B-Instruct")
    config.gradient_accumulation_steps = 4
    return config
