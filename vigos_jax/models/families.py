"""The model families: one entry each, looked up by `model_type`. A new family is a file beside this one and an entry.

Its parser of config.json goes to `config.PARSERS`; `register` does both for a family from outside the package.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from vigos_jax.models import qwen2_5_vl, qwen3_vl
from vigos_jax.models.config import PARSERS, ModelConfig
from vigos_jax.models.decoder import decode_layer, decoder_layers, join_adapters, layer_of
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.tensor_names import LANGUAGE_PROJECTIONS, MLP_PROJECTIONS, Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """What one family does its own way.

    Attributes:
      tower: (VisionConfig, LoraSpec or None, dtype, remat, mesh, attention) -> module of (VisionInputs, deterministic)
        to visual tokens [B, M, (1 + n) D], for n DeepStack blocks; attention: see `VisionLanguageModel`.
      tensors: ModelConfig -> the tensors of its published layout, in file order, but for `lm_head`.
      vision_adapters: projections of the tower's blocks whose names end like the decoder's: what adapters of the scope
        "official" cover too. They are in `visual/blocks/mlp`.
      layers: the decoder's stack, see `decoder.decoder_layers`.
      decode_layer: one layer of it by itself, see `decoder.decode_layer`.
      layer_of: (the stack's parameters, adapters or kept states; layer) -> that layer's part.
      join_adapters: see `decoder.join_adapters`.
    """

    tower: Callable[..., nn.Module]
    tensors: Callable[[ModelConfig], list[Tensor]]
    vision_adapters: tuple[str, ...] = ()
    layers: Callable[..., nn.Module] = decoder_layers
    decode_layer: Callable[..., nn.Module] = decode_layer
    layer_of: Callable[[Any, int], Any] = layer_of
    join_adapters: Callable[..., dict[str, Any]] = join_adapters


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(qwen2_5_vl.VisionTower, qwen2_5_vl.tensors, vision_adapters=MLP_PROJECTIONS),
    "qwen3_vl": Family(qwen3_vl.VisionTower, qwen3_vl.tensors),
}


def register(name: str, family: Family, *, parser: Callable[[Mapping[str, Any], str], ModelConfig]) -> None:
    """Adds a family for this process; data workers are processes of their own, so its data needs `data.workers=0`.

    Args:
      name: `model_type` in config.json.
      parser: (parsed config.json, its path) -> ModelConfig, whose `family` is `name`.
    """
    PARSERS[name], FAMILIES[name] = parser, family


def tensor_table(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the family's published layout, in file order."""
    rows = FAMILIES[config.family].tensors(config)
    if not config.tie_embeddings:
        rows.append(Tensor(("lm_head",), "lm_head.weight", layout="transposed"))
    return rows


def adapter_table(config: ModelConfig, lora: LoraSpec) -> list[Tensor]:
    """Every tensor of a PEFT adapter of this shape."""
    rows: list[Tensor] = []
    prefix = "base_model.model.model"
    targets = [
        (("layers", *(("mlp",) if n in MLP_PROJECTIONS else ()), n),
         f"{prefix}.language_model.layers.{{i}}.{'mlp' if n in MLP_PROJECTIONS else 'self_attn'}.{n}",
         config.num_layers)
        for n in LANGUAGE_PROJECTIONS if n in lora.language
    ] + [
        (("visual", "blocks", "mlp", n), f"{prefix}.visual.blocks.{{i}}.mlp.{n}", config.vision.depth)
        for n in FAMILIES[config.family].vision_adapters if n in lora.vision
    ]  # fmt: skip
    for path, name, layers in targets:
        rows.append(Tensor((*path, "a"), f"{name}.lora_A.weight", layers, "transposed"))
        rows.append(Tensor((*path, "b"), f"{name}.lora_B.weight", layers, "transposed"))
    return rows
