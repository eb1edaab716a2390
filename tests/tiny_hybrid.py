"""The tiny random model of `tiny` with layers whose state flows along the sequence: same ids, same images."""

import dataclasses
import functools

import jax
import tiny

from vigos_jax.method.packing import Buckets
from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.delta_config import DeltaConfig
from vigos_jax.models.vlm import VisionLanguageModel

# Every size that a mesh axis may split is a multiple of 8. Two groups of a linear and a full layer.
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    family="qwen3_5",
    num_layers=4,
    head_dim=16,
    mrope_section=(2, 1, 1),
    mrope_interleaved=True,
    qkv_bias=False,
    qk_norm=True,
    norm_offset=1.0,
    attention_gate=True,
    layer_pattern=("linear", "full"),
    delta=DeltaConfig(key_heads=4, value_heads=8, key_dim=8, value_dim=4, conv_width=4),
    vision=VisionConfig(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=32, patch_size=4, num_positions=16
    ),
)
LORA = dataclasses.replace(tiny.LORA, language=tiny.LORA.language | {"in_proj_qkv", "in_proj_z", "out_proj"})
MODEL = VisionLanguageModel(CONFIG, lora=LORA)
BUCKETS = Buckets(patches=(64,), prompt=(40,), completion=(16,), sequence=(64, 384))


def random_variables(config: ModelConfig = CONFIG, *, seed: int = 0, adapter: float = 0.3) -> dict:
    """As `tiny.random_variables`; states last for some 20 tokens, and so tell branches apart."""

    def change(path, x):
        name = jax.tree_util.keystr(path)
        has_offset = "scale" in name and "visual" not in name and "gated_norm" not in name
        return x - 3 if "dt_bias" in name else x - config.norm_offset if has_offset else x

    model = VisionLanguageModel(config, lora=LORA)
    return jax.tree_util.tree_map_with_path(change, tiny.random_variables(model, seed=seed, adapter=adapter))


@functools.cache
def weights(adapter: float = 0.3) -> tuple:
    """(base, lora) of `MODEL`."""
    v = random_variables(adapter=adapter)
    return v["params"], v["lora"]
