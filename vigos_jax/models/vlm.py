"""The whole model, of any family: a vision tower, a decoder, a head; one parameter tree for every role.

`apply({"params": base, "lora": adapter}, ...)` is the student, `apply({"params": base}, ...)` every teacher without
weights of its own; roles differ in the text inputs and masks they pass, never in code. Layers are scanned, so leaves
are stacked `[L, ...]`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.attention_masks import Branches, Causal, Described
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.decoder import LayerInputs, pick_visual
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.kv_cache import Cache, Cached
from vigos_jax.models.layers import ROWS, LoraSpec, RMSNorm, mrope_angles, place, place_states
from vigos_jax.models.shapes import Array, Bool, Float, Key
from vigos_jax.models.variables import Variables


class VisionLanguageModel(nn.Module):
    """The whole model. Its methods are pure functions of variables and arrays.

    Attributes:
      config: dimensions.
      lora: which projections carry adapters when a `lora` collection is given; None for none.
      dtype: computation dtype; parameters are cast to it where they are used.
      remat: what a layer keeps for the backward pass: "none" recomputes nothing and keeps all, "dots" keeps the
        projections' outputs, "full" keeps its input alone.
      attention: implementation wherever a mask is described, from `attention.choose`.
      mesh: what hidden states and attention kernels are split over; None for one device.
    """

    config: ModelConfig
    lora: LoraSpec | None = None
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None

    def setup(self):
        """Names the parts as the parameter tree has them."""
        c = self.config
        family = FAMILIES[c.family]
        self.visual = family.tower(c.vision, self.lora, self.dtype, self.remat, self.mesh, self.attention)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        self.layers = family.layers(c, lora=self.lora, attention=self.attention, mesh=self.mesh, remat=self.remat)
        self.norm = RMSNorm(c.rms_eps, c.norm_offset)
        if not c.tie_embeddings:
            self.lm_head = self.param("lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size))

    def encode_images(self, inputs: VisionInputs, *, deterministic: bool = True) -> Float[Array, "B M W"]:
        """Visual tokens of each row, W = (1 + n) D: features of the tower's end and, for DeepStack, of n blocks."""
        return self.visual(inputs, deterministic)

    def __call__(
        self,
        text: TextInputs,
        image_embeds: Float[Array, "B M W"],
        *,
        mask: Bool[Array, "B T T"] | Described | None = None,
        keep: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states, after the last norm.

        Args:
          text: T tokens per row.
          image_embeds: from `encode_images`.
          mask: which token attends to which; default `text_mask(text)`.
          keep: whether to return what decoding needs of these tokens.
          deterministic: false applies the adapter's dropout (needs a "dropout" rng).

        Returns:
          (hidden [B, T, D], what each layer keeps, stacked, for `Family.layer_of`; None unless asked for).
        """
        x, inputs = self.enter(text, image_embeds, mask=mask, keep=keep)
        x, kept = self.layers(x, jnp.arange(self.config.groups), inputs, deterministic)
        return self.norm(place_states(x, self.mesh)), kept

    def enter(
        self,
        text: TextInputs,
        image_embeds: Float[Array, "B M W"],
        *,
        mask: Bool[Array, "B T T"] | Described | None = None,
        keep: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerInputs]:
        """What the first layer starts from, and what every layer reads beside it. Arguments: see `__call__`."""
        c = self.config
        x = self._embedded(text)
        deepstack = None
        if image_embeds.shape[1]:
            # The tower's last features stand first; those of its earlier blocks, for DeepStack, after them.
            first, *others = jnp.split(image_embeds.astype(self.dtype), 1 + len(c.vision.deepstack_blocks), axis=-1)
            x = jnp.where(text.image_index[:, :, None] >= 0, pick_visual(first, text.image_index), x)
            deepstack = jnp.stack(others) if others else None  # [n, B, M, D]
        mask = text_mask(text, has_gaps=c.chunk > 1) if mask is None else mask
        return x, LayerInputs(self._angles(text), mask, text.image_index, deepstack, text.segment_ids, keep=keep)

    def decode(
        self, text: TextInputs, layers: Sequence[Variables], cache: Cache, *, visible: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Final hidden states of one more token per row, with unrolled layers instead of a scan over stacked weights.

        A scan would copy each layer's slice of the stack before a product reads it.

        Args:
          text: one token per row, not an image's.
          layers: variables of each layer, adapters as `decoder.join_adapters` leaves them.
          cache: of the tokens before.
          visible: slots that the token attends to, its own among them.

        Returns:
          (hidden [B, 1, D], the cache with the new token).
        """
        x, kept = self._embedded(text), []
        mask = Cached(visible, cache.write_at)
        inputs = LayerInputs(self._angles(text), mask, text.image_index, None, text.segment_ids)
        make = functools.partial(FAMILIES[self.config.family].decode_layer, self.config)
        for i, (variables, entry) in enumerate(zip(layers, cache.layers, strict=True)):
            layer = make(lora=self.lora, attention=self.attention, mesh=self.mesh, layer=i)
            x, entry = layer.apply(variables, x, jnp.int32(i), inputs, True, entry)
            kept.append(entry)
        return self.norm(place_states(x, self.mesh)), Cache(tuple(kept), cache.write_at + 1)

    def _embedded(self, text: TextInputs) -> Float[Array, "B T D"]:
        return place_states(self.embedding[text.ids].astype(self.dtype), self.mesh)

    def _angles(self, text: TextInputs) -> Float[Array, "B T A"]:
        c = self.config
        return mrope_angles(
            text.positions, theta=c.rope_theta, sections=c.mrope_section, interleaved=c.mrope_interleaved
        )

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits in float32. Only for a few positions at a time."""
        head = self._head().astype(hidden.dtype)
        hidden = place(hidden, self.mesh, "data", *[None] * (hidden.ndim - 2), "fsdp")  # as the head is split
        logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
        return place(logits, self.mesh, ROWS)

    def head(self) -> Float[Array, "V D"]:
        """The output head: the logits are a state's products with its rows. For a loop over many states."""
        return place(self._head(), self.mesh, "tensor")  # whole over fsdp: fetched once, not in every pass of the loop

    def _head(self) -> Float[Array, "V D"]:
        return self.embedding if self.config.tie_embeddings else self.lm_head.T

    def init_all(self, vision: VisionInputs, text: TextInputs) -> Float[Array, "B T V"]:
        """Touches every parameter once, for `init` and `eval_shape`."""
        hidden, _ = self(text, self.encode_images(vision))
        return self.logits(hidden)


def text_mask(text: TextInputs, *, has_gaps: bool) -> Causal | Branches:
    """Which token attends to which in rows of a prefix and branches; in plain sequences, what comes before it.

    Args:
      has_gaps: see `Branches`.
    """
    if text.branches == 0:
        return Causal(jnp.sum(text.segment_ids > 0, -1))
    return Branches(text.segment_ids, most=text.branches, has_gaps=has_gaps)


def abstract_variables(model: VisionLanguageModel) -> dict[str, Any]:
    """Shapes of all parameters (and adapters, if `model.lora`) without allocating any: a tree of ShapeDtypeStruct."""
    return jax.eval_shape(functools.partial(init_variables, model), jax.random.key(0))


def init_variables(model: VisionLanguageModel, key: Key[Array, ""]) -> dict[str, Any]:
    """Freshly initialised `{"params": ...}`, and `"lora"` if the model has adapters (B is zero)."""
    v = model.config.vision
    s = v.window_patches
    vision = VisionInputs(
        patches=jnp.zeros((1, s, v.patch_dim)),
        image_ids=jnp.ones((1, s), jnp.int32),
        hw=jnp.zeros((1, s, 2), jnp.int32),
        grid=jnp.ones((1, s, 2), jnp.int32),
        token_unit=jnp.zeros((1, 1), jnp.int32),
    )
    zeros = jnp.zeros((1, 1), jnp.int32)
    text = TextInputs(ids=zeros, positions=jnp.zeros((1, 3, 1), jnp.int32), segment_ids=zeros + 1, image_index=zeros)
    # Fused kernels cannot split a single row over a mesh, and parameters do not depend on the implementation.
    return dict(model.clone(attention="xla").init(key, vision, text, method="init_all"))
