"""Base parameters from a Hugging Face folder, by the family's table of tensors, shard by shard."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import FAMILIES, tensor_table
from vigos_jax.models.quantization import is_quantised
from vigos_jax.models.tensor_names import Path, Tensor, canonical
from vigos_jax.models.variables import is_float32_island
from vigos_jax.runtime.progress import say
from vigos_jax.weights.quantised import read_quantised
from vigos_jax.weights.safetensors_file import DTYPES
from vigos_jax.weights.weight_files import WeightFiles, holds_weights, open_weights, read_leaf, some

_HEAD = "lm_head.weight"
_ROWS = 4096  # of head and embedding, compared at a time


def load_config(folder: pathlib.Path) -> ModelConfig:
    """The model config of a folder: its config.json, with tied embeddings checked against the weights.

    As in transformers, weights with an output head that differs from the embedding override `tie_word_embeddings`: the
    model is untied, which is logged. For a folder without weights, config.json alone decides.

    Raises:
      InputError: the config or a header of the weights is missing or broken.
    """
    config = ModelConfig.load(folder)
    if not config.tie_embeddings or not holds_weights(folder):
        return config
    files, embedding = open_weights(folder), _embedding(tensor_table(config)).name
    if _HEAD not in files or embedding not in files or _are_equal(files, _HEAD, embedding):
        return config
    say(
        f"{folder}: config.json has tie_word_embeddings=true, but the weights hold an {_HEAD} that is not the "
        "embedding; it is used, as transformers does"
    )
    return dataclasses.replace(config, tie_embeddings=False)


def _embedding(table: list[Tensor]) -> Tensor:
    return next(row for row in table if row.path == ("embedding",))


def _are_equal(files: WeightFiles, a: str, b: str) -> bool:
    """Whether two tensors hold the same numbers."""
    if files.stored(a).shape != files.stored(b).shape or {files.stored(n).dtype for n in (a, b)} - DTYPES.keys():
        return False
    x, y = files.tensor(a), files.tensor(b)
    if x.dtype == y.dtype:  # bits are compared faster, and NaN is equal to itself
        x, y = (t.view(f"u{t.dtype.itemsize}") for t in (x, y))
    else:
        x, y = (t.astype(np.float32) for t in (x, y))
    return all(np.array_equal(x[i : i + _ROWS], y[i : i + _ROWS]) for i in range(0, len(x), _ROWS))


def carried_names(files: WeightFiles, config: ModelConfig) -> list[str]:
    """Names of the tensors that no role reads, and an export copies; see `Family.carried`."""
    return sorted(name for name in files.names() if name.startswith(FAMILIES[config.family].carried))


def float32_names(files: WeightFiles, table: list[Tensor]) -> set[str]:
    """Names of the float32 islands that the files hold in float32: what is written again is float32 there too."""
    islands = (name for row in table if is_float32_island(row.path) for name in row.names())
    return {name for name in islands if files.stored(name).dtype == "F32"}


def check_tensors(
    files: WeightFiles, table: list[Tensor], shapes: Mapping[Path, tuple[int, ...]], where: str, ignore=()
) -> None:
    """Compares all names, shapes and dtypes with the table and reports every mismatch at once."""
    problems = []
    rows = {canonical(name): row for row in table for name in row.names()}
    named = {canonical(name): name for row in table for name in row.names()}
    present = files.names() - set(ignore)
    hint = " (where it is the embedding: tie_word_embeddings=true in config.json)"
    problems += [f"missing {named[n]}{hint if n == _HEAD else ''}" for n in sorted(rows.keys() - present)]
    problems += [f"unexpected {n}" for n in sorted(present - rows.keys())]
    for name in sorted(rows.keys() & present):
        row, stored = rows[name], files.stored(name)
        if stored.dtype not in DTYPES:
            problems.append(f"{name} has dtype {stored.dtype}, not one of {', '.join(DTYPES)}")
        shape = stored.shape
        flat = (shape[0], int(np.prod(shape[1:]))) if row.layout in ("conv", "depthwise") and shape else shape
        ours = flat if row.layout == "same" else flat[::-1]
        want = shapes[row.path][1:] if row.stacked else shapes[row.path]
        if ours != want:
            wanted = want if row.layout == "same" else want[::-1]
            problems.append(f"{name} has shape {list(flat)}, expected {list(wanted)}")
    if problems:
        raise InputError(
            f"{where} must fit the model of its config.json, and has {len(problems)} problem(s): "
            f"{some(problems, '; ', shown=12)}"
        )


def read_tree(files: WeightFiles, table: list[Tensor], abstract: Any, where: str, *, dtype: Any, shardings: Any) -> Any:
    """Reads leaf by leaf, and each leaf shard by shard; one error lists all tensors that are not finite."""
    shardings_by_path = dict(leaves(shardings)) if shardings is not None else {}
    wanted = dict(leaves(abstract))
    out: dict[str, Any] = {}
    for row in table:
        node = out
        for key in row.path[:-1]:
            node = node.setdefault(key, {})
        sharding, leaf = shardings_by_path.get(row.path), wanted[row.path]
        if is_quantised(leaf):
            x = read_quantised(files, row, leaf.kernel_shape, kind=leaf.kind, shardings=sharding)
        else:
            leaf_dtype = np.dtype(np.float32 if is_float32_island(row.path) else dtype)
            x = read_leaf(files, row, leaf.shape, dtype=leaf_dtype, sharding=sharding)
        node[row.path[-1]] = x
    if files.not_finite:
        bad = some(sorted(files.not_finite))
        raise InputError(
            f"{where}: {len(files.not_finite)} tensor(s) hold NaN or infinity in {np.dtype(dtype)}, and must not: {bad}"
        )
    return out


def leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of a tree of dicts; a quantised kernel is one leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantised)[0]:
        yield tuple(k.key for k in path), leaf


def load_params(folder: pathlib.Path, config: ModelConfig, abstract: Any, *, dtype: Any, shardings: Any = None) -> Any:
    """Reads the base parameters of a Hugging Face folder; each process reads its own devices' shards.

    Besides the devices' arrays, memory holds one shard of one stacked leaf at a time (`quantised`: its codes).

    Args:
      folder: holds model.safetensors, or shards and their index; float32, bfloat16 or float16.
      config: from `load_config`.
      abstract: the `params` tree of shapes from `abstract_variables`, or `quantised_shapes` of it, whose quantised
        kernels are quantised as they are read.
      dtype: of the returned leaves, except float32 islands, codes and scales.
      shardings: a tree of Shardings like `abstract`, or None for the default device.

    Raises:
      InputError: before any weight is read, if a file is missing or broken, or with a list of all missing, extra and
        wrong-shaped tensors; after reading, with a list of all tensors that are not finite in the file or once rounded.
    """
    files, table = open_weights(folder), tensor_table(config)
    shapes = {path: leaf.kernel_shape if is_quantised(leaf) else leaf.shape for path, leaf in leaves(abstract)}
    ignore = carried_names(files, config)
    if config.tie_embeddings and _HEAD in files:
        # Stored twice, or only as the head, by tools that keep one of two tensors sharing memory.
        embedding = _embedding(table)
        if embedding.name in files:
            ignore.append(_HEAD)
        else:
            table[table.index(embedding)] = dataclasses.replace(embedding, name=_HEAD)
    check_tensors(files, table, shapes, str(folder), ignore)
    return read_tree(files, table, abstract, str(folder), dtype=dtype, shardings=shardings)
