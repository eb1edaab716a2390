"""The model families: one entry each, looked up by `model_type`. A new family is a file beside this one and an entry.

Its parser of config.json goes to `config.PARSERS`; `register` does both for a family from outside the package.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from vigos_jax.models import qwen2_5_vl, qwen3_5, qwen3_vl
from vigos_jax.models.config import PARSERS, ModelConfig
from vigos_jax.models.decoder import decode_layer, decoder_layers, layer_of
from vigos_jax.models.hybrid import hybrid_decode_layer, hybrid_layer_of, hybrid_layers
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.tensor_names import (
    DELTA_PROJECTIONS,
    LANGUAGE_PROJECTIONS,
    MLP_PROJECTIONS,
    Path,
    Tensor,
    canonical,
)


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
      layer_of: (the stack's parameters, adapters or kept states; layer; config) -> that layer's part.
      language_adapters: the decoder's projections that new adapters cover.
      license: of the published models, for the card of an export whose base folder has none; "" if it differs by size.
      carried: name prefixes of tensors that no role uses: skipped on import, copied on export.
    """

    tower: Callable[..., nn.Module]
    tensors: Callable[[ModelConfig], list[Tensor]]
    vision_adapters: tuple[str, ...] = ()
    layers: Callable[..., nn.Module] = decoder_layers
    decode_layer: Callable[..., nn.Module] = decode_layer
    layer_of: Callable[[Any, int, ModelConfig], Any] = layer_of
    language_adapters: tuple[str, ...] = LANGUAGE_PROJECTIONS
    license: str = ""
    carried: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(qwen2_5_vl.VisionTower, qwen2_5_vl.tensors, vision_adapters=MLP_PROJECTIONS),
    "qwen3_vl": Family(qwen3_vl.VisionTower, qwen3_vl.tensors, license="apache-2.0"),
    "qwen3_5": Family(
        qwen3_vl.VisionTower,
        qwen3_5.tensors,
        layers=hybrid_layers,
        decode_layer=hybrid_decode_layer,
        layer_of=hybrid_layer_of,
        language_adapters=(*LANGUAGE_PROJECTIONS, *DELTA_PROJECTIONS),
        license="apache-2.0",
        carried=qwen3_5.CARRIED,
    ),
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
    """Every tensor of a PEFT adapter of this shape, the decoder's first."""
    rows: list[Tensor] = []
    kernels = [row for row in tensor_table(config) if row.path[-1] == "kernel"]
    for part, names in (("layers", lora.language), ("visual", lora.vision)):
        for row in kernels:
            *_, name, _ = row.path
            if row.path[0] == part and name in names:
                rows += _adapter_of(row)
    return rows


def _adapter_of(kernel: Tensor) -> list[Tensor]:
    """A and B of one projection, as PEFT names them over the class that transformers loads a family with."""
    name = canonical(kernel.name).removesuffix(".weight")
    for ours, theirs in (("model.", "model.language_model."), ("visual.", "model.visual.")):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    path: Path = kernel.path[:-1]
    return [
        dataclasses.replace(kernel, path=(*path, part), name=f"base_model.model.{name}.lora_{part.upper()}.weight")
        for part in ("a", "b")
    ]
