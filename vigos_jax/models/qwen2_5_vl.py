"""Qwen2.5-VL in Flax Linen: window-attention vision tower and M-RoPE decoder, one parameter tree for every role.

`apply({"params": base, "lora": adapter}, ...)` is the student, `apply({"params": base}, ...)` every teacher; roles
differ in the text inputs and masks they pass, never in code. Layers are scanned, so leaves are stacked `[L, ...]`.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.architecture import ModelConfig, VisionConfig
from vigos_jax.inputs import TextInputs, VisionInputs
from vigos_jax.models.attention import Causal, attention
from vigos_jax.models.layers import GatedMLP, LoraSpec, Projection, RMSNorm, grid_angles, mrope_angles, rotate

Array = jax.Array


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, [L, B, S, K, H], and the slot where the next tokens go (int32 scalar)."""

    k: Array
    v: Array
    write_at: Array


def segment_mask(segment_ids: Array) -> Array:
    """Who sees whom: causal, within the own segment or the prefix, never padding.

    For segment_ids `1 1 2 2 3` (a prefix of two, branches of two and one):

        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 . . 1

    Args:
      segment_ids: int32 [B, T].

    Returns:
      bool [B, T, T].
    """
    q, k = segment_ids[:, :, None], segment_ids[:, None, :]
    t = segment_ids.shape[1]
    causal = jnp.arange(t)[:, None] >= jnp.arange(t)[None, :]
    return causal & (k > 0) & ((k == 1) | (k == q))


def _unroll(layers: int) -> int:
    """Stacks this short compile as fast unrolled, and run a quarter faster on a CPU; long ones stay loops."""
    return layers if layers <= 4 else 1


def _rematerialised(layer: type[nn.Module], remat: str, layers: int) -> type[nn.Module]:
    """The layer with what its backward pass keeps: see `Qwen2_5VL.remat`."""
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # In a loop the compiler cannot undo the recomputation; unrolled, it would find the same computation twice.
    return nn.remat(layer, static_argnums=(5,), prevent_cse=_unroll(layers) > 1, policy=policy)


class VisionAttention(nn.Module):
    """Full or windowed self-attention over patch slots."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, angles: Array, image_ids: Array, is_full: Array) -> Array:
        c = self.config
        b, s, d = x.shape
        head_size = d // c.num_heads
        qkv = Projection(3 * d, use_bias=True, name="qkv")(x).reshape(b, s, 3, c.num_heads, head_size)
        q, k, v = rotate(qkv[:, :, 0], angles), rotate(qkv[:, :, 1], angles), qkv[:, :, 2]

        def within(q: Array, k: Array, v: Array, ids: Array) -> Array:
            mask = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
            return attention(q, k, v, mask)

        def windowed(q: Array, k: Array, v: Array, ids: Array) -> Array:
            w = c.window_patches
            split = lambda a: a.reshape(b * (s // w), w, *a.shape[2:])  # noqa: E731
            return within(split(q), split(k), split(v), split(ids)).reshape(q.shape)

        out = jax.lax.cond(is_full, within, windowed, q, k, v, image_ids)
        return Projection(d, use_bias=True, name="proj")(out.reshape(b, s, d))


class VisionBlock(nn.Module):
    """One pre-norm block of the vision tower."""

    config: VisionConfig
    lora: LoraSpec | None

    @nn.compact
    def __call__(self, x: Array, is_full: Array, angles: Array, image_ids: Array, deterministic: bool):
        c = self.config
        x = x + VisionAttention(c, name="attn")(RMSNorm(1e-6, name="norm1")(x), angles, image_ids, is_full)
        names = self.lora.vision if self.lora else frozenset()
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, True, self.lora, names, name="mlp")
        return x + mlp(RMSNorm(1e-6, name="norm2")(x), deterministic), None


class VisionTower(nn.Module):
    """Patches to visual tokens."""

    config: VisionConfig
    lora: LoraSpec | None
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, inputs: VisionInputs, deterministic: bool) -> Array:
        c = self.config
        x = Projection(c.hidden_size, name="patch_embed")(inputs.patches.astype(self.dtype))  # [B, S, Dv]
        angles = grid_angles(inputs.hw, head_size=c.hidden_size // c.num_heads)
        is_full = jnp.array([i in c.full_attention_blocks for i in range(c.depth)])
        blocks = nn.scan(
            _rematerialised(VisionBlock, self.remat, c.depth),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
            unroll=_unroll(c.depth),
        )(c, self.lora, name="blocks")
        x, _ = blocks(x, is_full, angles, inputs.image_ids, deterministic)
        x = RMSNorm(1e-6, name="merger_norm")(x)
        x = x.reshape(x.shape[0], -1, c.merge_unit * c.hidden_size)  # [B, S/unit, unit*Dv]
        x = jax.nn.gelu(Projection(x.shape[-1], use_bias=True, name="merger_in")(x), approximate=False)
        x = Projection(c.out_hidden_size, use_bias=True, name="merger_out")(x)
        return jnp.take_along_axis(x, inputs.token_unit[:, :, None], axis=1)  # [B, M, D]


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer; reads and writes its slice of the cache when there is one."""

    config: ModelConfig
    lora: LoraSpec | None
    attention: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, carry, layer: Array, angles: Array, mask: Array | Causal, deterministic: bool):
        c = self.config
        x, cache = carry
        b, t, _ = x.shape

        def project(name: str, features: int, bias: bool) -> Projection:
            adapted = self.lora is not None and name in self.lora.language
            return Projection(features, bias, self.lora if adapted else None, name=name)

        h = RMSNorm(c.rms_eps, name="input_norm")(x)
        q = project("q_proj", c.num_heads * c.head_size, True)(h, deterministic)
        k = project("k_proj", c.num_kv_heads * c.head_size, True)(h, deterministic)
        v = project("v_proj", c.num_kv_heads * c.head_size, True)(h, deterministic)
        q = rotate(q.reshape(b, t, c.num_heads, c.head_size), angles)
        k = rotate(k.reshape(b, t, c.num_kv_heads, c.head_size), angles)
        v = v.reshape(b, t, c.num_kv_heads, c.head_size)
        if cache is not None:
            at = (layer, 0, cache.write_at, 0, 0)
            cache = cache.replace(
                k=jax.lax.dynamic_update_slice(cache.k, k[None], at),
                v=jax.lax.dynamic_update_slice(cache.v, v[None], at),
            )
            k, v = cache.k[layer], cache.v[layer]  # [B, S, K, H]
        out = attention(q, k, v, mask, implementation=self.attention, mesh=self.mesh).reshape(b, t, -1)
        x = x + project("o_proj", c.hidden_size, False)(out, deterministic)
        names = self.lora.language if self.lora else frozenset()
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, False, self.lora, names, name="mlp")
        x = x + mlp(RMSNorm(c.rms_eps, name="post_norm")(x), deterministic)
        return (x, cache), None


