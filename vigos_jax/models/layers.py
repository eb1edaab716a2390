"""Building blocks of the vision towers and the decoder: norms, rotary positions, adapted projections, stacks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vigos_jax.models.attention import attention
from vigos_jax.models.attention_masks import Images, Windows
from vigos_jax.models.quantization import QuantisedKernel, is_quantised, matmul
from vigos_jax.models.shapes import Array, Bool, Float, Int


def unroll(layers: int) -> int:
    """Stacks this short compile as fast unrolled, and run a quarter faster on a CPU; long ones stay loops."""
    return layers if layers <= 4 else 1


def rematerialised(layer: type[nn.Module], remat: str, layers: int, *, static: tuple[int, ...] = ()) -> type[nn.Module]:
    """The layer with what its backward pass keeps: see `VisionLanguageModel.remat`.

    Args:
      layers: length of the stack it will be scanned over.
      static: numbers of its arguments that are not arrays, the module itself being 0.
    """
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # In a loop the compiler cannot undo the recomputation; unrolled, it would find the same computation twice.
    return nn.remat(layer, static_argnums=static, prevent_cse=unroll(layers) > 1, policy=policy)


def scanned(layer: type[nn.Module], length: int, *, shared: int) -> type[nn.Module]:
    """A stack of one kind of layer as a loop, with leaves [length, ...].

    Args:
      layer: called with the states, its slice of an array [length, ...], and `shared` arguments that all layers get.
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *[nn.broadcast] * shared),
        length=length,
        unroll=unroll(length),
    )


ROWS = ("data", "fsdp")  # the mesh axes that a batch lies over

# Projections that read the same states.
JOINED = (("q_proj", "k_proj", "v_proj"), ("in_proj_qkv", "in_proj_z"), ("gate_proj", "up_proj"))


