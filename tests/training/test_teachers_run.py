"""Runs whose teachers have weights of another size, from the command line to the metrics; and what they refuse."""

import json
import pathlib
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import tiny_runs as runs

from configs import base
from vigos_jax import main
from vigos_jax.teachers import check_teachers
from vigos_jax.weights import reading

SHIPPED = ("vision_opd", "opd", "va_opd", "big_teacher")
LARGER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def larger(world, tmp_path_factory):
    """A model of the world's family and tokenizer, wider, deeper, with more padded rows and a tower of its own."""
    rows = json.loads((world.model / "config.json").read_text())["vocab_size"] + 8
    vision = {"out_hidden_size": 64, "hidden_size": 48, "num_heads": 4}
    return runs.write_model(tmp_path_factory.mktemp("larger"), text=LARGER | {"vocab_size": rows}, vision=vision)


def train(world, folder, model, *args, role="perception"):
    """Two steps whose role is this model's; the exit code."""
    config = folder / "mine.py"
    change = f"    config.roles.{role}.model = {str(model)!r}\n    return config\n"
    config.write_text(world.config.read_text().replace("    return config\n", change))
    where = [f"--workdir={folder / 'run'}"] if not any(a.startswith("--mode") for a in args) else []
    return main.main(["vigos_jax", f"--config={config}", "--config.steps=2", *where, *args])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_train_two_steps(world, larger, tmp_path, name):
    """As shipped, but for the models, the data and the sizes."""
    own = world.config.read_text().replace("from configs import base", f"from configs import {name}")
    own = own.replace("base.get_config()", f"{name}.get_config()")
    lines = [x for x in own.splitlines() if not re.search(r"config\.(roles|prompts)", x) and "return config" not in x]
    lines += [
        "    for role in config.roles.values():",
        f"        role.model, role.clip = role.model and {str(larger)!r}, 0.0",  # else all is clipped
        "    config.gradient_accumulation_steps, config.model.dtype = 1, 'float32'",
        "    config.buckets.prompt, config.buckets.sequence = (384,), (1536,)  # a token is a letter or two",
        "    return config",
    ]
    rows = [row | {"bbox": [4, 8, 60, 70]} for row in runs.read_rows(world.data)]
    data = runs.write_rows(world.folder / "boxes.jsonl", rows)
    file = tmp_path / f"my_{name}.py"
    file.write_text("\n".join(lines) + "\n")
    flags = [f"--config={file}", f"--config.data.source={data}", "--config.steps=2", "--config.data.split=train"]
    assert main.main(["vigos_jax", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    metrics = runs.metrics_of(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2] and all(row["grad_norm"] > 0 for row in metrics)
    roles = json.loads((tmp_path / "run" / "config.json").read_text())["roles"]
    assert sum(role["model"] == str(larger) for role in roles.values()) == {"big_teacher": 3, "vision_opd": 0}.get(
        name, 1
    )
    assert any(f"{role}/effective_tokens" in metrics[0] for role in roles) == (name == "va_opd")


@pytest.mark.slow
def test_only_the_roles_that_name_it_are_taught_by_it(world, larger, tmp_path):
    """Teacher log-probabilities of the same rollouts: another model's for one role, the base's for the others."""
    texts = ("<description> red </description> <think> so </think> \\boxed{1}", "no format")
    rollouts = [row | {"completion": texts[i % 2]} for i, row in enumerate(runs.read_rows(world.data))]
    file, out = runs.write_rows(world.folder / "rollouts.jsonl", rollouts), []
    for name, model in (("own", ""), ("same", world.model), ("larger", larger)):
        args = [f"--config.score.rollouts={file}", f"--config.score.output={tmp_path / name}", "--mode=score"]
        assert train(world, tmp_path, model, *args) == 0
        out.append(runs.read_rows(tmp_path / name / "scores.jsonl"))
    changed = 0
    for own, same, other in zip(*out, strict=True):
        for a, b, c, role in zip(*(x["teacher_logp"] for x in (own, same, other)), own["role"], strict=True):
            if role is not None:
                assert abs(a - b) < 1e-5, "the student's own base under another name"
                assert (abs(a - c) > 1e-5) == (role == "perception"), role
                changed += role == "perception"
    assert changed > 10


@pytest.mark.slow
def test_it_is_read_where_teachers_score_and_nowhere_else(world, larger, tmp_path):
    """Once for a run, however many roles name it; neither evaluation nor export reads it."""
    read, real = [], reading.load_params

    def load_params(folder, *args, **options):
        read.append(folder)
        return real(folder, *args, **options)

    with mock.patch.object(reading, "load_params", load_params):
        assert train(world, tmp_path, larger, "--config.roles.reasoning.model=" + str(larger)) == 0
        assert sorted(map(str, read)) == sorted(map(str, (world.model, larger)))
        read.clear()
        export = [
            f"--config={tmp_path / 'mine.py'}",
            f"--workdir={tmp_path / 'run'}",
            "--mode=export",
            f"--config.export.output={tmp_path / 'out'}",
        ]
        assert main.main(["vigos_jax", *export]) == 0
        assert read and larger not in map(pathlib.Path, read)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"perception, by {larger.name}" in card and "reference, by" not in card and str(larger) not in card


@pytest.mark.slow
def test_the_planner_counts_its_weights(world, larger, tmp_path, capsys):
    args = ["--mode=plan", "--config.plan.topology=cpu:8", "--config.plan.memory_gb=1", "--config.plan.completion=12"]
    args += ["--config.plan.advise=False"]
    peaks = []
    for model in ("", larger):
        file = tmp_path / "plan.json"
        assert train(world, tmp_path, model, *args, f"--config.plan.output={file}") == 0
        plan = json.loads(file.read_text())
        peaks.append({p["name"]: p for p in plan["programs"]})
    assert f"teacher {larger}: 0.00 G parameters" in capsys.readouterr().out
    assert all(peaks[1][name]["beside"] > peaks[0][name]["beside"] for name in ("encode", "update"))
    assert peaks[1]["gradient"]["arguments"] > peaks[0]["gradient"]["arguments"]


@pytest.fixture
def changed(larger, tmp_path):
    """A copy of the larger model whose files can be changed."""
    shutil.copytree(larger, tmp_path / "changed")
    return tmp_path / "changed"


def edited(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_it_needs_no_chat_template(world, changed):
    """Turns are the student's."""
    (changed / "chat_template.json").unlink()
    config = base.get_config()
    config.model.path, config.roles.perception.model = str(world.model), str(changed)
    check_teachers(config)


def test_refusals(world, changed, tmp_path, capsys, monkeypatch):
    """Before any weights are read, and where rows are only looked at."""
    monkeypatch.setattr(reading, "load_params", None)

    def refused(model, message):
        assert train(world, tmp_path, model) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and message in said[0], said
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())

    where = "config.roles.perception.model="
    refused(
        tmp_path / "none", f"{where}'{tmp_path / 'none'}' is not a folder; choices: a folder, owner/name on the hub"
    )
    refused("nobody/nothing", f"{where}'nobody/nothing' is not a folder and cannot be fetched from the hub")
    edited(changed / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    refused(changed, "must have the student's image_mean [0.5, 0.4")
    edited(changed / "preprocessor_config.json", image_mean=[0.5, 0.4, 0.3])

    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(changed, f"must have the student's vocabulary, and {first!r} is token 40, and has 41; choices: a model of")

    assert train(world, tmp_path, changed, "--mode=data", f"--config.preview.output={tmp_path / 'seen'}") == 2
    assert "must have the student's vocabulary" in capsys.readouterr().err
    other = runs.write_model(tmp_path / "other", family="qwen3_vl")
    refused(other, "must have the student's model_type 'qwen2_5_vl', and has 'qwen3_vl'; choices: a model of")


@pytest.mark.slow
def test_a_run_of_full_weights_beside_a_larger_teacher(world, larger, tmp_path):
    assert train(world, tmp_path, larger, "--config.lora.rank=0", "--config.optimizer.learning_rate=1e-4") == 0
    metrics = runs.metrics_of(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2] and all(np.isfinite(row["loss"]) for row in metrics)


@pytest.mark.slow
def test_the_same_run_goes_on(world, larger, tmp_path):
    """A resumed run reads the teacher again, and ends where an undisturbed one does."""
    assert train(world, tmp_path, larger, "--config.steps=1") == 0
    assert train(world, tmp_path, larger) == 0
    (tmp_path / "whole").mkdir()
    assert train(world, tmp_path / "whole", larger) == 0
    a, b = (runs.metrics_of(folder / "run")[1]["loss"] for folder in (tmp_path, tmp_path / "whole"))
    assert a == pytest.approx(b, rel=1e-6)
