"""The paper's run of Qwen2.5-VL-7B-Instruct (Tables A.IV and A.V): `configs/qwen2_5_vl_3b.py` with the larger model.

    python -m vigos_jax.main --config configs/qwen2_5_vl_7b.py

The paper reports, base to ViGOS: mean Avg@5 over eight benchmarks 45.38 to 50.99 (Pass@5 68.13 to 75.60), ViLP-F Score
42.00 to 62.67, and PALR of reasoning and answer 7.56 % where OPSD has 26.01 %. This repository has not run it.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    return of_the_paper("Qwen/Qwen2.5-VL-7B-Instruct")
