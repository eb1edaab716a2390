"""ViGOS of Qwen3-VL-2B-Instruct on one TPU v5e chip of 16 GB, as Colab has them: a bfloat16 base.

    python -m vigos_jax.main --config configs/one_device_qwen3_vl_2b_v5e.py

Settings as `configs/one_device_qwen2_5_vl_3b_12gb.py` has them, the base unquantised. Not evaluated.

| `--mode plan`, GB at the peak of | encode | prefill | decode | gradient | of | a step, s at least |
|---|---|---|---|---|---|---|
| v5e:1x1 | 6.0 | 9.7 | 11.1 | 6.6 | 16.9 | 11 |
"""

from ml_collections import ConfigDict

from configs.one_device_qwen2_5_vl_3b_12gb import on_one_device


def get_config() -> ConfigDict:
    return on_one_device("Qwen/Qwen3-VL-2B-Instruct", quantization="none", topology="v5e:1x1")
