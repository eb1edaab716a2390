"""Tensor names: a row maps one of our leaves to its name in a checkpoint. Families make their tables of these parts.

Leaves of scanned layers are stacked on a leading axis, so their name has a `{i}`. Kernels are stored transposed
([in, out] here, [out, in] there).
"""

import dataclasses
import re

import numpy as np

from vigos_jax.models.config import ModelConfig

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LANGUAGE_PROJECTIONS = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)
DELTA_PROJECTIONS = ("in_proj_qkv", "in_proj_z", "out_proj")  # of gated delta rule layers
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of ours and its name in a checkpoint.

    Attributes:
      path: keys in our parameter tree.
      name: tensor name in the file; `{i}` stands for the layer of a stacked leaf.
      stacked: number of layers on the leading axis, 0 for a leaf of its own.
      layout: "same", "transposed" (a kernel), "conv" (a patch embedding, [out, C, T, h, w] in the file) or "depthwise"
        (a convolution along the sequence, [C, 1, width] in the file).
      first, step: the leading axis holds the layers first, first + step, ...
    """

    path: Path
    name: str
    stacked: int = 0
    layout: str = "same"
    first: int = 0
    step: int = 1

    def names(self) -> list[str]:
        """Names of the tensors in a file: one, or one for each layer that is stacked here."""
        return [self.name.format(i=self.first + i * self.step) for i in range(self.stacked)] or [self.name]

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
        if self.layout == "depthwise":
            return (shape[1], 1, shape[0])
        return shape if self.layout == "same" else shape[::-1]


def dense(path: Path, name: str, stacked: int = 0, *, bias: bool = True) -> list[Tensor]:
    """A linear layer: its kernel, and its bias if it has one."""
    rows = [Tensor((*path, "kernel"), f"{name}.weight", stacked, "transposed")]
    return rows + ([Tensor((*path, "bias"), f"{name}.bias", stacked)] if bias else [])


def layer_norm(path: Path, name: str, stacked: int = 0) -> list[Tensor]:
    """A LayerNorm: scale and bias."""
    return [
        Tensor((*path, "scale"), f"{name}.weight", stacked),
        Tensor((*path, "bias"), f"{name}.bias", stacked),
    ]


def decoder_tensors(config: ModelConfig, name: str) -> list[Tensor]:
    """The shared decoder's tensors under a family's prefix, embedding and final norm included."""
    layers = full_layer(config, ("layers",), f"{name}.layers.{{i}}", config.num_layers)
    return around_layers(layers, name)


def around_layers(layers: list[Tensor], name: str) -> list[Tensor]:
    """A decoder's tensors: the embedding, those of its layers, the final norm."""
    embedding = Tensor(("embedding",), f"{name}.embed_tokens.weight")
    return [embedding, *layers, Tensor(("norm", "scale"), f"{name}.norm.weight")]


def full_layer(config: ModelConfig, path: Path, name: str, layers: int) -> list[Tensor]:
    """An attention layer's tensors, `layers` of them stacked."""
    rows = layer_norms(path, name, layers)
    for part in ("q_norm", "k_norm") if config.qk_norm else ():
        rows.append(Tensor((*path, part, "scale"), f"{name}.self_attn.{part}.weight", layers))
    for part in ATTENTION_PROJECTIONS:
        has_bias = config.qkv_bias and part != "o_proj"
        rows += dense((*path, part), f"{name}.self_attn.{part}", layers, bias=has_bias)
    return rows + mlp(path, name, layers)


def layer_norms(path: Path, name: str, layers: int) -> list[Tensor]:
    """The norms in front of a layer's two halves."""
    norms = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    return [Tensor((*path, ours, "scale"), f"{name}.{theirs}.weight", layers) for ours, theirs in norms.items()]


def mlp(path: Path, name: str, layers: int) -> list[Tensor]:
    """A layer's gated MLP."""
    parts = (dense((*path, "mlp", part), f"{name}.mlp.{part}", layers, bias=False) for part in MLP_PROJECTIONS)
    return [row for rows in parts for row in rows]


# What wrappers put into the names of the modules inside them: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")  # in memory, peft's tensors carry their adapter's name

# Other spellings of the same modules that released tools have written.
_ALIASES = (
    ("base_model.model.model.layers.", "base_model.model.model.language_model.layers."),
    ("base_model.model.visual.", "base_model.model.model.visual."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)


def canonical(name: str) -> str:
    """One spelling for all spellings of a tensor's name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:  # of data-parallel wrappers, which are outermost
        parts = parts[1:]
    name = _ADAPTER.sub(r".\1.weight", ".".join(parts))
    for old, new in _ALIASES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
