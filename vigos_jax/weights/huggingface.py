"""Hugging Face checkpoints in and out, by the tables of `names`: shard by shard in, layer by layer out."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import adapter_table, tensor_table
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.tensor_names import LANGUAGE_PROJECTIONS, MLP_PROJECTIONS, Path, Tensor, canonical
from vigos_jax.weights.safetensors_file import DTYPES, byte_count, write_file
from vigos_jax.weights.weight_files import WeightFiles, open_weights, read_leaf, some

# -- reading ----------------------------------------------------------------------------------------------------


def _check(
    files: WeightFiles, table: list[Tensor], shapes: Mapping[Path, tuple[int, ...]], where: str, ignore=()
) -> None:
    """Compares all names, shapes and dtypes with the table and reports every mismatch at once."""
    problems = []
    rows = {canonical(name): row for row in table for name in row.names()}
    named = {canonical(name): name for row in table for name in row.names()}
    present = files.names() - set(ignore)
    problems += [f"missing {named[n]}" for n in sorted(rows.keys() - present)]
    problems += [f"unexpected {n}" for n in sorted(present - rows.keys())]
    for name in sorted(rows.keys() & present):
        row, stored = rows[name], files.stored(name)
        if stored.dtype not in DTYPES:
            problems.append(f"{name} has dtype {stored.dtype}, not one of {', '.join(DTYPES)}")
        shape = stored.shape
        flat = (shape[0], int(np.prod(shape[1:]))) if row.layout == "conv" and shape else shape
        ours = flat if row.layout == "same" else flat[::-1]
        want = shapes[row.path][1:] if row.stacked else shapes[row.path]
        if ours != want:
            wanted = want if row.layout == "same" else want[::-1]
            problems.append(f"{name} has shape {list(flat)}, expected {list(wanted)}")
    if problems:
        raise InputError(f"{where} does not fit the model: {len(problems)} problem(s): {some(problems, '; ')}")


def _read_tree(
    files: WeightFiles, table: list[Tensor], abstract: Any, where: str, *, dtype: Any, shardings: Any
) -> Any:
    """Reads leaf by leaf, and each leaf shard by shard; one error lists all tensors that are not finite."""
    shardings_by_path = dict(_leaves(shardings)) if shardings is not None else {}
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract)}
    out: dict[str, Any] = {}
    for row in table:
        node = out
        for key in row.path[:-1]:
            node = node.setdefault(key, {})
        sharding = shardings_by_path.get(row.path)
        node[row.path[-1]] = read_leaf(files, row, shapes[row.path], dtype=np.dtype(dtype), sharding=sharding)
    if files.not_finite:
        bad = some(sorted(files.not_finite))
        raise InputError(f"{where}: {len(files.not_finite)} tensor(s) hold NaN or infinity in {np.dtype(dtype)}: {bad}")
    return out


def _leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(k.key for k in path), leaf


def load_params(folder: pathlib.Path, config: ModelConfig, abstract: Any, *, dtype: Any, shardings: Any = None) -> Any:
    """Reads the base parameters of a Hugging Face folder, each process the bytes of its own devices' shards.

    Beside what the devices hold, host memory holds one shard of one stacked leaf.

    Args:
      folder: holds model.safetensors, or shards and their index; float32, bfloat16 or float16.
      abstract: the `params` tree of shapes from `abstract_variables`.
      dtype: of the returned leaves.
      shardings: a tree of Shardings like `abstract`, or None for the default device.

    Raises:
      InputError: before any weight is read, if a file is missing or broken; one error lists every missing, extra and
        wrong-shaped tensor. After it, one lists every tensor that is not finite, in the file or when it is rounded.
    """
    table = tensor_table(config)
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract)}
    # A tied checkpoint may still carry a copy of its embedding as lm_head.
    ignore = ("lm_head.weight",) if config.tie_embeddings else ()
    files = open_weights(folder)
    _check(files, table, shapes, str(folder), ignore)
    return _read_tree(files, table, abstract, str(folder), dtype=dtype, shardings=shardings)


# What would change the forward pass without a trace in the tensors, or ask for more than this program does.
_REFUSED_OPTIONS = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "alora_invocation_tokens",
)
_MAX_RANK = 2**16  # far above any adapter's: what is larger is a broken file
_PLAIN_INITS = ("gaussian", "orthogonal", "eva")  # leave the base weights as they are


def adapter_spec(folder: pathlib.Path, *, dropout: float) -> LoraSpec:
    """What a PEFT adapter folder says of itself: rank, scale and adapted modules.

    Args:
      dropout: used while training on; the file's own dropout is what it was trained with.

    Raises:
      InputError: not a plain LoRA, or its tensors name modules this program does not adapt.
    """
    path = folder / "adapter_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = raw["r"], raw["lora_alpha"]
        if type(rank) is not int or type(alpha) not in (int, float) or not 0 < alpha < 1e30:
            raise ValueError(f"r {rank!r} must be a whole number, lora_alpha {alpha!r} a positive one")
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; a PEFT adapter folder needs it") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{path} is not a PEFT LoRA config: {e!r}") from e
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; choices: LORA")
    if not 1 <= rank <= _MAX_RANK:
        raise InputError(f"{path}: r={rank} must be from 1 to {_MAX_RANK}")
    for field in _REFUSED_OPTIONS:
        if raw.get(field):
            raise InputError(f"{path}: {field}={raw[field]!r} is not supported; it must be empty or false")
    if raw.get("bias", "none") != "none":
        raise InputError(f"{path}: bias={raw['bias']!r} is not supported; choices: none")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights={init!r} is not supported, as it changes the base weights too; "
            f"choices: true, false, {', '.join(_PLAIN_INITS)}"
        )
    language, vision = set(), set()
    for name in WeightFiles([folder / "adapter_model.safetensors"]).names():
        module = name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight").rsplit(".", 1)[-1]
        if ".language_model.layers." in name and module in LANGUAGE_PROJECTIONS:
            language.add(module)
        elif ".visual.blocks." in name and ".mlp." in name and module in MLP_PROJECTIONS:
            vision.add(module)
        else:
            raise InputError(
                f"{folder}: adapter tensor {name} is on a module that cannot carry one here; choices: the decoder's "
                f"{', '.join(LANGUAGE_PROJECTIONS)}, and {', '.join(MLP_PROJECTIONS)} of Qwen2.5-VL's vision blocks"
            )
    if not language | vision:
        raise InputError(f"{folder}/adapter_model.safetensors holds no adapter tensor; it must hold lora_A and lora_B")
    scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
    return LoraSpec(rank, scale, dropout, frozenset(language), frozenset(vision))


def load_adapter(folder: pathlib.Path, config: ModelConfig, lora: LoraSpec, abstract: Any, *, shardings: Any = None):
    """Reads a PEFT adapter as a float32 `lora` collection of the shapes in `abstract`."""
    table = adapter_table(config, lora)
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract)}
    files = WeightFiles([folder / "adapter_model.safetensors"])
    _check(files, table, shapes, str(folder))
    return _read_tree(files, table, abstract, str(folder), dtype=np.float32, shardings=shardings)


# -- writing ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor as a checkpoint will hold it, made anew each time it is asked for and kept by nobody.

    Where its leaf is spread over several processes, all of them must ask for it, in the same order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)


def stream_tensors(
    tree: Any, table: list[Tensor], config: ModelConfig, *, dtype: Any, lora: Any = None, scale: float = 1.0
) -> Iterator[tuple[str, FileTensor]]:
    """Yields (file name, tensor to be) for every tensor of the table.

    Args:
      lora: adapters of some of the tree's kernels, merged into them: W + scale * A B is added in float32 and rounded
        once, to `dtype`.
    """
    by_path, adapters = dict(_leaves(tree)), dict(_leaves(lora or {}))
    for row in table:
        leaf, module = by_path[row.path], row.path[:-1]
        adapted = row.path[-1] == "kernel" and (*module, "a") in adapters
        adapter = (adapters[*module, "a"], adapters[*module, "b"]) if adapted else None
        shape = row.shape_in_file(leaf.shape[1:] if row.stacked else leaf.shape, config)
        for i, name in enumerate(row.names()):
            make = functools.partial(
                _make, leaf, adapter, i if row.stacked else None, scale,
                transposed=row.layout != "same", dtype=np.dtype(dtype), shape=shape,
            )  # fmt: skip
            yield name, FileTensor(shape, np.dtype(dtype), make)


def file_tensors(
    tree: Any, table: list[Tensor], config: ModelConfig, *, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (file name, array) for every tensor of the table."""
    for name, x in stream_tensors(tree, table, config, dtype=dtype):
        yield name, np.asarray(x)


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
    """The part in writing tensors of a process that does not write."""
    for _, x in tensors:
        np.asarray(x)


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|shard-\d+\.tmp")


def save_sharded(folder: pathlib.Path, tensors: Iterable[tuple[str, Any]], *, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered shards and their index when the tensors exceed one shard.

    The folder's earlier weights give way when all of the new ones are written. Of several processes the first writes,
    and all must call this.

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
