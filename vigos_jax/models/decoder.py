"""The decoder layer with softmax attention, which all families use; its scanned stack; and its form for decoding.

The layer has rotary positions, grouped-query attention, an optional KV cache, SwiGLU, and DeepStack's visual features.
Qwen3.5's other kind of layer is in `hybrid`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.attention import attention
from vigos_jax.models.attention_masks import Described
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.kv_cache import Cached, KeyValues, attend, key_values
from vigos_jax.models.layers import (
    JOINED,
    ROWS,
    GatedMLP,
    LoraSpec,
    Projection,
    RMSNorm,
    joined_low_rank,
    place,
    place_states,
    rematerialised,
    rotate,
    scanned,
)
from vigos_jax.models.shapes import Array, Bool, Float, Int


class LayerInputs(flax.struct.PyTreeNode):
    """What every layer reads beside the hidden states.

    Attributes:
      angles: rotary angles, A = half of the dimensions of a head that rotate; for Qwen3.5 only a part of them do.
      mask: which token attends to which; `Cached` when decoding one token per row against a cache.
      image_index: index of the visual token at this position, -1 for text.
      deepstack: visual features added to the output of layers 0 .. n-1; None for models without DeepStack.
      segment_ids: see `TextInputs`; read by layers that carry a state along the sequence.
      keep: static; whether layers return what decoding will need, their keys and values or their state.
    """

    angles: Float[Array, "B T A"]
    mask: Bool[Array, "B T T"] | Described | Cached
    image_index: Int[Array, "B T"]
    deepstack: Float[Array, "n B M D"] | None
    segment_ids: Int[Array, "B T"]
    keep: bool = flax.struct.field(pytree_node=False, default=False)


def pick_visual(features: Float[Array, "B M D"], image_index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each token's visual feature; zeros for text."""
    at = jnp.maximum(image_index, 0)[:, :, None]
    return jnp.where(image_index[:, :, None] >= 0, jnp.take_along_axis(features, at, axis=1), 0)


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer.

    Attributes:
      config: dimensions.
      lora: which projections carry adapters; None for none.
      attention: name of the attention implementation, from `attention.choose`; unused with a cache.
      mesh: the mesh that states and heads are split over; None for one device.
    """

    config: ModelConfig
    lora: LoraSpec | None
    attention: str
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        inputs: LayerInputs,
        deterministic: bool,
        cached: KeyValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Runs one layer.

        Args:
          layer: the layer's number, counted from 0; it selects the DeepStack features.
          deterministic: false applies the adapters' dropout, which needs a "dropout" rng.
          cached: keys and values of earlier tokens, given if and only if `inputs.mask` is `Cached`; T is then 1.

        Returns:
          The layer's output, and keys and values: with a cache, the cache with the new token written into it;
          otherwise those of all tokens if `inputs.keep`, else None.
        """
        c, names = self.config, self.lora.language if self.lora else frozenset()
        b, t, _ = x.shape

        def project(name: str, features: int, bias: bool) -> Projection:
            return Projection(features, bias, self.lora if name in names else None, name=name)

        def heads(x: Float[Array, "B T F"], count: int) -> Float[Array, "B T {count} H"]:
            divides = self.mesh is not None and count % self.mesh.shape["tensor"] == 0
            x = x.reshape(b, t, count, -1)
            return place(x, self.mesh, ROWS, None, "tensor" if divides else None)

        x = place_states(x, self.mesh)
        norm = functools.partial(RMSNorm, c.rms_eps, c.norm_offset)
        h = norm(name="input_norm")(x)
        low, width = joined_low_rank(self, h), c.num_heads * c.head_dim * (2 if c.attention_gate else 1)
        q = project("q_proj", width, c.qkv_bias)(h, deterministic, low)
        k = project("k_proj", c.num_kv_heads * c.head_dim, c.qkv_bias)(h, deterministic, low)
        v = project("v_proj", c.num_kv_heads * c.head_dim, c.qkv_bias)(h, deterministic, low)
        q, k, v = heads(q, c.num_heads), heads(k, c.num_kv_heads), heads(v, c.num_kv_heads)
        gate = None
        if c.attention_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k = rotate(q, inputs.angles), rotate(k, inputs.angles)
        if isinstance(inputs.mask, Cached):
            assert cached is not None
            kept = cached.write(key_values(k, v, axis=cached.slots_axis), inputs.mask.write_at)
            out = attend(q, kept, inputs.mask.visible, mesh=self.mesh)
        else:
            kept = KeyValues(k, v, 1) if inputs.keep else None
            out = attention(q, k, v, inputs.mask, implementation=self.attention, mesh=self.mesh)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        out = out.reshape(b, t, -1)
        x = place_states(x + project("o_proj", c.hidden_size, False)(out, deterministic), self.mesh)
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, False, self.lora, names, name="mlp")
        x = x + mlp(norm(name="post_norm")(x), deterministic)
        if inputs.deepstack is not None:
            n = inputs.deepstack.shape[0]

            def add(x):
                features = inputs.deepstack[jnp.minimum(layer, n - 1)]  # [B, M, D]
                return x + pick_visual(features, inputs.image_index).astype(x.dtype)

            x = jax.lax.cond(layer < n, add, lambda x: x, x)
        return x, kept


