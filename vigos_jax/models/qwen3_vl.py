"""Qwen3-VL: a vision tower with learned positions resampled to each image's grid, and DeepStack; its tensor names."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.inputs import VisionInputs
from vigos_jax.models.layers import (
    ROWS,
    LayerNorm,
    LoraSpec,
    Projection,
    VisionAttention,
    grid_angles,
    place,
    rematerialised,
    scanned,
)
from vigos_jax.models.shapes import Array, Float, Int, Num
from vigos_jax.models.tensor_names import Tensor, decoder_tensors, dense, layer_norm


class VisionBlock(nn.Module):
    """One pre-norm block. The carry's second part collects the states that DeepStack reads."""

    config: VisionConfig
    mesh: Mesh | None
    attention: str

    @nn.compact
    def __call__(
        self,
        carry,
        slot: Int[Array, ""],
        angles: Float[Array, "B S A"],
        image_ids: Int[Array, "B S"],
    ):
        """carry: (x [B, S, D], collected [n, B, S, D]); slot: where in `collected` the output goes, -1 for nowhere."""
        c = self.config
        x, collected = carry
        x = place(x, self.mesh, ROWS)
        attn = VisionAttention(c.num_heads, c.window_patches, self.attention, self.mesh, name="attn")
        x = x + attn(LayerNorm(1e-6, name="norm1")(x), angles, image_ids)
        h = Projection(c.intermediate_size, use_bias=True, name="mlp_in")(LayerNorm(1e-6, name="norm2")(x))
        x = x + Projection(c.hidden_size, use_bias=True, name="mlp_out")(jax.nn.gelu(h, approximate=True))
        if c.deepstack_blocks:
            collect = lambda kept: jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)  # noqa: E731
            collected = jax.lax.cond(slot >= 0, collect, lambda kept: kept, collected)
        return (x, collected), None


class Merger(nn.Module):
    """Patches to visual tokens: the patches of a group side by side, then two layers.

    Attributes:
      norm_after: normalise the group as one vector, not its patches one by one.
    """

    config: VisionConfig
    norm_after: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B S Dv"]) -> Float[Array, "B U D"]:
        """Maps patches to visual tokens, U = S / merge_unit."""
        c = self.config
        norm = LayerNorm(1e-6, name="norm")
        grouped = lambda a: a.reshape(a.shape[0], -1, c.merge_unit * c.hidden_size)  # noqa: E731
        x = norm(grouped(x)) if self.norm_after else grouped(norm(x))
        x = jax.nn.gelu(Projection(x.shape[-1], use_bias=True, name="fc1")(x), approximate=False)
        return Projection(c.out_hidden_size, use_bias=True, name="fc2")(x)


class VisionTower(nn.Module):
    """Patches to visual tokens: [B, M, (1 + n) D], the tower's end and then its n DeepStack blocks."""

    config: VisionConfig
    lora: LoraSpec | None  # adapters sit on no projection of this tower
    dtype: Any
    remat: str
    mesh: Mesh | None
    attention: str

    @nn.compact
    def __call__(self, inputs: VisionInputs, deterministic: bool) -> Float[Array, "B M W"]:
        """Visual tokens, DeepStack's features beside them: W = (1 + n) D."""
        c = self.config
        x = Projection(c.hidden_size, use_bias=True, name="patch_embed")(inputs.patches.astype(self.dtype))
        table = self.param("positions", nn.initializers.normal(0.02), (c.num_positions, c.hidden_size))
        x = x + resample(table, inputs.hw, inputs.grid).astype(x.dtype)  # [B, S, Dv]
        angles = grid_angles(inputs.hw, head_dim=c.hidden_size // c.num_heads)
        slots = [c.deepstack_blocks.index(i) if i in c.deepstack_blocks else -1 for i in range(c.depth)]
        block = rematerialised(VisionBlock, self.remat, c.depth)
        blocks = scanned(block, c.depth, shared=2)(c, self.mesh, self.attention, name="blocks")
        collected = place(jnp.zeros((len(c.deepstack_blocks), *x.shape), x.dtype), self.mesh, None, ROWS)
        (x, collected), _ = blocks((x, collected), jnp.array(slots), angles, inputs.image_ids)
        features = [Merger(c, norm_after=False, name="merger")(x)]
        for i in range(len(c.deepstack_blocks)):
            features.append(Merger(c, norm_after=True, name=f"deepstack_{i}")(collected[i]))
        x = place(jnp.concatenate(features, -1), self.mesh, ROWS)  # [B, S/unit, (1 + n) D]
        return jnp.take_along_axis(x, inputs.token_unit[:, :, None], axis=1)


def resample(
    table: Float[Array, "table D"], hw: Num[Array, "B S 2"], grid: Int[Array, "B S 2"]
) -> Float[Array, "B S D"]:
    """The learned positions, a square table, stretched bilinearly over each image: its corners are the table's.

    Args:
      table: side * side positions.
      hw: row and column of each patch.
      grid: rows and columns of its image.
    """
    side = round(table.shape[0] ** 0.5)
    at = hw * ((side - 1) / jnp.maximum(grid - 1, 1))  # [B, S, 2]
    low = jnp.floor(at)
    share = at - low
    low = low.astype(jnp.int32)
    high = jnp.minimum(low + 1, side - 1)
    out = jnp.zeros(())
    for row, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
        for col, col_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
            out = out + table[row * side + col].astype(jnp.float32) * (row_share * col_share)[..., None]
    return out


def tensors(config: ModelConfig) -> list[Tensor]:
    """The published layout, in file order, but for `lm_head`."""
    return tower_tensors(config) + decoder_tensors(config, "model.language_model")


def tower_tensors(config: ModelConfig) -> list[Tensor]:
    """The vision tower's tensors."""
    name = "model.visual"
    depth, blocks, file_blocks = config.vision.depth, ("visual", "blocks"), f"{name}.blocks.{{i}}"
    rows = [
        Tensor(("visual", "patch_embed", "kernel"), f"{name}.patch_embed.proj.weight", layout="conv"),
        Tensor(("visual", "patch_embed", "bias"), f"{name}.patch_embed.proj.bias"),
        Tensor(("visual", "positions"), f"{name}.pos_embed.weight"),
    ]
    for norm in ("norm1", "norm2"):
        rows += layer_norm((*blocks, norm), f"{file_blocks}.{norm}", depth)
    for part in ("qkv", "proj"):
        rows += dense((*blocks, "attn", part), f"{file_blocks}.attn.{part}", depth)
    for ours, theirs in (("mlp_in", "linear_fc1"), ("mlp_out", "linear_fc2")):
        rows += dense((*blocks, ours), f"{file_blocks}.mlp.{theirs}", depth)
    mergers = {"merger": "merger"}
    mergers |= {f"deepstack_{i}": f"deepstack_merger_list.{i}" for i in range(len(config.vision.deepstack_blocks))}
    for ours, theirs in mergers.items():
        rows += layer_norm(("visual", ours, "norm"), f"{name}.{theirs}.norm")
        rows += dense(("visual", ours, "fc1"), f"{name}.{theirs}.linear_fc1")
        rows += dense(("visual", ours, "fc2"), f"{name}.{theirs}.linear_fc2")
    return rows
