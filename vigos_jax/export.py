"""Hugging Face checkpoints out: a full (merged) model or a PEFT adapter."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vigos_jax.errors import InputError
from vigos_jax.loading import Loaded
from vigos_jax.models import hf
from vigos_jax.models.names import adapter_table, tensor_table
from vigos_jax.models.variables import Variables

# Copied from the base as they are: rewriting them through a library would change what other programs read.
_COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model")
_WEIGHTS = ("model.safetensors.index.json", "adapter_config.json")


def export(
    loaded: Loaded, trained: Variables, output: pathlib.Path, *, kind: str, dtype: str, max_shard_gb: float
) -> pathlib.Path:
    """Writes the student as a Hugging Face folder, under a temporary name first.

    Args:
      kind: "merged" for a full checkpoint, "adapter" for a PEFT LoRA (always float32).
      dtype: of a merged checkpoint's tensors. A bfloat16 merge rounds small updates away; float32 keeps them.

    Raises:
      InputError: an adapter is asked for where none was trained, or the folder exists and is not empty.
    """
    if kind == "adapter" and "lora" not in trained:
        raise InputError("config.export.kind=adapter needs an adapter, and this student has none; choices: merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"config.export.output={str(output)!r} exists and is not an empty folder; choose another")
    temporary = output.with_name(output.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
    except OSError as e:
        raise InputError(f"cannot write config.export.output={str(output)!r}: {e.strerror}; choose another") from e
    if kind == "adapter":
        _write_adapter(loaded, trained["lora"], temporary)
    else:
        for pattern in _COMPANIONS:
            for file in sorted(loaded.folder.glob(pattern)):
                if file.name not in _WEIGHTS:
                    shutil.copyfile(file, temporary / file.name)
        _set_dtype(temporary / "config.json", dtype)
        tensors = merged_tensors(loaded, trained, dtype=jnp.dtype(dtype))
        hf.save_sharded(temporary, tensors, max_shard_bytes=int(max_shard_gb * 2**30))
    if output.exists():
        output.rmdir()
    os.replace(temporary, output)
    return output


def merged_tensors(loaded: Loaded, trained: Variables, *, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The student's tensors by file name; W + scale * A B is added in float32 and rounded once, to `dtype`."""
    table = tensor_table(loaded.config)
    params = trained.get("params", loaded.base)
    if "lora" not in trained:
        yield from hf.file_tensors(params, table, loaded.config, dtype=dtype)
        return
    for row in table:
        tree, adapter = params, trained["lora"]
        for key in row.path:
            tree = tree[key]
        for key in row.path[:-1]:
            adapter = adapter.get(key, {})
        if row.path[-1] == "kernel" and "a" in adapter:
            tree = _merge(tree, adapter["a"], adapter["b"], loaded.model.lora.scale)
        nested: dict[str, Any] = {}
        node = nested
        for key in row.path[:-1]:
            node = node.setdefault(key, {})
        node[row.path[-1]] = tree
        yield from hf.file_tensors(nested, [row], loaded.config, dtype=dtype)


@jax.jit
def _merge(kernel, a, b, scale):  # [L, in, out], [L, in, r], [L, r, out]
    return kernel.astype(jnp.float32) + scale * jnp.einsum("lir,lro->lio", a, b, precision="highest")


def _write_adapter(loaded: Loaded, lora: Any, folder: pathlib.Path) -> None:
    spec = loaded.model.lora
    table = adapter_table(loaded.config, spec)
    tensors = dict(hf.file_tensors(lora, table, loaded.config, dtype=np.float32))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    parts = []
    if spec.language:
        parts.append(rf"language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(sorted(spec.language))})")
    if spec.vision:
        parts.append(rf"visual\.blocks\.\d+\.mlp\.({'|'.join(sorted(spec.vision))})")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded.name,
        "r": spec.rank,
        "lora_alpha": spec.scale * spec.rank,
        "lora_dropout": spec.dropout,
        "target_modules": rf".*({'|'.join(parts)})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _set_dtype(path: pathlib.Path, dtype: str) -> None:
    """Says the written dtype where the base's config names one; everything else stays as it was."""
    config = json.loads(path.read_text(encoding="utf-8"))
    sections = [config, config.get("text_config") or {}, config.get("vision_config") or {}]
    changed = False
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if key in section and section[key] != dtype:
                section[key] = dtype
                changed = True
    if changed:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
