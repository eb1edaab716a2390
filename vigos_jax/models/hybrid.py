"""The hybrid decoder: groups of gated delta rule layers and gated attention layers, scanned over the groups."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.attention_masks import Causal
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.decoder import DecoderLayer, LayerInputs, decode_layer, decode_lora
from vigos_jax.models.delta_config import FULL, DeltaConfig
from vigos_jax.models.delta_rule import (
    StepState,
    causal_conv,
    causal_conv_step,
    chunk_for,
    chunked_delta_rule,
    conv_cache,
    delta_rule_step,
)
from vigos_jax.models.kv_cache import Cached, KeyValues
from vigos_jax.models.layers import (
    ROWS,
    GatedMLP,
    LoraSpec,
    Projection,
    RMSNorm,
    joined_low_rank,
    place,
    place_states,
    rematerialised,
    scanned,
)
from vigos_jax.models.shapes import Array, Bool, Float, Int


class DeltaState(flax.struct.PyTreeNode):
    """What a linear layer keeps of a sequence.

    Attributes:
      conv: inputs of the convolution at the last tokens, oldest first; zeros in front of the sequence.
    """

    conv: Float[Array, "B W F"]
    state: StepState


class GatedDeltaRule(nn.Module):
    """The token mixer of a linear layer: a short convolution, the delta rule's state, a gated norm."""

    config: ModelConfig
    delta: DeltaConfig
    lora: LoraSpec | None
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        before: DeltaState | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        """Runs over whole rows, or one token further.

        Args:
          h: normed states.
          real: false at padding, which changes no state.
          segment_ids: of packed rows; None where each row is one sequence.
          before: the state that one further token (T = 1) continues from; None for whole rows.

        Returns:
          What is added to the states, and the state after each row's last token.
        """
        d, real = self.delta, real[:, :, None]

        def project(name: str, features: int) -> Projection:
            adapted = self.lora is not None and name in self.lora.language
            return Projection(features, False, self.lora if adapted else None, name=name)

        def heads(x: Float[Array, "B T F"], size: int) -> Float[Array, "B T N {size}"]:
            x = x.reshape(*x.shape[:2], -1, size)
            divides = self.mesh is not None and x.shape[2] % self.mesh.shape["tensor"] == 0
            return place(x, self.mesh, ROWS, None, "tensor" if divides else None)

        def per_head(name: str, init) -> Float[Array, "N"]:
            return self.param(name, init, (d.value_heads,)).astype(jnp.float32)

        h = jnp.where(real, h, 0)  # so that the convolution reads zeros there
        low = joined_low_rank(self, h)
        u = project("in_proj_qkv", d.channels)(h, deterministic, low)
        z = heads(project("in_proj_z", d.width)(h, deterministic, low), d.value_dim)
        # When decoding, kept apart from the wide products: on GPUs XLA would merge them and copy the kernels each step.
        alone = h if before is None else jax.lax.optimization_barrier(h)
        b, a = (project(f"in_proj_{part}", d.value_heads)(alone).astype(jnp.float32) for part in "ba")
        rate = -jnp.exp(per_head("A_log", _log_rate))
        decay = jnp.where(real, rate * jax.nn.softplus(a + per_head("dt_bias", nn.initializers.ones)), 0)  # [B, T, Hv]
        beta = jnp.where(real, jax.nn.sigmoid(b), 0)

        w = self.param("conv", nn.initializers.normal(0.02), (d.conv_width, d.channels)).T
        if before is None:
            mixed, conv = causal_conv(u, w, segment_ids), conv_cache(u, real[:, :, 0], width=d.conv_width)
        else:
            mixed, conv = causal_conv_step(u[:, 0], w, before.conv)
            mixed = mixed[:, None]
        width = d.key_heads * d.key_dim
        mixed = jax.nn.silu(mixed)
        q, k = (heads(x, d.key_dim) for x in (mixed[..., :width], mixed[..., width : 2 * width]))
        v = heads(mixed[..., 2 * width :], d.value_dim)
        out, state = self._rule((q, k, v, decay, beta), segment_ids, None if before is None else before.state)
        out = RMSNorm(self.config.rms_eps, name="gated_norm")(out.astype(jnp.float32))  # [B, T, Hv, Dv]
        out = (out * jax.nn.silu(z.astype(jnp.float32))).astype(h.dtype).reshape(*h.shape[:2], -1)
        return project("out_proj", self.config.hidden_size)(out, deterministic), DeltaState(conv=conv, state=state)

    def _rule(
        self, tokens: tuple[Array, ...], segment_ids: Int[Array, "B T"] | None, before: StepState | None
    ) -> tuple[Float[Array, "B T N Hv"], StepState]:
        """Outputs and the last state of q, k, v, log decay and beta; before: the state in front of one token."""
        q, k, v, decay, beta = tokens
        if before is not None:
            out, state = delta_rule_step(q[:, 0], k[:, 0], v[:, 0], decay[:, 0], beta[:, 0], before)
            return out[:, None], state
        platform = self.mesh.devices.flat[0].platform if self.mesh is not None else jax.default_backend()
        chunk = chunk_for(platform)
        out, state, _ = chunked_delta_rule(q, k, v, decay, beta, segment_ids=segment_ids, chunk=chunk)
        return out, StepState.of(state)


