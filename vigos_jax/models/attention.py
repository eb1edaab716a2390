"""Attention, and the one place where its implementation is chosen: XLA everywhere, cuDNN on GPUs, splash on TPUs.

The fused kernels serve whatever `attention_masks` describes; dense masks (a token over its cache) are XLA's.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vigos_jax.errors import InputError
from vigos_jax.models import cudnn_attention as cudnn
from vigos_jax.models.attention_masks import Branches, Described, Images, Windows
from vigos_jax.models.attention_rows import branch_by_branch, windows_as_rows
from vigos_jax.models.masked_attention import masked_attention
from vigos_jax.models.shapes import Array, Bool, Float


def choose(asked: str, *, platform: str, dtype: Any, is_served: bool = True) -> str:
    """The implementation for what `config.model.attention` asks; "auto" is the device's fast one, where it has one.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of computation; the fast kernels multiply in 16 bits.
      is_served: false for devices that the platform's fast kernel does not run on, see `has_fused`.

    Raises:
      InputError: what is asked for does not run there.
    """
    fast = {"gpu": "cudnn" if is_served else None, "tpu": "splash"}.get(platform)
    if jnp.dtype(dtype) == jnp.float32:
        fast = None
    if asked == "auto":
        return fast or "xla"
    if asked not in ("xla", fast):
        choices = ", ".join(("auto", "xla", fast) if fast else ("auto", "xla"))
        card = "" if is_served else " before Ampere"
        raise InputError(
            f"config.model.attention={asked!r} does not run on {platform}{card} in {jnp.dtype(dtype)}; "
            f"choices: {choices}"
        )
    return asked


def has_fused(device: Any) -> bool:
    """Whether the fused kernel of its platform runs on a device: cuDNN's needs an NVIDIA card from Ampere on."""
    capability = getattr(device, "compute_capability", None)
    return capability is None or float(capability) >= 8.0


def for_heads(implementation: str, head_dim: int) -> str:
    """`implementation`, chosen for the device, or "xla" if it does not support heads of this width."""
    if implementation == "cudnn" and (head_dim > cudnn.MAX_HEAD_DIM or head_dim % 8):
        return "xla"
    return implementation


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Described | Bool[Array, "B T S"],
    *,
    implementation: str = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped key/value heads.

    Args:
      q, k, v: N is a multiple of K. T = S where the mask is described, not dense.
      mask: true where query t attends to key s, or its description. A query that attends to nothing gives a finite
        result.
      implementation: "xla", "cudnn" or "splash", from `choose`, for described masks; dense ones are XLA's.
      mesh: fused kernels split rows and heads over it, and XLA's parts are sized by it; None for one device.

    Returns:
      In q's dtype; logits and softmax are float32.
    """
    if not isinstance(mask, Described):
        return masked_attention(q, k, v, mask, mesh=mesh)
    told_apart = Images(mask.ids, mask.most) if isinstance(mask, Windows) else mask
    kernel = for_heads(implementation, cudnn.width(q.shape[-1], told_apart))
    if kernel == "xla" or (isinstance(mask, Branches) and mask.most is None):
        by_xla = functools.partial(masked_attention, mesh=mesh)
        return windows_as_rows(q, k, v, mask, by_xla) if isinstance(mask, Windows) else by_xla(q, k, v, mask)
    fused = {"cudnn": by_cudnn, "splash": by_splash}[kernel]
    return over_mesh(fused, q, k, v, mask, mesh=mesh)


def by_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Described,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention under any description by cuDNN. implementation: see `cudnn_attention`."""
    attend = functools.partial(cudnn.cudnn_attention, implementation=implementation)
    if isinstance(mask, Branches):
        return branch_by_branch(q, k, v, mask, attend)
    return windows_as_rows(q, k, v, mask, attend) if isinstance(mask, Windows) else attend(q, k, v, mask)


def by_splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Described,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention under any description by splash. interpret: see `splash_attention`."""
    from vigos_jax.models.splash_attention import splash_attention  # Pallas takes a second to import

    attend = functools.partial(splash_attention, interpret=interpret)
    return branch_by_branch(q, k, v, mask, attend) if isinstance(mask, Branches) else attend(q, k, v, mask)


def over_mesh(
    function: Any,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Any,
    *,
    mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
    """function(q, k, v, mask) on every device's rows and heads: the compiler cannot split a kernel by itself."""
    if mesh is None or mesh.size == 1:
        return function(q, k, v, mask)
    n, kv_heads, tensor = q.shape[2], k.shape[2], mesh.shape["tensor"]
    if n % tensor == 0 and kv_heads % tensor:  # every part needs a head of its own
        k, v = (jnp.repeat(x, n // kv_heads, axis=2) for x in (k, v))
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor" if n % tensor == 0 else None)
    # The kernels' own arrays carry no sharding, which the check would refuse.
    return jax.shard_map(function, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        q, k, v, mask
    )
