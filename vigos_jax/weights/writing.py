"""Checkpoints as Hugging Face folders hold them, layer by layer: one tensor in memory at a time."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.quantization import is_quantised
from vigos_jax.models.tensor_names import Tensor
from vigos_jax.weights.quantised import read_layer
from vigos_jax.weights.reading import float32_names, leaves
from vigos_jax.weights.safetensors_file import DTYPES, byte_count, write_file
from vigos_jax.weights.weight_files import WeightFiles


@dataclasses.dataclass(frozen=True, eq=False)
class FileTensor:
    """A lazy tensor in a checkpoint's layout, computed on each access and not cached.

    If its leaf is sharded over several processes, all of them must access it, in the same order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)


def stream_tensors(
    tree: Any,
    table: list[Tensor],
    config: ModelConfig,
    *,
    dtype: Any,
    files: WeightFiles | None = None,
    lora: Any = None,
    scale: float = 1.0,
) -> Iterator[tuple[str, FileTensor]]:
    """Yields (name in the file, lazy tensor) for every tensor of the table.

    Args:
      files: the files the tree was read from: float32 islands stored in float32 stay float32, and quantised kernels
        are written with their original values, not with dequantised codes.
      lora: adapters to merge into the tree's kernels: W + scale * A B, added in float32 and rounded once, to `dtype`.
    """
    by_path, adapters = dict(leaves(tree)), dict(leaves(lora or {}))
    float32 = float32_names(files, table) if files is not None else set()
    for row in table:
        leaf, module = by_path[row.path], row.path[:-1]
        adapted = row.path[-1] == "kernel" and (*module, "a") in adapters
        adapter = (adapters[*module, "a"], adapters[*module, "b"]) if adapted else None
        leaf_shape = leaf.kernel_shape if is_quantised(leaf) else leaf.shape
        shape = row.shape_in_file(leaf_shape[1:] if row.stacked else leaf_shape, config)
        if is_quantised(leaf):
            if files is None:
                raise ValueError(f"{row.path} is quantised, and no files were given to read its numbers from")
            read = functools.partial(read_layer, files, row, shape=leaf_shape, dtype=np.float32)
            for i, name in enumerate(row.names()):
                make = functools.partial(_make_from_file, read, adapter, i, scale, dtype=np.dtype(dtype), shape=shape)
                yield name, FileTensor(shape, np.dtype(dtype), make)
            continue
        for i, name in enumerate(row.names()):
            written = np.dtype(np.float32 if name in float32 else dtype)
            make = functools.partial(
                _make, leaf, adapter, i if row.stacked else None, scale,
                transposed=row.layout != "same", dtype=written, shape=shape,
            )  # fmt: skip
            yield name, FileTensor(shape, written, make)


def copied_tensors(files: WeightFiles, names: Iterable[str]) -> Iterator[tuple[str, FileTensor]]:
    """Yields tensors of other files as they stand there; InputError for a dtype that cannot be written."""
    for name in names:
        stored = files.stored(name)
        if stored.dtype not in DTYPES:
            raise InputError(f"{stored.path}: {name} has dtype {stored.dtype}; choices: {', '.join(DTYPES)}")
        yield name, FileTensor(stored.shape, DTYPES[stored.dtype], functools.partial(files.tensor, name))


def file_tensors(
    tree: Any, table: list[Tensor], config: ModelConfig, *, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (file name, array) for every tensor of the table."""
    for name, x in stream_tensors(tree, table, config, dtype=dtype):
        yield name, np.asarray(x)


def _make_from_file(read, adapter, layer: int, scale: float, *, dtype: np.dtype, shape) -> np.ndarray:
    taken = None if adapter is None else tuple(x[layer] for x in adapter)
    return _make(read(layer), taken, None, scale, transposed=True, dtype=dtype, shape=shape)


def _make(leaf, adapter, layer: int | None, scale: float, *, transposed: bool, dtype: np.dtype, shape) -> np.ndarray:
    x = _in_file(leaf, adapter, layer, scale, transposed=transposed, dtype=dtype)
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x).reshape(shape)


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _in_file(leaf, adapter, layer, scale, *, transposed: bool, dtype: np.dtype):
    """One layer of a leaf ([L, ...]; None: the leaf itself), with its adapter, in the file's layout and dtype."""
    take = lambda x: x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
    x = take(leaf)
    if adapter is not None:
        a, b = take(adapter[0]), take(adapter[1])  # [in, r], [r, out]
        x = x.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")
    return (x.T if transposed else x).astype(dtype)


def gather(tensors: Iterable[tuple[str, Any]]) -> None:
    """Takes part in gathering the tensors in a process that does not write them."""
    for _, x in tensors:
        np.asarray(x)


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|shard-\d+\.tmp")


def save_sharded(folder: pathlib.Path, tensors: Iterable[tuple[str, Any]], *, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered shards and their index when the tensors exceed one shard.

    Earlier weights in the folder are deleted once all new ones are written. All processes must call this; the first
    one writes.

    Args:
      tensors: (name, array or `FileTensor`), written in this order, one of them in memory at a time.
    """
    shards: list[list[tuple[str, Any]]] = [[]]
    size = total = 0
    for name, x in tensors:
        n = byte_count(x)
        if shards[-1] and size + n > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, x))
        size, total = size + n, total + n
    if jax.process_index() != 0:
        for shard in shards:
            gather(shard)
        return
    temporary = [folder / f"shard-{i}.tmp" for i in range(len(shards))]
    for path, shard in zip(temporary, shards, strict=True):
        write_file(path, shard)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path not in temporary:
            path.unlink()
    if len(shards) == 1:
        temporary[0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, shard) in enumerate(zip(temporary, shards, strict=True)):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
