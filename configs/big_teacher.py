"""ViGOS with larger teachers: its three roles as they are, read by Qwen2.5-VL-7B-Instruct for a 3B student.

    python -m vigos_jax.main --config configs/big_teacher.py

The paper's teachers are the student's own initial weights; whether larger ones are better has not been tried.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    config = of_the_paper("Qwen/Qwen2.5-VL-3B-Instruct")
    for role in config.roles.values():
        role.model = "Qwen/Qwen2.5-VL-7B-Instruct"
    return config
