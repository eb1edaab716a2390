"""Quantised kernels from a checkpoint's files, tensor by tensor, and the original numbers behind them.

The unquantised model is never in memory as a whole: a process holds a stacked leaf's codes and one layer's original
tensor at a time.
"""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vigos_jax.models.quantization import QuantisedKernel, quantise
from vigos_jax.models.tensor_names import Tensor
from vigos_jax.weights.weight_files import WeightFiles, read_shard

_quantise = jax.jit(quantise, static_argnames="kind")


def read_layer(files: WeightFiles, row: Tensor, layer: int, shape: tuple[int, ...], *, dtype: Any) -> np.ndarray:
    """One layer of a stacked leaf in host memory, [in, out].

    Args:
      shape: of the stacked leaf, [L, in, out].
    """
    index = (slice(layer, layer + 1), *(slice(0, n) for n in shape[1:]))
    return read_shard(files, row, index, dtype=np.dtype(dtype))[0]


def read_quantised(
    files: WeightFiles, row: Tensor, shape: tuple[int, ...], *, kind: str, shardings: QuantisedKernel | None
) -> QuantisedKernel:
    """One stacked kernel of the files, quantised to codes and scales.

    A scale may span several devices' shards, so every process reads whole tensors and keeps its own devices' codes.

    Args:
      shape: of the stacked kernel, [L, in, out].
      shardings: of codes and scales; None for the default device.
    """
    parts: Any = None  # a QuantisedKernel of _Parts
    for layer in range(shape[0]):
        one = _quantise(jnp.asarray(read_layer(files, row, layer, shape, dtype=np.float32)), kind=kind)
        if parts is None:
            of = lambda x, sharding=None: _Parts((shape[0], *x.shape), x.dtype, sharding)  # noqa: E731
            parts = jax.tree.map(of, one) if shardings is None else jax.tree.map(of, one, shardings)
        jax.tree.map(lambda part, x, layer=layer: part.set(layer, np.asarray(x)), parts, one)
        del one
        gc.collect(0)  # jax lets go of the host's copy when Python collects garbage
    return jax.tree.map(lambda part: part.put(), parts)


class _Parts:
    """The parts of a stacked array that this process's devices hold, filled layer by layer in host memory."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None):
        self._shape, self._sharding = shape, sharding
        self._holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        if sharding is None:
            self._holders[tuple((0, n) for n in shape)] = [jax.local_devices()[0]]
        else:
            for device, index in sharding.addressable_devices_indices_map(shape).items():
                index = index or (slice(None),) * len(shape)
                bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
                self._holders.setdefault(bounds, []).append(device)
        self._parts = {bounds: np.empty([b - a for a, b in bounds], dtype) for bounds in self._holders}

    def set(self, layer: int, x: np.ndarray) -> None:
        """Fills one layer."""
        for bounds, part in self._parts.items():
            (first, end), *inside = bounds
            if first <= layer < end:
                part[layer - first] = x[tuple(slice(*b) for b in inside)]

    def put(self) -> jax.Array:
        """The array on the devices; the parts in host memory are free then."""
        arrays = []
        for bounds, devices in self._holders.items():
            part = self._parts.pop(bounds)
            arrays += [jax.device_put(part, device).block_until_ready() for device in devices]
            del part
            gc.collect(0)
        if self._sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)
