"""ViGOS of Qwen3.5-2B on one small device, meant for a TPU v5e chip as Colab has them: a bfloat16 base.

    python -m vigos_jax.main --config configs/one_device_qwen3_5_2b.py

Settings as `configs/one_device_qwen2_5_vl_3b_12gb.py` has them, the base unquantised. Not evaluated, and
not compiled yet: see `--mode plan`.
"""

from ml_collections import ConfigDict

from configs.one_device_qwen2_5_vl_3b_12gb import on_one_device


def get_config() -> ConfigDict:
    return on_one_device("Qwen/Qwen3.5-2B", quantization="none", topology="v5e:1x1")
