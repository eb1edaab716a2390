"""The decoder that both families share: M-RoPE, grouped heads, SwiGLU, a cache, and DeepStack's visual features."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.attention import Causal, attention
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.layers import (
    ROWS,
    GatedMLP,
    LoraSpec,
    Projection,
    RMSNorm,
    place,
    place_states,
    rematerialised,
    rotate,
    unroll,
)
from vigos_jax.models.shapes import AnyArray, Array, Bool, Float, Int


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers, and the slot where the next tokens go."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    write_at: Int[Array, ""]


def empty_cache(config: ModelConfig, *, batch: int, length: int, dtype: Any) -> KVCache:
    """A cache for `length` tokens per row."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), write_at=jnp.zeros((), jnp.int32))


def segment_mask(segment_ids: Int[AnyArray, "B T"]) -> Bool[Array, "B T T"]:
    """Which token attends to which: causal, within the own segment or the prefix, never padding.

    For segment_ids `1 1 2 2 3` (a prefix of two, branches of two and one):

        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 . . 1
    """
    q, k = segment_ids[:, :, None], segment_ids[:, None, :]
    t = segment_ids.shape[1]
    causal = jnp.arange(t)[:, None] >= jnp.arange(t)[None, :]
    return causal & (k > 0) & ((k == 1) | (k == q))


class LayerInputs(flax.struct.PyTreeNode):
    """What every layer reads beside the hidden states.

    Attributes:
      angles: rotary angles.
      mask: which token attends to which.
      image_index: which visual token stands here, -1 for text.
      deepstack: visual features that are added behind layers 0 .. n-1; None where there are none.
    """

    angles: Float[Array, "B T H//2"]
    mask: Bool[Array, "B T S"] | Causal
    image_index: Int[Array, "B T"]
    deepstack: Float[Array, "n B M D"] | None


def pick_visual(features: Float[Array, "B M D"], image_index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each token's visual feature; zeros for text."""
    at = jnp.maximum(image_index, 0)[:, :, None]
    return jnp.where(image_index[:, :, None] >= 0, jnp.take_along_axis(features, at, axis=1), 0)


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer; reads and writes its slice of the cache when there is one."""

    config: ModelConfig
    lora: LoraSpec | None
    attention: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, carry, layer: Int[Array, ""], inputs: LayerInputs, deterministic: bool):
        """Runs one layer on (states [B, T, D], cache): ((states, cache), None)."""
        c = self.config
        x, cache = carry
        b, t, _ = x.shape

        def project(name: str, features: int, bias: bool) -> Projection:
            adapted = self.lora is not None and name in self.lora.language
            return Projection(features, bias, self.lora if adapted else None, name=name)

        def heads(x: Float[Array, "B T F"], count: int) -> Float[Array, "B T {count} H"]:
            divides = self.mesh is not None and count % self.mesh.shape["tensor"] == 0
            x = x.reshape(b, t, count, c.head_dim)
            return place(x, self.mesh, ROWS, None, "tensor" if divides else None)

        x = place_states(x, self.mesh)
        h = RMSNorm(c.rms_eps, name="input_norm")(x)
        q = project("q_proj", c.num_heads * c.head_dim, c.qkv_bias)(h, deterministic)
        k = project("k_proj", c.num_kv_heads * c.head_dim, c.qkv_bias)(h, deterministic)
        v = project("v_proj", c.num_kv_heads * c.head_dim, c.qkv_bias)(h, deterministic)
        q, k, v = heads(q, c.num_heads), heads(k, c.num_kv_heads), heads(v, c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.rms_eps, name="q_norm")(q), RMSNorm(c.rms_eps, name="k_norm")(k)
        q, k = rotate(q, inputs.angles), rotate(k, inputs.angles)
        if cache is not None:
            at = (layer, 0, cache.write_at, 0, 0)
            cache = cache.replace(
                k=jax.lax.dynamic_update_slice(cache.k, k[None], at),
                v=jax.lax.dynamic_update_slice(cache.v, v[None], at),
            )
            k, v = cache.k[layer], cache.v[layer]  # [B, S, K, H]
        out = attention(q, k, v, inputs.mask, implementation=self.attention, mesh=self.mesh).reshape(b, t, -1)
        x = place_states(x + project("o_proj", c.hidden_size, False)(out, deterministic), self.mesh)
        names = self.lora.language if self.lora else frozenset()
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, False, self.lora, names, name="mlp")
        x = x + mlp(RMSNorm(c.rms_eps, name="post_norm")(x), deterministic)
        if inputs.deepstack is not None:
            n = inputs.deepstack.shape[0]

            def add(x):
                features = inputs.deepstack[jnp.minimum(layer, n - 1)]  # [B, M, D]
                return x + pick_visual(features, inputs.image_index).astype(x.dtype)

            x = jax.lax.cond(layer < n, add, lambda x: x, x)
        return (x, cache), None


def decoder_layers(
    config: ModelConfig, *, lora: LoraSpec | None, attention: str, mesh: Mesh | None, remat: str
) -> nn.Module:
    """All layers, scanned: `((x, cache), layer numbers, LayerInputs, deterministic)` to `(x, cache), None`."""
    stack = nn.scan(
        rematerialised(DecoderLayer, remat, config.num_layers, static=(4,)),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=config.num_layers,
        unroll=unroll(config.num_layers),
    )
    return stack(config, lora, attention, mesh)
