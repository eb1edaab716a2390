"""Qwen2.5-VL: a vision tower with attention inside windows in most blocks, RMSNorm and SwiGLU; its tensor names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.inputs import VisionInputs
from vigos_jax.models.layers import (
    ROWS,
    GatedMLP,
    LoraSpec,
    Projection,
    RMSNorm,
    VisionAttention,
    grid_angles,
    place,
    rematerialised,
    scanned,
)
from vigos_jax.models.shapes import Array, Bool, Float, Int
from vigos_jax.models.tensor_names import Tensor, decoder_tensors, dense


class VisionBlock(nn.Module):
    """One pre-norm block, full or windowed."""

    config: VisionConfig
    lora: LoraSpec | None
    mesh: Mesh | None
    attention: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S Dv"],
        is_full: Bool[Array, ""],
        angles: Float[Array, "B S A"],
        image_ids: Int[Array, "B S"],
        deterministic: bool,
    ):
        """Runs one block on patches; is_full: no windows here."""
        c = self.config
        x = place(x, self.mesh, ROWS)
        attn = VisionAttention(c.num_heads, c.window_patches, self.attention, self.mesh, name="attn")
        x = x + attn(RMSNorm(1e-6, name="norm1")(x), angles, image_ids, is_full)
        names = self.lora.vision if self.lora else frozenset()
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, True, self.lora, names, name="mlp")
        return x + mlp(RMSNorm(1e-6, name="norm2")(x), deterministic), None


class VisionTower(nn.Module):
    """Patches to visual tokens."""

    config: VisionConfig
    lora: LoraSpec | None
    dtype: Any
    remat: str
    mesh: Mesh | None
    attention: str

    @nn.compact
    def __call__(self, inputs: VisionInputs, deterministic: bool) -> Float[Array, "B M D"]:
        """Visual tokens of each row in reading order."""
        c = self.config
        x = Projection(c.hidden_size, name="patch_embed")(inputs.patches.astype(self.dtype))  # [B, S, Dv]
        angles = grid_angles(inputs.hw, head_dim=c.hidden_size // c.num_heads)
        is_full = jnp.array([i in c.full_attention_blocks for i in range(c.depth)])
        block = rematerialised(VisionBlock, self.remat, c.depth, static=(5,))
        blocks = scanned(block, c.depth, shared=3)(c, self.lora, self.mesh, self.attention, name="blocks")
        x, _ = blocks(x, is_full, angles, inputs.image_ids, deterministic)
        x = RMSNorm(1e-6, name="merger_norm")(place(x, self.mesh, ROWS))
        x = x.reshape(x.shape[0], -1, c.merge_unit * c.hidden_size)  # [B, S/unit, unit*Dv]
        x = jax.nn.gelu(Projection(x.shape[-1], use_bias=True, name="merger_in")(x), approximate=False)
        x = place(Projection(c.out_hidden_size, use_bias=True, name="merger_out")(x), self.mesh, ROWS)
        return jnp.take_along_axis(x, inputs.token_unit[:, :, None], axis=1)  # [B, M, D]


def tensors(config: ModelConfig) -> list[Tensor]:
    """The published layout, in file order, but for `lm_head`."""
    name = "visual"
    depth, blocks, file_blocks = config.vision.depth, ("visual", "blocks"), f"{name}.blocks.{{i}}"
    rows = [Tensor(("visual", "patch_embed", "kernel"), f"{name}.patch_embed.proj.weight", layout="conv")]
    for norm in ("norm1", "norm2"):
        rows.append(Tensor((*blocks, norm, "scale"), f"{file_blocks}.{norm}.weight", depth))
    for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        rows += dense((*blocks, *part.split(".")), f"{file_blocks}.{part}", depth)
    rows.append(Tensor(("visual", "merger_norm", "scale"), f"{name}.merger.ln_q.weight"))
    rows += dense(("visual", "merger_in"), f"{name}.merger.mlp.0")
    rows += dense(("visual", "merger_out"), f"{name}.merger.mlp.2")
    return rows + decoder_tensors(config, "model")
