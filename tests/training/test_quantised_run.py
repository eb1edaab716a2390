"""A run beside a quantised base: what that costs is written down, adapters are trained, the export is not quantised."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_runs as runs
from parity import make_run

from vigos_jax.config import read_json
from vigos_jax.export.verify import prompt_rows
from vigos_jax.method.packing import Buckets, pack_prompts
from vigos_jax.method.rows import Row
from vigos_jax.models.quantization import dequantise, has_quantised, is_quantised
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.session import Session
from vigos_jax.training.quantization_cost import quantization_cost
from vigos_jax.weights import reading
from vigos_jax.weights.weight_files import open_weights

KINDS = ("int8", "nf4")


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of which nf4's blocks divide every kernel, on a mesh of 2 x 2 x 2 too."""
    text = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    return runs.write_model(
        tmp_path_factory.mktemp("wide") / "model", text=text, vision={"out_hidden_size": 128, "depth": 1}
    )


@pytest.fixture(scope="module", params=KINDS)
def run(tmp_path_factory, model, request):
    """Two steps, exported at the end."""
    options = [f"--config.model.path={model}", f"--config.model.quantization={request.param}", "--config.steps=2"]
    return runs.finished_run(tmp_path_factory, *options, "--config.export.after_training=True")


@pytest.mark.slow
def test_a_quantised_run_trains_its_adapter(run):
    rows = runs.metrics_of(run.workdir)
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    assert all(row["sampler_logp_gap"] < 0.1 for row in rows)  # rollouts and student read the same base
    assert has_quantised(run.session.base)
    saved = runs.saved_state(run.workdir, 2)["trained"]
    assert set(saved) == {"lora"} and all(np.any(x != 0) for x in jax.tree.leaves(saved))


@pytest.mark.slow
def test_what_quantising_cost_is_written_down(run):
    cost = json.loads((run.workdir / "quantization.json").read_text())
    assert cost["quantization"] in KINDS and cost["tokens"] > 20
    assert 0 < cost["kl_mean"] < cost["kl_max"] and (cost["kl_mean"] < 0.01 if cost["quantization"] == "int8" else True)


def whole(session: Session, folder) -> tuple[dict, dict]:
    """The model's original parameters, and those its codes stand for."""
    plain = lambda x: dequantise(x, np.float32) if is_quantised(x) else x  # noqa: E731
    after = jax.tree.map(plain, session.base, is_leaf=is_quantised)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), after)
    return reading.load_params(folder, session.config, shapes, dtype=np.float32), after


@pytest.mark.slow
def test_the_cost_is_that_of_whole_models(run, model):
    """Layer by layer from the files, and both models whole: the same divergence, over text alone."""
    config = read_json(run.workdir / "config.json")
    session = dataclasses.replace(run.session, buckets=Buckets((64,), (128,), (16,), (384,)))
    rows = [*prompt_rows(session.processor, config.prompts.student), Row()]  # the last one is bad
    cost = quantization_cost(session, config, rows)

    prompts = pack_prompts(rows, config=session.config, buckets=session.buckets)
    apply = make_run(VisionLanguageModel(session.config))
    p, q = (
        np.asarray(jax.nn.log_softmax(apply({"params": params}, prompts.vision, prompts.text)[1]))
        for params in whole(session, model)
    )
    kl = np.sum(np.exp(p) * (p - q), -1)[np.asarray((prompts.text.segment_ids > 0) & (prompts.text.image_index < 0))]
    assert cost["tokens"] == kl.size > 60
    assert cost["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3) and cost["kl_max"] == pytest.approx(kl.max(), rel=1e-3)


@pytest.mark.slow
def test_the_export_is_the_original_model_with_the_adapter(run, model):
    original = open_weights(model)
    exported = open_weights(run.workdir / "export")
    lora = runs.saved_state(run.workdir, 2)["trained"]["lora"]["layers"]["mlp"]["up_proj"]
    spec = run.session.model.lora
    name = "model.layers.1.mlp.up_proj.weight"
    merged = original.tensor(name) + spec.scale * (lora["a"][1] @ lora["b"][1]).T
    np.testing.assert_allclose(exported.tensor(name), merged, atol=1e-6)
    same = "model.embed_tokens.weight"
    np.testing.assert_array_equal(exported.tensor(same), original.tensor(same))


def test_all_weights_cannot_be_trained_in_a_few_bits(world, tmp_path, capsys):
    options = ("--config.model.quantization=int8", "--config.lora.rank=0", f"--workdir={tmp_path / 'run'}")
    assert world.run(*options) == 2
    assert "config.model.quantization=int8 needs an adapter to train" in capsys.readouterr().err


def test_an_unknown_kind_and_a_width_without_blocks_are_refused(world, tmp_path, capsys):
    assert world.run("--config.model.quantization=int4", f"--workdir={tmp_path / 'a'}") == 2
    assert "config.model.quantization='int4' is unknown; choices: none, int8, nf4" in capsys.readouterr().err
    assert world.run("--config.model.quantization=nf4", f"--workdir={tmp_path / 'b'}") == 2
    assert "choices: none, int8" in capsys.readouterr().err
