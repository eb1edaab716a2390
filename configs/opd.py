"""On-policy distillation (arXiv 2306.13649): a larger model scores what the student says; it is shown nothing more.

    python -m vigos_jax.main --config configs/opd.py

Qwen2.5-VL-7B-Instruct teaches the 3B by KL(student || teacher) over every token, with the ViGOS paper's data and
settings. The original work distils text models; no number for this pair is published. Not run.
"""

from ml_collections import ConfigDict

from configs import base, opsd
from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    config = of_the_paper("Qwen/Qwen2.5-VL-3B-Instruct")
    config.prompts = ConfigDict(
        {name: {"user": "{problem}\n" + opsd.TASK, "assistant_prefill": ""} for name in ("student", "larger")}
    )
    larger = base.role(
        ("completion",), "always", "reverse_kl", weight=1.0, clip=0.0, model="Qwen/Qwen2.5-VL-7B-Instruct"
    )
    config.roles = ConfigDict({"larger": larger})
    return config
