"""ViGOS of Qwen3.5-2B on one small device, a TPU v5e chip, T4 or L4 as Colab has them: a bfloat16 base.

    python -m vigos_jax.main --config configs/one_device_qwen3_5_2b.py

Settings as `configs/one_device_qwen2_5_vl_3b_12gb.py` has them, the base unquantised. Not evaluated.
A T4 has no bfloat16 units and computes in float32: expect several times the seconds below.

| `--mode plan`, GB at the peak of | encode | prefill | decode | gradient | of | a step, s at least |
|---|---|---|---|---|---|---|
| v5e:1x1 | 6.2 | 7.6 | 7.3 | 6.6 | 16.9 | 11 |
| t4:1 | 6.1 | 9.1 | 11.5 | 7.9 | 15.1 | 89 |
| l4:1 | 6.3 | 8.8 | 9.5 | 6.5 | 22.7 | 42 |
"""

from ml_collections import ConfigDict

from configs.one_device_qwen2_5_vl_3b_12gb import on_one_device


def get_config() -> ConfigDict:
    return on_one_device("Qwen/Qwen3.5-2B", quantization="none", topology="v5e:1x1")
