"""ViGOS of Qwen2.5-VL-7B-Instruct on one card of 24 GB, as an L4 or RTX 4090: an nf4 base under the adapter.

    python -m vigos_jax.main --config configs/one_device_qwen2_5_vl_7b_24gb.py

Settings as `configs/one_device_qwen2_5_vl_3b_12gb.py` has them. The decoder's projections take 3.5 GB instead of 13.1.
Not evaluated. While decoding a GPU unpacks every nf4 weight for every token, 34 GB a token: `int8` decodes faster.

| `--mode plan`, GB at the peak of | encode | prefill | decode | gradient | of | a step, s at least |
|---|---|---|---|---|---|---|
| l4:1 | 8.7 | 11.8 | 14.3 | 9.9 | 22.7 | 92 |
"""

from ml_collections import ConfigDict

from configs.one_device_qwen2_5_vl_3b_12gb import on_one_device


def get_config() -> ConfigDict:
    return on_one_device("Qwen/Qwen2.5-VL-7B-Instruct", quantization="nf4", topology="l4:1")
