"""What a run needs, tiny and from nothing: a model folder, a data set, rollouts, and a config file of a user's own.

Everything lies outside the repository, as a user's own things do.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tiny
from helpers import make_processor_folder
from PIL import Image

from vigos_jax import main
from vigos_jax.architecture import ModelConfig
from vigos_jax.models import hf
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.qwen2_5_vl import Qwen2_5VL
from vigos_jax.processor import Processor

# The mesh splits rows, parameters and heads, so every mode runs on sharded arrays: 2 x 2 x 2 of the 8 test devices.
# The reference role has no clip: a random model differs from itself by more than any sensible one, everywhere.
CONFIG = '''\
"""A user's own config."""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = {model!r}
    config.data.source = {data!r}
    config.steps, config.batch_size, config.checkpoint_every, config.keep_checkpoints = 4, 4, 1, 10
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.lora.rank, config.lora.alpha, config.lora.dropout = 4, 8.0, 0.1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 0
    config.prompts.student.user = "{{problem}}"
    config.prompts.reasoning.user = "{{problem}} {{reference}}"
    config.prompts.reference.user = "{{reference}} {{problem}}"
    config.roles.reference.clip = 0.0
    config.sampling.max_tokens = 12
    config.buckets.patches, config.buckets.prompt = (64,), (96,)
    config.buckets.completion, config.buckets.packed = (16, 64), (128, 384)
    config.loss.chunk = 16
    config.export.after_training = False
    return config
'''
ADAPTER_RANK, ADAPTER_ALPHA = 2, 6.0  # unlike the config's: the folder's own word counts
ALL_PROJECTIONS = LoraSpec(
    rank=ADAPTER_RANK,
    scale=ADAPTER_ALPHA / ADAPTER_RANK,
    language=frozenset(hf.LANGUAGE_PROJECTIONS),
    vision=frozenset(hf.VISION_PROJECTIONS),
)
SPEC = dataclasses.replace(ALL_PROJECTIONS, vision=frozenset())


@dataclasses.dataclass(frozen=True)
class World:
    """Paths of a tiny world. Tests write into folders of their own, never here."""

    folder: pathlib.Path
    model: pathlib.Path  # float32, untied, with random weights whose logits differ by several units
    adapter: pathlib.Path  # PEFT LoRA of rank ADAPTER_RANK, A and B random
    data: pathlib.Path  # .jsonl of 10 good rows
    config: pathlib.Path  # the config file

    def run(self, *args: str) -> int:
        """Runs the command line in this process; returns the exit code."""
        return main.main(["vigos_jax", f"--config={self.config}", *args])


@functools.cache
def make_world(tmp_path_factory) -> World:
    """The world of this test session."""
    folder = tmp_path_factory.mktemp("world")
    write_pictures(folder / "pictures", 10)
    rows = [
        {"id": f"row{i}", "images": [f"pictures/{i}.png"], "problem": f"What colour is {i}?", "answer": "red blue"[i:]}
        for i in range(10)
    ]
    data = write_rows(folder / "data.jsonl", [row | {"answer": str(i)} for i, row in enumerate(rows)])
    model = write_model(folder / "model")
    adapter = write_adapter(folder / "adapter", model)
    config = folder / "mine.py"
    config.write_text(CONFIG.format(model=str(model), data=str(data)))
    return World(folder, model, adapter, data, config)


def write_pictures(folder: pathlib.Path, n: int) -> None:
    """`0.png` and so on: noise, 84 x 84 pixels."""
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (84, 84, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_model(folder: pathlib.Path) -> pathlib.Path:
    """A Hugging Face folder with processor and float32 weights."""
    make_processor_folder(folder, text={"tie_word_embeddings": False, "torch_dtype": "bfloat16"})
    config = ModelConfig.load(folder)
    params = tiny.random_variables(Qwen2_5VL(config))["params"]
    tensors = hf.file_tensors(params, hf.tensor_table(config), config, dtype=np.float32)
    hf.save_sharded(folder, tensors, max_shard_bytes=2**30)
    return folder


def write_adapter(folder: pathlib.Path, model: pathlib.Path, spec: LoraSpec = SPEC) -> pathlib.Path:
    """A PEFT LoRA folder whose B is not zero."""
    folder.mkdir()
    config = ModelConfig.load(model)
    lora = tiny.random_variables(Qwen2_5VL(config, lora=spec))["lora"]
    tensors = dict(hf.file_tensors(lora, hf.adapter_table(config, spec), config, dtype=np.float32))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    alpha = spec.scale * spec.rank
    names = sorted(spec.language | spec.vision)
    values = {"peft_type": "LORA", "r": spec.rank, "lora_alpha": alpha, "lora_dropout": 0.2, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(values | {"bias": "none"}))
    return folder


@functools.cache
def processor(folder: pathlib.Path) -> Processor:
    return Processor.load(folder)


def bytes_of(folder: pathlib.Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_trees(a: Any, b: Any) -> None:
    """Bitwise equality of two trees of arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)