def decoder_layers(
    config: ModelConfig, *, lora: LoraSpec | None, attention: str, mesh: Mesh | None, remat: str
) -> nn.Module:
    """The stack of all layers as a scan over parameters [L, ...].

    Args:
      attention: see `DecoderLayer`.
      remat: see `VisionLanguageModel`.

    Returns:
      A module of (x [B, T, D], layer numbers [L], `LayerInputs`, deterministic) to x and what the layers keep, stacked
      [L, ...]; None if `LayerInputs.keep` is false.
    """
    layer = rematerialised(DecoderLayer, remat, config.num_layers, static=(4,))  # 4: `deterministic`, a Python bool
    return scanned(layer, config.num_layers, shared=2)(config, lora, attention, mesh)


def decode_layer(config: ModelConfig, *, lora: LoraSpec | None, attention: str, mesh: Mesh | None, layer: int) -> Any:
    """One unscanned layer for decoding: with a cache, and with adapters from `join_adapters`.

    `layer` is unused, as all layers are alike here; `hybrid.hybrid_decode_layer`, of the same signature, needs it.
    """
    return DecoderLayer(config, decode_lora(lora), attention, mesh, parent=None)


def decode_lora(lora: LoraSpec | None) -> LoraSpec | None:
    """`lora` for adapters from `join_adapters`: scale 1, as A is already scaled, and no dropout; None stays None."""
    return dataclasses.replace(lora, scale=1.0, dropout=0.0) if lora is not None else None


def layer_of(stacked: Any, layer: int, config: ModelConfig) -> Any:
    """Slices one layer out of stacked parameters, adapters or kept states [L, ...].

    `config` is unused here; `hybrid.hybrid_layer_of`, of the same signature, needs it.
    """
    return jax.tree.map(lambda x: x[layer], stacked)


def join_adapters(lora: Mapping[str, Any], *, scale: float, dtype: Any) -> dict[str, Any]:
    """The decoder's adapters in the form that decoding reads: cast to `dtype`, scaled, and joined by input.

    Each group of n adapted projections that read the same states (a row of `layers.JOINED`) gets a single A. A token
    then needs one product `x A` per group, and the products with B share that input, so that a compiler can merge them.

    Args:
      lora: the stacked adapters of the decoder, `lora["layers"]`: A is [L, D, r], B is [L, r, F], with one rank r.
      scale: `LoraSpec.scale`, multiplied into A.

    Returns:
      A tree like `lora`, except that a group's A are concatenated, in the order of `layers.JOINED`, into one leaf
      `joined` [L, D, n r] beside the projections, which keep B alone: [L, n r, F], zero outside the projection's own
      r rows. All other projections keep A and B. In a hybrid decoder, L counts `ModelConfig.groups`.
    """
    out: dict[str, Any] = {}
    for name, node in lora.items():
        if "a" in node:
            out[name] = {"a": (scale * node["a"]).astype(dtype), "b": node["b"].astype(dtype)}
        else:
            out[name] = join_adapters(node, scale=scale, dtype=dtype)
    for names in JOINED:
        together = [out[name] for name in names if name in out]
        for i, adapter in enumerate(together):
            rank, after = adapter["b"].shape[-2], len(together) - 1 - i
            rows = [(0, 0)] * adapter["b"].ndim
            rows[-2] = (i * rank, after * rank)
            adapter["b"] = jnp.pad(adapter["b"], rows)
        if together:
            out["joined"] = jnp.concatenate([adapter.pop("a") for adapter in together], -1)
    return out
