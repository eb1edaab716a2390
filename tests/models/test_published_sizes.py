"""Every config for a published model, built without memory: its tensors are transformers' own, name by name."""

import importlib
import math
import pathlib

import jax
import pytest
import torch
from ml_collections import ConfigDict
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from vigos_jax.config import validate
from vigos_jax.demo.world import WORLDS
from vigos_jax.evaluation.tasks import TASKS
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import adapter_table, tensor_table
from vigos_jax.models.published_configs import published_config
from vigos_jax.models.tensor_names import canonical
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.session import lora_spec

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# Parameters of the whole model, and of the paper's adapter for it: rank 64 on seven projections of an attention layer,
# six of a linear one.
SIZES = {
    "qwen2_5_vl_3b": (3_754_622_976, 119_734_272),
    "qwen2_5_vl_7b": (8_292_166_656, 161_480_704),
    "qwen2_5_vl_32b": (33_452_718_336, 536_870_912),
    "qwen2_5_vl_72b": (73_410_777_344, 842_137_600),
    "qwen3_vl_2b": (2_127_532_032, 69_730_304),
    "qwen3_vl_4b": (4_437_815_808, 132_120_576),
    "qwen3_vl_8b": (8_767_123_696, 174_587_904),
    "qwen3_vl_32b": (33_357_390_064, 536_870_912),
    "qwen3_5_0_8b": (852_985_920, 40_894_464),
    "qwen3_5_2b": (2_213_241_664, 62_521_344),
    "qwen3_5_4b": (4_539_265_536, 121_896_960),
    "qwen3_5_9b": (9_409_813_744, 160_432_128),
    "qwen3_5_27b": (27_356_728_560, 435_159_040),
    "qwen3_6_27b": (27_356_728_560, 435_159_040),
}
FAMILIES = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
}


def config_of(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def file_shapes(config: ModelConfig, abstract) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint, by canonical name, as the table derives it from our leaves."""
    leaves = {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    assert leaves.keys() == {row.path for row in tensor_table(config)}
    v, out = config.vision, {}
    for row in tensor_table(config):
        shape = leaves[row.path].shape
        if row.stacked:
            assert shape[0] == row.stacked
            shape = shape[1:]
        if row.layout != "same":
            shape = shape[::-1]
        if row.layout == "depthwise":
            shape = (shape[0], 1, shape[1])
        if row.layout == "conv":
            assert shape[1] == v.patch_dim
            shape = (shape[0], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        out |= {canonical(name): shape for name in row.names()}
    return out


def test_every_large_config_is_here():
    assert {p.stem for p in CONFIGS.glob("qwen*.py")} == set(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_tensors_are_those_of_transformers(name):
    config = config_of(name)
    validate(config)
    raw = published_config(config.model.path)
    model_config = ModelConfig.from_hf(raw)
    lora = lora_spec(config, model_config)
    abstract = abstract_variables(VisionLanguageModel(model_config, lora=lora))
    settings, cls = FAMILIES[model_config.family]
    with torch.device("meta"):
        reference = cls(settings(**raw))
    theirs = {canonical(k): tuple(v.shape) for k, v in reference.state_dict().items()}
    if model_config.tie_embeddings:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert file_shapes(model_config, abstract["params"]) == theirs
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    assert (count(abstract["params"]), count(abstract["lora"])) == SIZES[name]
    assert count(abstract["params"]) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("name", ["qwen2_5_vl_3b", "qwen3_vl_2b"])
def test_a_wrong_size_is_noticed(name):
    raw = published_config(config_of(name).model.path)
    text = raw.get("text_config", raw)
    config = ModelConfig.from_hf(raw | {"text_config": text | {"num_key_value_heads": 1}})
    right = file_shapes(*(x := ModelConfig.from_hf(raw), abstract_variables(VisionLanguageModel(x))["params"]))
    wrong = file_shapes(config, abstract_variables(VisionLanguageModel(config))["params"])
    assert right.keys() == wrong.keys() and right != wrong


@pytest.mark.parametrize("name", ["qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_the_papers_runs_are_its_tables(name):
    """Tables A.IV and A.V, line by line."""
    c = config_of(name)
    assert (c.data.source, c.steps, c.batch_size) == ("LMMs-Lab-Turtle/Vision-SR1-47K", 1488, 32)
    o = c.optimizer
    assert (o.learning_rate, o.schedule, o.warmup_steps, o.max_grad_norm) == (5e-6, "linear", 0, 0.1)
    assert (o.b1, o.b2, o.eps, o.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (c.lora.rank, c.lora.alpha, c.lora.dropout, c.lora.scope) == (64, 128.0, 0.05, "language")
    assert c.model.dtype == "bfloat16" and c.teacher.weights == "frozen" and c.span_rule == "paper"
    s = c.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (1.1, 0.95, 20, 0.0, 1.0)
    assert s.max_tokens == 4096 and max(c.buckets.prompt) == 32768 and max(c.buckets.completion) >= 4096
    assert {r: (v.weight, v.divergence, v.clip, v.when) for r, v in c.roles.items()} == {
        "perception": (1.0, "forward_kl", 0.05, "valid"),
        "reasoning": (1.0, "forward_kl", 0.05, "valid"),
        "reference": (2.0, "reverse_kl", 0.05, "invalid"),
    }
    assert c.loss.temperature == 1.0 and c.loss.reduction == "tokens"
    e = c.eval
    assert (e.samples, e.temperature, e.top_p, e.top_k, e.max_tokens, e.seed) == (5, 1.0, 0.9, 20, 4096, 42)
    assert (
        set(e.tasks) == {name for name, task in TASKS.items() if task.source not in WORLDS} and e.prompt == "structured"
    )


@pytest.mark.parametrize("name, vision", [("qwen2_5_vl_3b", 3), ("qwen3_vl_2b", 0)])
def test_the_official_scope_reaches_what_suffix_matching_hits(name, vision):
    config = config_of(name)
    config.lora.scope = "official"
    model_config = ModelConfig.from_hf(published_config(config.model.path))
    lora = lora_spec(config, model_config)
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract_variables(VisionLanguageModel(model_config, lora=lora))["lora"]
    )
    assert sum("visual" in jax.tree_util.keystr(path) for path, _ in leaves) == 2 * vision
    assert len(leaves) == len(adapter_table(model_config, lora)) == 2 * (7 + vision)
