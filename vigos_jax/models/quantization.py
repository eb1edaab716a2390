"""Kernels of the frozen base in fewer bits: int8 with a scale per output channel, or nf4 in blocks of 64.

Only the decoder's large projections are quantised: norms, biases, the embedding, the head and the vision tower, whose
widths no block divides, keep the model's dtype. `qwix` computes the codes. Matrix products are implemented here: a
table look-up is a gather, which a TPU runs at a small fraction of its memory bandwidth, so codes are decoded by selects
that fuse into one pass.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.models.shapes import Array, Float, Num
from vigos_jax.models.tensor_names import DELTA_PROJECTIONS, LANGUAGE_PROJECTIONS

BLOCK = 64  # numbers of a column that share a scale in nf4
_HALF = BLOCK // 2
# The quantiles of a normal distribution, between -1 and 1, that 4-bit codes stand for (arXiv:2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class QuantisedKernel(flax.struct.PyTreeNode):
    """A kernel [in, out], or layers of them [L, in, out], as codes and scales.

    Attributes:
      codes: for int8 the values, int8 [..., in, out]. For nf4 two codes per byte, uint8 [..., in/2, out]: byte
        32 t + k holds row 64 t + k in its low and row 64 t + 32 + k in its high half, so that whole blocks stay
        together if the input axis is sharded.
      scales: for int8 float32 [..., 1, out]; for nf4 bfloat16 [..., in/64, out].
      kind: "int8" or "nf4"; static.
    """

    codes: Num[Array, "*layers I O"]
    scales: Float[Array, "*layers T O"]
    kind: str = flax.struct.field(pytree_node=False)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel that it stands for."""
        *layers, rows, out = self.codes.shape
        return (*layers, rows if self.kind == "int8" else 2 * rows, out)


def is_quantised(node: Any) -> bool:
    """Whether a node of a parameter tree is a quantised kernel. For the `is_leaf` of jax.tree functions."""
    return isinstance(node, QuantisedKernel)


def has_quantised(tree: Any) -> bool:
    """Whether any kernel of a parameter tree is quantised."""
    return any(map(is_quantised, jax.tree.leaves(tree, is_leaf=is_quantised)))


def is_quantisable(path: tuple[str, ...]) -> bool:
    """Whether the leaf at this path of a `params` tree is the kernel of a decoder projection."""
    return path[0] == "layers" and path[-1] == "kernel" and path[-2] in (*LANGUAGE_PROJECTIONS, *DELTA_PROJECTIONS)


def check_width(rows: int, kind: str, *, name: str) -> None:
    """Raises InputError where nf4's blocks do not divide the input of a kernel."""
    if kind == "nf4" and rows % BLOCK:
        raise InputError(
            f"config.model.quantization=nf4 needs inputs that are multiples of {BLOCK}, and {name} has {rows}; "
            "choices: none, int8"
        )


def quantised_shapes(params: Any, kind: str) -> Any:
    """A `params` tree of shapes as the base of this kind has it: quantised nodes where the kernels were.

    Args:
      params: of `abstract_variables`.
      kind: "none" leaves it as it is.

    Raises:
      InputError: nf4's blocks do not divide a kernel.
    """
    if kind == "none":
        return params

    def of(path: Any, leaf: Any) -> Any:
        keys = tuple(k.key for k in path)
        if not is_quantisable(keys):
            return leaf
        check_width(leaf.shape[-2], kind, name="/".join(keys))
        return jax.eval_shape(lambda kernel: _empty(kernel, kind), leaf)

    return jax.tree_util.tree_map_with_path(of, params)


def _empty(kernel: Array, kind: str) -> QuantisedKernel:
    *layers, rows, out = kernel.shape
    if kind == "int8":
        return QuantisedKernel(
            jnp.zeros((*layers, rows, out), jnp.int8), jnp.zeros((*layers, 1, out), jnp.float32), kind
        )
    codes = jnp.zeros((*layers, rows // 2, out), jnp.uint8)
    return QuantisedKernel(codes, jnp.zeros((*layers, rows // BLOCK, out), jnp.bfloat16), kind)


# -- codes ------------------------------------------------------------------------------------------------------


def quantise(kernel: Float[Array, "I O"], kind: str) -> QuantisedKernel:
    """The codes and scales of one kernel.

    Args:
      kind: "int8" or "nf4".
    """
    import qwix

    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        q = qwix.quantize(kernel, jnp.int8, channelwise_axes=(1,))
        return QuantisedKernel(q.qvalue, q.scale, kind)
    q = qwix.quantize(kernel, "nf4", channelwise_axes=(1,), tiled_axes={0: BLOCK})
    codes = q.qvalue.astype(jnp.uint8).reshape(-1, 2, _HALF, kernel.shape[1])
    packed = codes[:, 0] | (codes[:, 1] << 4)  # [T, 32, out]
    return QuantisedKernel(packed.reshape(-1, kernel.shape[1]), q.scale.astype(jnp.bfloat16), kind)


def nf4_values(codes: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What 4-bit codes (of any integer dtype) stand for, float32: a tree of selects, a level for each bit."""
    bit = (codes & 1).astype(jnp.float32)
    # The lowest level is arithmetic, exact for these numbers: selects between constants would become kernel-sized
    # constant arrays, which jax hoists out of a loop over layers and keeps in memory.
    pairs = zip(np.asarray(NF4[::2], np.float32), np.asarray(NF4[1::2], np.float32), strict=True)
    values = [bit * float(high - low) + float(low) for low, high in pairs]
    for level in (1, 2, 3):
        is_set = (codes >> level) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def dequantise(kernel: QuantisedKernel, dtype: Any) -> Float[Array, "*layers D F"]:
    """The kernel that codes and scales stand for, computed in float32 and rounded once."""
    if kernel.kind == "int8":
        return (kernel.codes.astype(jnp.float32) * kernel.scales).astype(dtype)
    *layers, blocks, out = kernel.scales.shape
    packed = kernel.codes.reshape(*layers, blocks, _HALF, out)
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2).astype(jnp.int32)  # [..., T, 64, out]
    values = nf4_values(codes) * kernel.scales.astype(jnp.float32)[..., None, :]
    # In this order no bf16 kernel is written to a TPU's memory while single tokens are decoded.
    return values.astype(dtype).reshape(*layers, blocks * BLOCK, out)


# -- products ---------------------------------------------------------------------------------------------------


def matmul(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"] | QuantisedKernel) -> Float[Array, "*batch F"]:
    """x W in the dtype of x, for a kernel that is an array or quantised. No gradient flows to a quantised one."""
    if isinstance(kernel, QuantisedKernel):
        return _quantised_matmul(x, kernel)
    return x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _quantised_matmul(x, kernel):
    if kernel.kind == "nf4":
        return x @ dequantise(kernel, x.dtype)
    y = jnp.matmul(x, kernel.codes.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * kernel.scales[0]).astype(x.dtype)  # int8 is exact in bfloat16, and a rounded scale would not be


def _quantised_forward(x, kernel):
    # What is kept for the gradient are the codes: left to itself, it keeps every layer's dequantised kernel.
    return _quantised_matmul(x, kernel), kernel


def _quantised_backward(kernel, dy):
    if kernel.kind == "nf4":
        return dy @ dequantise(kernel, dy.dtype).T, None
    dy = (dy.astype(jnp.float32) * kernel.scales[0]).astype(dy.dtype)
    return dy @ kernel.codes.astype(dy.dtype).T, None


_quantised_matmul.defvjp(_quantised_forward, _quantised_backward)
