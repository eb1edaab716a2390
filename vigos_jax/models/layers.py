"""Building blocks shared by the vision towers and decoders: norms, rotary positions, adapted projections."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters: y = x W + scale * dropout(x) A B, with A [in, rank] and B [rank, out] in float32.

    Attributes:
      rank: columns of A.
      scale: alpha / rank (or alpha / sqrt(rank) for a rank-stabilised adapter).
      dropout: probability of zeroing an entry of the adapter's input while training.
      language: names of the decoder projections that carry an adapter.
      vision: names of the vision projections that carry an adapter (the released code's suffix matching).
    """

    rank: int
    scale: float
    dropout: float = 0.0
    language: frozenset[str] = frozenset()
    vision: frozenset[str] = frozenset()


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def low_rank(x: Array, a: Array, b: Array) -> Array:
    """x A B: [..., in], [in, r], [r, out] -> [..., out].

    The gradient is written out for the sake of the compiler: left to itself, it copies the wide arrays x and dy into
    transposed ones for the products that give dA and dB; here only the narrow ones ever are.
    """
    return (x @ a) @ b


def _low_rank_forward(x, a, b):
    z = x @ a
    return z @ b, (x, z, a, b)


def _low_rank_backward(residuals, dy):
    x, z, a, b = residuals
    dz = dy @ b.T
    da = jnp.einsum("...r,...i->ri", dz, x).T
    db = jnp.einsum("...r,...o->ro", z, dy)
    return dz @ a.T, da, db


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Projection(nn.Module):
    """A dense layer that adds its adapter when, and only when, it is applied with a `lora` collection.

    The base kernel is never modified: adding the adapter to a bfloat16 kernel and rounding would lose most of a
    small update.
    """

    features: int
    use_bias: bool = False
    lora: LoraSpec | None = None  # None: this projection carries no adapter

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if self.lora is None or not (self.is_initializing() or self.has_variable("lora", "a")):
            return y
        rank = self.lora.rank

        def init_a() -> Array:  # PEFT's default: kaiming-uniform with a = sqrt(5), that is +-1/sqrt(in)
            bound = x.shape[-1] ** -0.5
            return jax.random.uniform(self.make_rng("params"), (x.shape[-1], rank), minval=-bound, maxval=bound)

        a = self.variable("lora", "a", init_a).value  # [in, r]
        b = self.variable("lora", "b", jnp.zeros, (rank, self.features)).value  # [r, out]
        z = nn.Dropout(self.lora.dropout, deterministic=deterministic)(x)
        return y + low_rank(z, self.lora.scale * a.astype(x.dtype), b.astype(x.dtype))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    features: int
    hidden: int
    use_bias: bool = False
    lora: LoraSpec | None = None
    lora_names: frozenset[str] = frozenset()

    def setup(self):
        def make(name: str, features: int) -> Projection:
            return Projection(features, self.use_bias, self.lora if name in self.lora_names else None)

        self.gate_proj = make("gate_proj", self.hidden)
        self.up_proj = make("up_proj", self.hidden)
        self.down_proj = make("down_proj", self.features)

    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        h = jax.nn.silu(self.gate_proj(x, deterministic)) * self.up_proj(x, deterministic)
        return self.down_proj(h, deterministic)


def mrope_angles(positions: Array, *, theta: float, sections: tuple[int, int, int]) -> Array:
    """Rotary angles whose consecutive `sections` of the frequencies follow time, height and width (M-RoPE).

    Args:
      positions: int [B, 3, T].

    Returns:
      float32 [B, T, H/2] with H/2 = sum(sections).
    """
    n = sum(sections)
    frequency = theta ** (-jnp.arange(n, dtype=jnp.float32) / n)  # [H/2]
    axis = jnp.repeat(jnp.arange(3), jnp.array(sections), total_repeat_length=n)  # [H/2]
    return jnp.swapaxes(positions, 1, 2).astype(jnp.float32)[..., axis] * frequency


def grid_angles(hw: Array, *, head_size: int, theta: float = 10000.0) -> Array:
    """Rotary angles of a 2-D grid: a quarter of the head follows rows, the next columns, with equal frequencies.

    Args:
      hw: int [..., 2], row and column.

    Returns:
      float32 [..., H/2].
    """
    n = head_size // 4
    frequency = theta ** (-jnp.arange(n, dtype=jnp.float32) / n)
    return (hw.astype(jnp.float32)[..., None] * frequency).reshape(*hw.shape[:-1], 2 * n)


def rotate(x: Array, angles: Array) -> Array:
    """Rotates pairs (i, i + H/2) of each head by `angles`. x: [B, T, N, H]; angles: [B, T, H/2]."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
