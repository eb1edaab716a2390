"""Hugging Face checkpoints in and out: read tensor by tensor, written sharded, by the tables of `names`."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vigos_jax.architecture import ModelConfig
from vigos_jax.errors import InputError
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.names import (
    LANGUAGE_PROJECTIONS,
    MLP_PROJECTIONS,
    Path,
    Tensor,
    adapter_table,
    canonical,
    tensor_table,
)

# -- reading ----------------------------------------------------------------------------------------------------

_FILE_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}


class _Files:
    """The tensors of one or more safetensors files, by canonical name. Use as a context manager."""

    def __init__(self, paths: list[pathlib.Path]):
        self._stack = contextlib.ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}
        for path in paths:
            try:
                file = self._stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as e:
                raise InputError(f"cannot read {path}: {e}; it must be a complete safetensors file") from e
            for name in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                if canonical(name) in self._where:
                    raise InputError(f"{path}: {name} is there twice, under two spellings or in two files")
                self._where[canonical(name)] = (file, name)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._where)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        file, original = self._where[canonical(name)]
        piece = file.get_slice(original)
        return tuple(piece.get_shape()), piece.get_dtype()

    def read(self, name: str) -> np.ndarray:
        file, original = self._where[canonical(name)]
        return file.get_tensor(original)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [folder / n for n in names]
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise InputError(f"{index} is not a safetensors index: {e!r}") from e
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            raise InputError(f"{index} names shards that are not in the folder: {', '.join(missing)}")
        return paths
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise InputError(f"{folder} holds no weights; it needs model.safetensors or model.safetensors.index.json")


def _check(files: _Files, table: list[Tensor], shapes: Mapping[Path, tuple[int, ...]], where: str, ignore=()) -> None:
    """Compares all names, shapes and dtypes with the table and reports every mismatch at once."""
    problems = []
    rows = {canonical(name): row for row in table for name in row.names()}
    named = {canonical(name): name for row in table for name in row.names()}
    present = files.names() - set(ignore)
    problems += [f"missing {named[n]}" for n in sorted(rows.keys() - present)]
    problems += [f"unexpected {n}" for n in sorted(present - rows.keys())]
    for name in sorted(rows.keys() & present):
        row = rows[name]
        shape, dtype = files.header(name)
        if dtype not in _FILE_DTYPES:
            problems.append(f"{name} has dtype {dtype}, not one of {', '.join(_FILE_DTYPES)}")
        flat = (shape[0], int(np.prod(shape[1:]))) if row.layout == "conv" else shape
        ours = tuple(reversed(flat)) if row.layout != "same" else flat
        want = shapes[row.path][1:] if row.stacked else shapes[row.path]
        if ours != want:
            wanted = tuple(reversed(want)) if row.layout != "same" else want
            problems.append(f"{name} has shape {list(flat)}, expected {list(wanted)}")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{where} does not fit the model: {len(problems)} problem(s): {shown}")


def _read_tree(files: _Files, table: list[Tensor], abstract: Any, *, dtype: Any, shardings: Any) -> Any:
    """Reads leaf by leaf; only one stacked leaf is in host memory at a time."""
    shardings_by_path = dict(_leaves(shardings)) if shardings is not None else {}
    out: dict[str, Any] = {}
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract)}
    for row in table:
        buffer = np.empty(shapes[row.path], np.dtype(dtype))
        for i, name in enumerate(row.names()):
            buffer[i if row.stacked else ...] = row.to_ours(files.read(name))
        node = out
        for key in row.path[:-1]:
            node = node.setdefault(key, {})
        node[row.path[-1]] = jax.device_put(buffer, shardings_by_path.get(row.path))
    return out


def _leaves(tree: Any) -> Iterator[tuple[Path, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield tuple(k.key for k in path), leaf


def load_params(folder: pathlib.Path, config: ModelConfig, abstract: Any, *, dtype: Any, shardings: Any = None) -> Any:
    """Reads the base parameters of a Hugging Face folder.

    Args:
      folder: holds model.safetensors, or shards and their index; float32, bfloat16 or float16.
      abstract: the `params` tree of shapes from `abstract_variables`.
      dtype: of the returned leaves.
      shardings: a tree of Shardings like `abstract`, or None for the default device.

    Raises:
      InputError: lists every missing, extra and wrong-shaped tensor.
    """
    table = tensor_table(config)
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract)}
    # A tied checkpoint may still carry a copy of its embedding as lm_head.
    ignore = ("lm_head.weight",) if config.tie_embeddings else ()
    with _Files(_weight_files(folder)) as files:
        _check(files, table, shapes, str(folder), ignore)
        return _read_tree(files, table, abstract, dtype=dtype, shardings=shardings)


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
        rank, alpha = int(raw["r"]), float(raw["lora_alpha"])
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; a PEFT adapter folder needs it") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not a PEFT LoRA config: {e!r}") from e
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; choices: LORA")
    if rank < 1:
        raise InputError(f"{path}: r={rank} must be at least 1")
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
    with _Files([folder / "adapter_model.safetensors"]) as files:
        for name in files.names():
            module = name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight").rsplit(".", 1)[-1]
            if ".language_model.layers." in name and module in LANGUAGE_PROJECTIONS:
                language.add(module)
            elif ".visual.blocks." in name and ".mlp." in name and module in MLP_PROJECTIONS:
                vision.add(module)
            else:
                raise InputError(f"{folder}: adapter tensor {name} is on a module that cannot carry one here")
    if not language | vision:
        raise InputError(f"{folder}/adapter_model.safetensors holds no adapter tensor; it must hold lora_A and lora_B")
    scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
    return LoraSpec(rank, scale, dropout, frozenset(language), frozenset(vision))


def load_adapter(folder: pathlib.Path, config: ModelConfig, lora: LoraSpec, abstract: Any, *, shardings: Any = None):
    """Reads a PEFT adapter as a float32 `lora` collection of the shapes in `abstract`."""
    table = adapter_table(config, lora)
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract)}
    with _Files([folder / "adapter_model.safetensors"]) as files:
        _check(files, table, shapes, str(folder))
        return _read_tree(files, table, abstract, dtype=np.float32, shardings=shardings)


# -- writing ----------------------------------------------------------------------------------------------------


def file_tensors(
    tree: Any, table: list[Tensor], config: ModelConfig, *, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (file name, array) for every tensor of the table, one leaf on the host at a time."""
    by_path = dict(_leaves(tree))
    for row in table:
        leaf = by_path[row.path]
        for i, name in enumerate(row.names()):
            x = np.asarray(jax.device_get(leaf[i] if row.stacked else leaf))
            yield name, np.ascontiguousarray(row.to_file(x, config).astype(np.dtype(dtype)))


def save_sharded(folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], *, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered shards and their index when the tensors exceed one shard."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.tmp"
        safetensors.numpy.save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes files that only their owner can read
        shards.append(list(pending))
        pending.clear()

    for name, x in tensors:
        if pending and size + x.nbytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = x
        size += x.nbytes
        total += x.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.tmp").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}.tmp").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
