"""The registry of model families: one from outside the package is an entry, and trains."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_runs as runs
from helpers import make_processor_folder

from vigos_jax.errors import InputError
from vigos_jax.models.config import PARSERS, ModelConfig
from vigos_jax.models.families import FAMILIES, Family, register, tensor_table
from vigos_jax.models.layers import Projection
from vigos_jax.models.tensor_names import Tensor, decoder_tensors, dense
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.weights import writing


class ToyTower(nn.Module):
    """Visual tokens from their own patches alone: no attention, one layer."""

    config: object
    lora: object
    dtype: object
    remat: str
    mesh: object
    attention: str

    @nn.compact
    def __call__(self, inputs, deterministic):
        c = self.config
        x = Projection(c.hidden_size, name="patch_embed")(inputs.patches.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, c.merge_unit * c.hidden_size)
        x = Projection(c.out_hidden_size, use_bias=True, name="merge")(x)
        return jnp.take_along_axis(x, inputs.token_unit[:, :, None], axis=1)


def toy_tensors(config):
    rows = [Tensor(("visual", "patch_embed", "kernel"), "eyes.patches.weight", layout="conv")]
    return rows + dense(("visual", "merge"), "eyes.merge") + decoder_tensors(config, "brain")


def parse_toy(raw, where):
    """Qwen2.5-VL's fields under another name."""
    return dataclasses.replace(PARSERS["qwen2_5_vl"](raw, where), family="toy_vl")


@pytest.fixture
def toy():
    register("toy_vl", Family(ToyTower, toy_tensors), parser=parse_toy)
    yield
    del PARSERS["toy_vl"], FAMILIES["toy_vl"]


def write_toy(folder):
    make_processor_folder(folder, text={"tie_word_embeddings": False})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "toy_vl"}))
    config = ModelConfig.load(folder)
    params = tiny.random_variables(VisionLanguageModel(config))["params"]
    tensors = writing.file_tensors(params, tensor_table(config), config, dtype=np.float32)
    writing.save_sharded(folder, tensors, max_shard_bytes=2**30)
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_family_from_outside_trains_two_steps(tmp_path, tmp_path_factory):
    world = runs.make_world(tmp_path_factory)
    config = write_toy(tmp_path / "model")
    assert {row.name.split(".")[0] for row in tensor_table(config)} == {"eyes", "brain", "lm_head"}
    workdir = tmp_path / "run"
    flags = [f"--config.model.path={tmp_path / 'model'}", f"--workdir={workdir}", "--config.steps=2"]
    with runs.compile_once():
        assert world.run(*flags, "--config.lora.rank=0") == 0
    rows = runs.read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows)
    before, after = (runs.saved_state(workdir, step)["trained"]["params"] for step in (1, 2))
    assert np.abs(before["visual"]["merge"]["kernel"] - after["visual"]["merge"]["kernel"]).max() > 0  # it is trained


def test_it_is_unknown_without_its_entry(tmp_path):
    with pytest.raises(InputError, match="'toy_vl' is not supported; choices: qwen2_5_vl, qwen3_vl, qwen3_5$"):
        ModelConfig.from_hf({"model_type": "toy_vl"})


def test_every_family_has_a_parser():
    assert set(PARSERS) == set(FAMILIES)
