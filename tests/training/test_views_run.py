"""Runs whose roles see other images than the student, from the command line to the metrics; and what they refuse."""

import json

import numpy as np
import pytest
import tiny_runs as runs
from PIL import Image

from vigos_jax import main

ROLES = {
    "crop": {"image": "crop", "image_column": "box", "image_margin": 0.25},
    "none": {"image": "none"},
    "blank": {"image": "blank"},
    "resized": {"image": "resized", "image_pixels": 1600},
    "other": {"image": "other", "image_column": "marked"},
    "shuffled": {"image": "shuffled"},
}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def rows(world):
    """The world's rows with a box and a marked copy each, beside its pictures; two of ten lack one of them."""
    rows = runs.read_rows(world.data)
    for i, row in enumerate(rows):
        pixels = np.random.default_rng(100 + i).integers(0, 256, (84, 84, 3), np.uint8)
        Image.fromarray(pixels).save(world.folder / "pictures" / f"marked{i}.png")
        row |= {"box": [4, 8, 60, 70], "marked": f"pictures/marked{i}.png"}
    rows[3]["box"], rows[6]["box"] = None, [0, 0, 85, 84]
    return runs.write_rows(world.folder / "views.jsonl", rows)


def run(world, rows, folder, fields, *args, mode="train"):
    """Of a config file of its own, whose perception and reference have these fields. Returns the exit code."""
    config = folder / "views.py"
    changes = [f"    config.roles.{r}[{k!r}] = {v!r}\n" for r in ("perception", "reference") for k, v in fields.items()]
    config.write_text(world.config.read_text().replace("    return config\n", f"{''.join(changes)}    return config\n"))
    where = [f"--workdir={folder / 'run'}", "--config.steps=2"] if mode == "train" else [f"--mode={mode}"]
    flags = [f"--config={config}", f"--config.data.source={rows}", "--config.data.max_bad_fraction=0.5"]
    return main.main(["vigos_jax", *flags, *where, *args])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROLES)
def test_two_steps(world, rows, tmp_path, kind):
    """Of the eight rows that they read, one has a box outside its image."""
    assert run(world, rows, tmp_path, ROLES[kind]) == (1 if kind == "crop" else 0)
    metrics = runs.metrics_of(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2] and all(np.isfinite(row["loss"]) for row in metrics)
    assert all(row["reference/tokens"] > 0 and row["reference/loss"] > 0 for row in metrics)
    assert sum(row["bad_rows"] for row in metrics) == (1 if kind == "crop" else 0)


@pytest.mark.slow
def test_what_a_role_sees_changes_what_it_teaches_and_nothing_else(world, rows, tmp_path):
    texts = ("<description> red </description> <think> so </think> \\boxed{1}", "no format")
    rollouts = [row | {"completion": texts[i % 2]} for i, row in enumerate(runs.read_rows(rows))]
    file = runs.write_rows(world.folder / "rollouts.jsonl", rollouts)
    out = []
    for name, fields in {"original": {}, "none": ROLES["none"], "other": ROLES["other"]}.items():
        args = [f"--config.score.rollouts={file}", f"--config.score.output={tmp_path / name}"]
        assert run(world, rows, tmp_path, fields, *args, mode="score") == 0
        out.append(runs.read_rows(tmp_path / name / "scores.jsonl"))
    changed = {True: 0, False: 0}
    for plain, *others in zip(*out, strict=True):
        for other in others:
            assert plain["role"] == other["role"]
            for a, b, role in zip(plain["teacher_logp"], other["teacher_logp"], plain["role"], strict=True):
                if role is not None:
                    assert (abs(a - b) < 1e-5) == (role == "reasoning"), role
                    changed[role != "reasoning"] += 1
            for a, b in zip(plain["student_logp"], other["student_logp"], strict=True):
                assert a is b is None or abs(a - b) < 1e-5
    assert min(changed.values()) > 10


def test_data_shows_what_each_role_sees(world, rows, tmp_path, capsys):
    args = [f"--config.preview.output={tmp_path}"]
    assert run(world, rows, tmp_path, ROLES["crop"], *args, mode="data") == 1
    said = capsys.readouterr().out
    assert "perception (image: crop of box): " in said and "1 bad: no_box; " in said and "1 bad: bad_box; " in said
    assert (tmp_path / "data.html").read_text().count("data:image/png;base64,") >= 6, "of three rows, image and crop"


@pytest.mark.slow
def test_the_planner_counts_views(world, rows, tmp_path):
    args = ["--config.plan.topology=cpu:8", "--config.plan.memory_gb=1", "--config.plan.completion=12"]
    args += ["--config.plan.advise=False"]
    sizes = []
    for name, fields in (("original", {}), ("none", ROLES["none"]), ("other", ROLES["other"])):
        file = tmp_path / f"{name}.json"
        assert run(world, rows, tmp_path, fields, *args, f"--config.plan.output={file}", mode="plan") == 0
        sizes.append(json.loads(file.read_text())["sizes"]["teacher"])
    assert sizes[0] < sizes[1] <= sizes[2]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image": "crop", "image_column": "bbox"}, "views.jsonl lacks bbox; it has the columns"),
        ({"image": "crop"}, "config.roles.perception.image_column='' must be a column of the data"),
        ({"image": "zoomed"}, "config.roles.perception.image='zoomed' is unknown; choices: original, none, blank"),
    ],
)
def test_refusals(world, rows, tmp_path, capsys, fields, message):
    assert run(world, rows, tmp_path, fields) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]


def test_the_demo_has_no_columns(world, tmp_path, capsys):
    assert run(world, "demo", tmp_path, ROLES["crop"], "--config.model.path=demo") == 2
    assert "config.roles has image_column='box'; it must be ''" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_without_a_box_are_too_many(world, rows, tmp_path, capsys):
    assert run(world, rows, tmp_path, ROLES["crop"], "--config.data.max_bad_fraction=0.1", "--config.steps=4") == 1
    assert "no_box 1" in capsys.readouterr().err
