"""ViGOS of Qwen3.5-0.8B on one small device, a TPU v5e chip, T4 or L4 as Colab has them: a bfloat16 base.

    python -m vigos_jax.main --config configs/one_device_qwen3_5_0_8b.py

Settings as `configs/one_device_qwen2_5_vl_3b_12gb.py` has them, the base unquantised. Not evaluated.
A T4 has no bfloat16 units and computes in float32: expect several times the seconds below.

| `--mode plan`, GB at the peak of | encode | prefill | decode | gradient | of | a step, s at least |
|---|---|---|---|---|---|---|
| v5e:1x1 | 3.8 | 5.8 | 4.2 | 3.4 | 16.9 | 8 |
| t4:1 | 3.1 | 5.3 | 5.9 | 3.9 | 15.1 | 55 |
| l4:1 | 3.3 | 5.5 | 5.9 | 3.3 | 22.7 | 26 |
"""

from ml_collections import ConfigDict

from configs.one_device_qwen2_5_vl_3b_12gb import on_one_device


def get_config() -> ConfigDict:
    return on_one_device("Qwen/Qwen3.5-0.8B", quantization="none", topology="v5e:1x1")