def place(x: Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> Array:
    """Shards x's leading dimensions over the given mesh axes (one, several or None each); x itself without a mesh.

    Unconstrained, the compiler may shard hidden states like the weights and compute every row on every device.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


def place_states(x: Float[Array, "B T D"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """Hidden states [B, T, D] in the sharding of the next projection.

    Sequences stay sharded by rows, and each layer's weights are gathered when it runs. A single token is much smaller
    than any weight: it is split over `fsdp` by width like the weights, which then need not be gathered.
    """
    return place(x, mesh, "data", None, "fsdp") if x.shape[1] == 1 else place(x, mesh, ROWS)


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
    """x / rms(x) * (offset + scale), computed in float32."""

    eps: float
    offset: float = 0.0  # 1 if checkpoints store scale - 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Scales [..., D] to a root mean square of one, in float32."""
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * scale + bias, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises [..., D] to mean zero and variance one, in float32."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


@jax.custom_vjp
def low_rank(x: Float[Array, "*batch D"], a: Float[Array, "D r"], b: Float[Array, "r F"]) -> Float[Array, "*batch F"]:
    """x A B.

    The gradient is written by hand: for autodiff's, the compiler copies the wide arrays x and dy into transposed ones
    to compute dA and dB; here only narrow arrays are transposed.
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
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        deterministic: bool = True,
        low: Float[Array, "*batch R"] | None = None,
    ) -> Float[Array, "*batch F"]:
        """Maps [..., in] to [..., features].

        Args:
          low: from `joined_low_rank`, which this projection's own B then multiplies if it has an adapter.
        """
        y = matmul(x, self._kernel(x.shape[-1]))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if low is not None and self.has_variable("lora", "b"):
            return y + low @ self.get_variable("lora", "b")
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

    def _kernel(self, width: int) -> Float[Array, "D F"] | QuantisedKernel:
        """The kernel that it is applied with; flax compares an array's shape with the declared one."""
        given = self.get_variable("params", "kernel")
        if is_quantised(given):
            if given.kernel_shape != (width, self.features):
                raise ValueError(f"a quantised kernel {given.kernel_shape} where {(width, self.features)} is declared")
            return given
        return self.param("kernel", nn.initializers.normal(0.02), (width, self.features))


def joined_low_rank(module: nn.Module, x: Float[Array, "*batch D"]) -> Float[Array, "*batch R"] | None:
    """x A of a module's adapters that read x, as one product; None unless `decoder.join_adapters` joined them."""
    return x @ module.get_variable("lora", "joined") if module.has_variable("lora", "joined") else None


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    features: int
    hidden: int
    use_bias: bool = False
    lora: LoraSpec | None = None
    lora_names: frozenset[str] = frozenset()

    def setup(self):
        """Names the three projections as checkpoints do."""

        def make(name: str, features: int) -> Projection:
            return Projection(features, self.use_bias, self.lora if name in self.lora_names else None)

        self.gate_proj = make("gate_proj", self.hidden)
        self.up_proj = make("up_proj", self.hidden)
        self.down_proj = make("down_proj", self.features)

    def __call__(self, x: Float[Array, "*batch D"], deterministic: bool = True) -> Float[Array, "*batch F"]:
        """Maps [..., D] to [..., features]."""
        low = joined_low_rank(self, x)
        h = jax.nn.silu(self.gate_proj(x, deterministic, low)) * self.up_proj(x, deterministic, low)
        return self.down_proj(h, deterministic)


def mrope_angles(
    positions: Int[Array, "B 3 T"], *, theta: float, sections: tuple[int, ...], interleaved: bool = False
) -> Float[Array, "B T {sum(sections)}"]:
    """Rotary angles of which some follow time, some height and some width (M-RoPE).

    Args:
      sections: number of frequencies for time, height and width.
      interleaved: frequencies alternate (t h w t h w ... t t), and time replaces a section that is used up;
        otherwise each section is one contiguous run.

    Returns:
      float32 [B, T, H/2] with H/2 = sum(sections).
    """
    n = sum(sections)
    frequency = theta ** (-jnp.arange(n, dtype=jnp.float32) / n)  # [H/2]
    if interleaved:
        turn = jnp.arange(n) % 3
        axis = jnp.where(jnp.arange(n) < 3 * jnp.array(sections)[turn], turn, 0)  # [H/2]
    else:
        axis = jnp.repeat(jnp.arange(3), jnp.array(sections), total_repeat_length=n)  # [H/2]
    return jnp.swapaxes(positions, 1, 2).astype(jnp.float32)[..., axis] * frequency


def grid_angles(
    hw: Int[Array, "*batch 2"], *, head_dim: int, theta: float = 10000.0
) -> Float[Array, "*batch {head_dim//2}"]:
    """Rotary angles of a 2-D grid: a quarter of the head follows rows, the next columns, with equal frequencies.

    Args:
      hw: int [..., 2], row and column.

    Returns:
      float32 [..., H/2].
    """
    n = head_dim // 4
    frequency = theta ** (-jnp.arange(n, dtype=jnp.float32) / n)
    return (hw.astype(jnp.float32)[..., None] * frequency).reshape(*hw.shape[:-1], 2 * n)


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T R"]) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + R) of each head's first 2 R dimensions by `angles`; the rest stay as they are."""
    r = angles.shape[-1]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = (x[..., i : i + r].astype(jnp.float32) for i in (0, r))
    rotated = [y.astype(x.dtype) for y in (a * cos - b * sin, b * cos + a * sin)]
    return jnp.concatenate([*rotated, *([x[..., 2 * r :]] if x.shape[-1] > 2 * r else [])], -1)


class VisionAttention(nn.Module):
    """Self-attention of a vision tower over patch slots, inside an image or inside windows of slots.

    Attributes:
      window: slots of a window.
      attention: implementation, from `attention.choose`.
      mesh: what the attention kernels are split over; None for one device.
    """

    num_heads: int
    window: int
    attention: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Float[Array, "B S A"],
        image_ids: Int[Array, "B S"],
        is_full: Bool[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """Attends over the patch slots of each row; is_full: None for always."""
        b, s, d = x.shape
        qkv = Projection(3 * d, use_bias=True, name="qkv")(x).reshape(b, s, 3, self.num_heads, d // self.num_heads)
        q, k, v = rotate(qkv[:, :, 0], angles), rotate(qkv[:, :, 1], angles), qkv[:, :, 2]

        attend = functools.partial(attention, implementation=self.attention, mesh=self.mesh)

        def within(q, k, v, ids):
            return attend(q, k, v, Images(ids, most=s))  # an image has a slot at least

        def windowed(q, k, v, ids):
            return attend(q, k, v, Windows(ids, most=s, window=self.window))

        if is_full is None:
            out = within(q, k, v, image_ids)
        else:
            out = jax.lax.cond(is_full, within, windowed, q, k, v, image_ids)
        return Projection(d, use_bias=True, name="proj")(out.reshape(b, s, d))
