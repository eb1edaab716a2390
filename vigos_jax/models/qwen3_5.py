"""Qwen3.5: Qwen3-VL's vision tower without DeepStack, and a decoder of gated delta rule and gated attention layers.

The decoder is `hybrid.hybrid_layers`; here are the names of the family's tensors.
"""

import dataclasses

from vigos_jax.models.config import ModelConfig
from vigos_jax.models.delta_config import FULL
from vigos_jax.models.qwen3_vl import tower_tensors
from vigos_jax.models.tensor_names import Path, Tensor, around_layers, dense, full_layer, layer_norms, mlp

CARRIED = ("mtp.",)  # layers that predict further tokens: no role runs them


def tensors(config: ModelConfig) -> list[Tensor]:
    """The published layout, in file order, but for `lm_head`."""
    name, step = "model.language_model", len(config.layer_pattern)
    layers = []
    for j, kind in enumerate(config.layer_pattern):
        path, file = ("layers", f"{kind}_{j}"), f"{name}.layers.{{i}}"
        rows = full_layer(config, path, file, config.groups) if kind == FULL else _linear(path, file, config.groups)
        layers += [dataclasses.replace(row, first=j, step=step) for row in rows]
    return tower_tensors(config) + around_layers(layers, name)


def _linear(path: Path, name: str, layers: int) -> list[Tensor]:
    """A gated delta rule layer's tensors."""
    mixer, file = (*path, "mixer"), f"{name}.linear_attn"
    rows = layer_norms(path, name, layers)
    rows += [Tensor((*mixer, part), f"{file}.{part}", layers) for part in ("A_log", "dt_bias")]
    rows.append(Tensor((*mixer, "conv"), f"{file}.conv1d.weight", layers, "depthwise"))
    rows.append(Tensor((*mixer, "gated_norm", "scale"), f"{file}.norm.weight", layers))
    for part in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
        rows += dense((*mixer, part), f"{file}.{part}", layers, bias=False)
    return rows + mlp(path, name, layers)
