"""The KV cache for decoding, with separate key and value arrays per layer.

A single array for all layers would be copied: a matrix product reads an operand in place only if it reads all of it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.attention import for_heads, over_mesh
from vigos_jax.models.shapes import Array, Bool, Float, Int

_MASKED = -1e30


class KeyValues(flax.struct.PyTreeNode):
    """Keys and values of one layer, S slots of B rows.

    Attributes:
      k, v: [B, K, S, H]: a product over one head's slots reads them in order. cuDNN wants [B, S, K, H].
      slots_axis: static, which of the dimensions is S: 2 or 1.
    """

    k: Float[Array, "B _ _ H"]
    v: Float[Array, "B _ _ H"]
    slots_axis: int = flax.struct.field(pytree_node=False, default=2)

    @property
    def slots(self) -> int:
        """S."""
        return self.k.shape[self.slots_axis]

    def write(self, new: "KeyValues", at: Int[Array, ""]) -> "KeyValues":
        """With `new` of the same layout in the slots from `at` on."""
        start = [jnp.int32(0)] * 4
        start[self.slots_axis] = at
        put = jax.lax.dynamic_update_slice
        return self.replace(k=put(self.k, new.k.astype(self.k.dtype), start), v=put(self.v, new.v, start))

    def padded(self, slots: int) -> "KeyValues":
        """With so many more slots at the end, zeros."""
        widths = [(0, slots if axis == self.slots_axis else 0) for axis in range(4)]
        return self.replace(k=jnp.pad(self.k, widths), v=jnp.pad(self.v, widths))


class Cached(flax.struct.PyTreeNode):
    """Which slots of a cache one new token of each row attends to.

    Attributes:
      visible: the token's own among them.
      write_at: the slot where its key and value go.
    """

    visible: Bool[Array, "B S"]
    write_at: Int[Array, ""]


class Cache(flax.struct.PyTreeNode):
    """What every layer keeps, and the slot where the next token goes.

    Attributes:
      layers: an entry per layer: `KeyValues`, or what a family's layers keep instead.
    """

    layers: tuple[Any, ...]
    write_at: Int[Array, ""]


def slots_axis(implementation: str, *, head_dim: int, kv_heads: int, mesh: Mesh | None) -> int:
    """The layout of `KeyValues` for an implementation of attention, see `attention.choose`.

    cuDNN needs whole heads on each device: if `tensor` does not divide them, XLA computes attention to the cache.
    """
    is_split = mesh is not None and kv_heads % mesh.shape["tensor"] != 0
    return 1 if for_heads(implementation, head_dim) == "cudnn" and not is_split else 2


def key_values(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, axis: int) -> KeyValues:
    """Keys and values as projections make them, in the layout whose slots are dimension `axis`."""
    if axis == 2:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return KeyValues(k, v, axis)


def attend(
    q: Float[Array, "B 1 N H"], cached: KeyValues, visible: Bool[Array, "B S"], *, mesh: Mesh | None = None
) -> Float[Array, "B 1 N H"]:
    """Attention of one token a row to the visible slots; logits and softmax are float32.

    Args:
      cached: N is a multiple of its K. In cuDNN's layout it is cuDNN's.
      mesh: over which cuDNN splits rows and heads.
    """
    if cached.slots_axis == 1:
        return over_mesh(_by_cudnn, q, cached.k, cached.v, visible, mesh=mesh)
    b, _, n, h = q.shape
    q = q.reshape(b, cached.k.shape[1], -1, h)  # [B, K, G, H]: G query heads read one key/value head
    logits = jnp.einsum("bkgh,bksh->bkgs", q, cached.k, preferred_element_type=jnp.float32) * h**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, _MASKED), -1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(cached.v.dtype), cached.v)
    return out.reshape(b, 1, n, h)


def _by_cudnn(q, k, v, visible):
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None], implementation="cudnn")
