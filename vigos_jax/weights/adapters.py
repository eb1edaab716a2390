"""LoRA adapters as PEFT folders, read and written: what they adapt, and their weights."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import adapter_table
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.tensor_names import DELTA_PROJECTIONS, LANGUAGE_PROJECTIONS, MLP_PROJECTIONS
from vigos_jax.runtime.distributed import first_decides, is_first
from vigos_jax.runtime.files import read_object
from vigos_jax.weights import writing
from vigos_jax.weights.reading import check_tensors, leaves, read_tree
from vigos_jax.weights.safetensors_file import write_file
from vigos_jax.weights.weight_files import WeightFiles

# Options that change the forward pass but leave no trace in the tensors, or that are not implemented.
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
    """The spec of a PEFT adapter folder: rank, scale and adapted modules.

    Args:
      dropout: for further training; replaces the file's, which is what it was trained with.

    Raises:
      InputError: not a plain LoRA, or its tensors name modules this program does not adapt.
    """
    raw, rank, alpha = _adapter_config(folder / "adapter_config.json")
    names = WeightFiles([folder / "adapter_model.safetensors"]).names()
    language, vision = _adapted_modules(names, folder)
    scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
    return LoraSpec(rank, scale, dropout, language, vision)


def _adapter_config(path: pathlib.Path) -> tuple[dict[str, Any], int, float]:
    """(the whole file, r, lora_alpha) of a plain LoRA."""
    raw = read_object(path, owner="a PEFT adapter folder")
    try:
        rank, alpha = raw["r"], raw["lora_alpha"]
        if type(rank) is not int or type(alpha) not in (int, float) or not 0 < alpha < 1e30:
            raise ValueError(f"r {rank!r} must be a whole number, lora_alpha {alpha!r} a positive one")
    except (ValueError, KeyError) as e:
        raise InputError(f"{path} must be a PEFT LoRA config: {e!r}") from e
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
    return raw, rank, alpha


def _adapted_modules(names: Iterable[str], folder: pathlib.Path) -> tuple[frozenset[str], frozenset[str]]:
    """Modules of the decoder and of the vision tower that tensors of these names adapt."""
    language, vision = set(), set()
    for name in names:
        module = name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight").rsplit(".", 1)[-1]
        if ".language_model.layers." in name and module in (*LANGUAGE_PROJECTIONS, *DELTA_PROJECTIONS):
            language.add(module)
        elif ".visual.blocks." in name and ".mlp." in name and module in MLP_PROJECTIONS:
            vision.add(module)
        else:
            raise InputError(
                f"{folder}: adapter tensor {name} is on a module that cannot carry one here; choices: the decoder's "
                f"{', '.join(LANGUAGE_PROJECTIONS)}, {', '.join(DELTA_PROJECTIONS)} of Qwen3.5's linear layers, and "
                f"{', '.join(MLP_PROJECTIONS)} of Qwen2.5-VL's vision blocks"
            )
    if not language | vision:
        raise InputError(f"{folder}/adapter_model.safetensors holds no adapter tensor; it must hold lora_A and lora_B")
    return frozenset(language), frozenset(vision)


def load_adapter(folder: pathlib.Path, config: ModelConfig, lora: LoraSpec, abstract: Any, *, shardings: Any = None):
    """Reads a PEFT adapter as a float32 `lora` collection of the shapes in `abstract`."""
    table = adapter_table(config, lora)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    files = WeightFiles([folder / "adapter_model.safetensors"])
    check_tensors(files, table, shapes, str(folder))
    return read_tree(files, table, abstract, str(folder), dtype=np.float32, shardings=shardings)


def adapter_tensors(lora: Any, config: ModelConfig, spec: LoraSpec) -> list[tuple[str, writing.FileTensor]]:
    """(name, tensor) of a PEFT folder's file: always float32; rounded, it would be another adapter."""
    return list(writing.stream_tensors(lora, adapter_table(config, spec), config, dtype=np.float32))


def write_adapter(folder: pathlib.Path, lora: Any, config: ModelConfig, spec: LoraSpec, *, base: str) -> None:
    """Writes a PEFT folder. All processes must call this; the first one writes.

    Args:
      folder: must exist.
      base: name of the base model, for the adapter's config file.
    """
    tensors = adapter_tensors(lora, config, spec)
    if is_first():
        write_file(folder / "adapter_model.safetensors", tensors)
    else:
        writing.gather(tensors)
    first_decides(lambda: _write_adapter_config(spec, folder, base=base))


def _write_adapter_config(spec: LoraSpec, written: pathlib.Path, *, base: str) -> None:
    parts = []
    if spec.language:
        modules = "self_attn|mlp" + ("|linear_attn" if spec.language.intersection(DELTA_PROJECTIONS) else "")
        parts.append(rf"language_model\.layers\.\d+\.({modules})\.({'|'.join(sorted(spec.language))})")
    if spec.vision:
        parts.append(rf"visual\.blocks\.\d+\.mlp\.({'|'.join(sorted(spec.vision))})")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.scale * spec.rank,
        "lora_dropout": spec.dropout,
        "target_modules": rf".*({'|'.join(parts)})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (written / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