class Qwen2_5VL(nn.Module):
    """The whole model. Its methods are pure functions of variables and arrays.

    Attributes:
      config: dimensions.
      lora: which projections carry adapters when a `lora` collection is given; None for none.
      dtype: computation dtype; parameters are cast to it where they are used.
      remat: what a layer keeps for the backward pass: "none" recomputes nothing and keeps all, "dots" keeps the
        projections' outputs, "full" keeps its input alone.
      attention: implementation for sequences of one causal segment, see `attention.choose`.
      mesh: what attention kernels are split over; None for one device.
    """

    config: ModelConfig
    lora: LoraSpec | None = None
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        self.visual = VisionTower(c.vision, self.lora, self.dtype, self.remat)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        self.layers = nn.scan(
            _rematerialised(DecoderLayer, self.remat, c.num_layers),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=_unroll(c.num_layers),
        )(c, self.lora, self.attention, self.mesh)
        self.norm = RMSNorm(c.rms_eps)
        if not c.tie_embeddings:
            self.lm_head = self.param("lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size))

    def encode_images(self, inputs: VisionInputs, *, deterministic: bool = True) -> Array:
        """Visual tokens of each row: [B, M, D]."""
        return self.visual(inputs, deterministic)

    def __call__(
        self,
        text: TextInputs,
        image_embeds: Array,
        *,
        mask: Array | Causal | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, KVCache | None]:
        """Final hidden states, after the last norm.

        Args:
          text: T tokens per row.
          image_embeds: [B, M, D] from `encode_images`.
          mask: bool [B, T, S], or `Causal`; default `segment_mask(text.segment_ids)`. With a cache, S is its length.
          cache: keys and values of earlier tokens; the T new ones are written at `cache.write_at`.
          deterministic: false applies the adapter's dropout (needs a "dropout" rng).

        Returns:
          (hidden [B, T, D], cache with the new tokens or None).
        """
        c = self.config
        x = self.embedding[text.ids].astype(self.dtype)  # [B, T, D]
        if image_embeds.shape[1]:
            at = jnp.maximum(text.image_index, 0)[:, :, None]
            pictures = jnp.take_along_axis(image_embeds, at, axis=1).astype(self.dtype)
            x = jnp.where(text.image_index[:, :, None] >= 0, pictures, x)
        angles = mrope_angles(text.positions, theta=c.rope_theta, sections=c.mrope_section)
        if mask is None:
            mask = segment_mask(text.segment_ids)
        (x, cache), _ = self.layers((x, cache), jnp.arange(c.num_layers), angles, mask, deterministic)
        if cache is not None:
            cache = cache.replace(write_at=cache.write_at + text.ids.shape[1])
        return self.norm(x), cache

    def logits(self, hidden: Array) -> Array:
        """Next-token logits in float32: [..., D] -> [..., V]. Only for a few positions at a time."""
        head = self.head().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)

    def head(self) -> Array:
        """The output head, [V, D]: the logits are a state's products with its rows."""
        return self.embedding if self.config.tie_embeddings else self.lm_head.T

    def init_all(self, vision: VisionInputs, text: TextInputs) -> Array:
        """Touches every parameter once, for `init` and `eval_shape`."""
        hidden, _ = self(text, self.encode_images(vision))
        return self.logits(hidden)


def abstract_variables(model: Qwen2_5VL) -> dict[str, Any]:
    """Shapes of all parameters (and adapters, if `model.lora`) without allocating any: a tree of ShapeDtypeStruct."""
    return jax.eval_shape(functools.partial(init_variables, model), jax.random.key(0))


def init_variables(model: Qwen2_5VL, key: Array) -> dict[str, Any]:
    """Freshly initialised `{"params": ...}`, and `"lora"` if the model has adapters (B is zero)."""
    v = model.config.vision
    s = v.window_patches
    vision = VisionInputs(
        patches=jnp.zeros((1, s, v.patch_dim)),
        image_ids=jnp.ones((1, s), jnp.int32),
        hw=jnp.zeros((1, s, 2), jnp.int32),
        token_unit=jnp.zeros((1, 1), jnp.int32),
    )
    zeros = jnp.zeros((1, 1), jnp.int32)
    text = TextInputs(ids=zeros, positions=jnp.zeros((1, 3, 1), jnp.int32), segment_ids=zeros + 1, image_index=zeros)
    return dict(model.init(key, vision, text, method="init_all"))


def empty_cache(config: ModelConfig, *, batch: int, length: int, dtype: Any) -> KVCache:
    """A cache for `length` tokens per row."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_size)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), write_at=jnp.zeros((), jnp.int32))
