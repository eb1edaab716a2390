"""Tensor names: one table per family from our leaves to a checkpoint's tensors.

A row maps one of our leaves to the checkpoint's name. Leaves of scanned layers are stacked on a leading axis, so their
name has a `{i}`. Kernels are stored transposed ([in, out] here, [out, in] there).
"""

import dataclasses

import numpy as np

from vigos_jax.models.config import ModelConfig
from vigos_jax.models.layers import LoraSpec

LANGUAGE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Projections of the towers' MLPs whose names end like the decoder's. Qwen3-VL's end otherwise.
VISION_PROJECTIONS = {"qwen2_5_vl": MLP_PROJECTIONS, "qwen3_vl": ()}
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of ours and its name in a checkpoint.

    Attributes:
      path: keys in our parameter tree.
      name: tensor name in the file; `{i}` stands for the layer of a stacked leaf.
      stacked: number of layers on the leading axis, 0 for a leaf of its own.
      layout: "same", "transposed" (a kernel) or "conv" (a patch embedding, [out, C, T, h, w] in the file).
    """

    path: Path
    name: str
    stacked: int = 0
    layout: str = "same"

    def names(self) -> list[str]:
        """Names of the tensors in a file: one, or one for each layer that is stacked here."""
        return [self.name.format(i=i) for i in range(self.stacked)] if self.stacked else [self.name]

    def from_file(self, x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """What lies at `index` of our leaf (its layer axis left out) in the file's tensor: a view, in our layout."""
        if self.layout == "same":
            return x[index]
        return x.reshape(x.shape[0], -1)[index[::-1]].T

    def shape_in_file(self, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
        """The shape of the file's tensor for a leaf of this shape (its layer axis left out)."""
        if self.layout == "conv":
            v = config.vision
            return (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        return shape if self.layout == "same" else shape[::-1]


def tensor_table(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the family's published layout, in file order."""
    if config.family == "qwen3_vl":
        rows = _qwen3_tower(config, "model.visual") + _decoder(config, "model.language_model")
    else:
        rows = _qwen2_5_tower(config, "visual") + _decoder(config, "model")
    if not config.tie_embeddings:
        rows.append(Tensor(("lm_head",), "lm_head.weight", layout="transposed"))
    return rows


def _dense(path: Path, name: str, stacked: int = 0, *, bias: bool = True) -> list[Tensor]:
    rows = [Tensor((*path, "kernel"), f"{name}.weight", stacked, "transposed")]
    return rows + ([Tensor((*path, "bias"), f"{name}.bias", stacked)] if bias else [])


def _layer_norm(path: Path, name: str, stacked: int = 0) -> list[Tensor]:
    return [
        Tensor((*path, "scale"), f"{name}.weight", stacked),
        Tensor((*path, "bias"), f"{name}.bias", stacked),
    ]


def _qwen2_5_tower(config: ModelConfig, name: str) -> list[Tensor]:
    depth, blocks, file_blocks = config.vision.depth, ("visual", "blocks"), f"{name}.blocks.{{i}}"
    rows = [Tensor(("visual", "patch_embed", "kernel"), f"{name}.patch_embed.proj.weight", layout="conv")]
    for norm in ("norm1", "norm2"):
        rows.append(Tensor((*blocks, norm, "scale"), f"{file_blocks}.{norm}.weight", depth))
    for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        rows += _dense((*blocks, *part.split(".")), f"{file_blocks}.{part}", depth)
    rows.append(Tensor(("visual", "merger_norm", "scale"), f"{name}.merger.ln_q.weight"))
    rows += _dense(("visual", "merger_in"), f"{name}.merger.mlp.0")
    return rows + _dense(("visual", "merger_out"), f"{name}.merger.mlp.2")


def _qwen3_tower(config: ModelConfig, name: str) -> list[Tensor]:
    depth, blocks, file_blocks = config.vision.depth, ("visual", "blocks"), f"{name}.blocks.{{i}}"
    rows = [
        Tensor(("visual", "patch_embed", "kernel"), f"{name}.patch_embed.proj.weight", layout="conv"),
        Tensor(("visual", "patch_embed", "bias"), f"{name}.patch_embed.proj.bias"),
        Tensor(("visual", "positions"), f"{name}.pos_embed.weight"),
    ]
    for norm in ("norm1", "norm2"):
        rows += _layer_norm((*blocks, norm), f"{file_blocks}.{norm}", depth)
    for part in ("qkv", "proj"):
        rows += _dense((*blocks, "attn", part), f"{file_blocks}.attn.{part}", depth)
    for ours, theirs in (("mlp_in", "linear_fc1"), ("mlp_out", "linear_fc2")):
        rows += _dense((*blocks, ours), f"{file_blocks}.mlp.{theirs}", depth)
    mergers = {"merger": "merger"}
    mergers |= {f"deepstack_{i}": f"deepstack_merger_list.{i}" for i in range(len(config.vision.deepstack_blocks))}
    for ours, theirs in mergers.items():
        rows += _layer_norm(("visual", ours, "norm"), f"{name}.{theirs}.norm")
        rows += _dense(("visual", ours, "fc1"), f"{name}.{theirs}.linear_fc1")
        rows += _dense(("visual", ours, "fc2"), f"{name}.{theirs}.linear_fc2")
    return rows


def _decoder(config: ModelConfig, name: str) -> list[Tensor]:
    layers, file_layers = config.num_layers, f"{name}.layers.{{i}}"
    rows = [Tensor(("embedding",), f"{name}.embed_tokens.weight")]
    norms = [("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm")]
    if config.qk_norm:
        norms += [("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm")]
    for ours, theirs in norms:
        rows.append(Tensor(("layers", ours, "scale"), f"{file_layers}.{theirs}.weight", layers))
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        has_bias = config.qkv_bias and part != "o_proj"
        rows += _dense(("layers", part), f"{file_layers}.self_attn.{part}", layers, bias=has_bias)
    for part in ("gate_proj", "up_proj", "down_proj"):
        rows += _dense(("layers", "mlp", part), f"{file_layers}.mlp.{part}", layers, bias=False)
    return [*rows, Tensor(("norm", "scale"), f"{name}.norm.weight")]


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
        for n in VISION_PROJECTIONS[config.family] if n in lora.vision
    ]  # fmt: skip
    for path, name, layers in targets:
        rows.append(Tensor((*path, "a"), f"{name}.lora_A.weight", layers, "transposed"))
        rows.append(Tensor((*path, "b"), f"{name}.lora_B.weight", layers, "transposed"))
    return rows


# Other spellings of the same modules that released tools have written.
_ALIASES = (
    ("base_model.model.model.layers.", "base_model.model.model.language_model.layers."),
    ("base_model.model.visual.", "base_model.model.model.visual."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)


def canonical(name: str) -> str:
    """One spelling for all spellings of a tensor's name."""
    for old, new in _ALIASES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