def _log_rate(key, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


class LinearLayer(nn.Module):
    """One pre-norm layer whose state flows along the sequence."""

    config: ModelConfig
    lora: LoraSpec | None
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        inputs: LayerInputs,
        deterministic: bool,
        cached: DeltaState | None = None,
    ) -> tuple[Float[Array, "B T D"], DeltaState | None]:
        """Runs one layer; arguments and results as `DecoderLayer` has them, all layers being alike.

        Args:
          cached: under a `Cached` mask what the layer kept of earlier tokens.
        """
        c = self.config
        assert c.delta is not None
        x = place_states(x, self.mesh)
        h = RMSNorm(c.rms_eps, c.norm_offset, name="input_norm")(x)
        mixer = GatedDeltaRule(c, c.delta, self.lora, self.mesh, name="mixer")
        segment_ids = None if isinstance(inputs.mask, Causal | Cached) else inputs.segment_ids
        out, state = mixer(h, inputs.segment_ids > 0, segment_ids, cached, deterministic)
        x = place_states(x + out, self.mesh)
        names = self.lora.language if self.lora else frozenset()
        mlp = GatedMLP(c.hidden_size, c.intermediate_size, False, self.lora, names, name="mlp")
        x = x + mlp(RMSNorm(c.rms_eps, c.norm_offset, name="post_norm")(x), deterministic)
        return x, state if inputs.keep or cached is not None else None


class Group(nn.Module):
    """One run of `ModelConfig.layer_pattern`; its layers are named by kind and place: linear_0, ..., full_3."""

    config: ModelConfig
    lora: LoraSpec | None
    attention: str
    mesh: Mesh | None
    remat: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], group: Int[Array, ""], inputs: LayerInputs, deterministic: bool
    ) -> tuple[Float[Array, "B T D"], dict[str, KeyValues | DeltaState | None]]:
        """Runs the layers: the states after the last, and what each keeps if `inputs.keep`."""
        c, kept = self.config, {}
        linear = rematerialised(LinearLayer, self.remat, c.groups, static=(4,))
        full = rematerialised(DecoderLayer, self.remat, c.groups, static=(4,))
        for j, kind in enumerate(c.layer_pattern):
            name = f"{kind}_{j}"
            if kind == FULL:
                layer = full(c, self.lora, self.attention, self.mesh, name=name)
            else:
                layer = linear(c, self.lora, self.mesh, name=name)
            x, kept[name] = layer(x, group * len(c.layer_pattern) + j, inputs, deterministic)
        return x, kept


def hybrid_layers(
    config: ModelConfig, *, lora: LoraSpec | None, attention: str, mesh: Mesh | None, remat: str
) -> nn.Module:
    """All layers, scanned: `(x, group numbers, LayerInputs, deterministic)` to `x, what each keeps, stacked`."""
    return scanned(Group, config.groups, shared=2)(config, lora, attention, mesh, remat)


def hybrid_decode_layer(
    config: ModelConfig, *, lora: LoraSpec | None, attention: str, mesh: Mesh | None, layer: int
) -> nn.Module:
    """One layer by itself, of either kind: see `decoder.decode_layer`."""
    if config.layer_pattern[layer % len(config.layer_pattern)] == FULL:
        return decode_layer(config, lora=lora, attention=attention, mesh=mesh, layer=layer)
    return LinearLayer(config, decode_lora(lora), mesh, parent=None)


def hybrid_layer_of(stacked: Any, layer: int, config: ModelConfig) -> Any:
    """One layer's part of parameters, adapters or kept states: groups [G, ...] of layers by kind and place.

    Of adapters that cover one kind of layers alone, the other kind's part is {}.
    """
    group, place_in = divmod(layer, len(config.layer_pattern))
    part = stacked.get(f"{config.layer_pattern[place_in]}_{place_in}", {})
    return jax.tree.map(lambda x: x[group], part)
