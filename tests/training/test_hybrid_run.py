"""A run of the Qwen3.5 family: rollouts from states and keys, packed roles through both, an export that loads again."""

import json

import jax
import numpy as np
import pytest
import tiny_runs as runs

from vigos_jax.weights.weight_files import open_weights


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps from a model folder, a merged export at the end, loaded again and compared."""
    model = runs.write_model(tmp_path_factory.mktemp("hybrid") / "model", family="qwen3_5")
    options = [f"--config.model.path={model}", "--config.steps=2", "--config.lora.dropout=0.0"]
    return runs.finished_run(
        tmp_path_factory,
        *options,
        *(f"--config.export.{x}" for x in ("after_training=True", "kind=merged", "check=True")),
    )


@pytest.mark.slow
def test_the_student_that_samples_is_the_one_that_is_scored(run):
    """Log-probabilities of the decoding loop, from states, are those of the packed pass, in chunks."""
    rows = runs.metrics_of(run.workdir)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["grad_norm"] > 0 and row["sampler_logp_gap"] < 1e-4


@pytest.mark.slow
def test_adapters_of_both_kinds_of_layers_are_trained(run):
    trained = runs.saved_state(run.workdir, 2)["trained"]["lora"]["layers"]
    kinds = {name.split("_")[0] for name in trained}
    assert kinds == {"linear", "full"}
    assert all(np.any(x != 0) for x in jax.tree.leaves(trained))


@pytest.mark.slow
def test_the_export_is_a_model_of_the_family(run):
    folder = run.workdir / "export"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_5"
    names = open_weights(folder).names()
    assert any("linear_attn.A_log" in name for name in names) and any("self_attn.q_proj" in name for name in names)
