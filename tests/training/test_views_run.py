"""Runs whose roles see other images than the student, from the command line to the metrics; and what they refuse."""

import json

import numpy as np
import pytest
import tiny_runs as runs
from PIL import Image

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


def run(world, rows, workdir, fields, *args, steps=2):
    """A run whose perception role has these fields, of a config file of its own."""
    config = workdir.parent / f"{workdir.name}.py"
    changes = "".join(f"    config.roles.perception[{name!r}] = {value!r}\n" for name, value in fields.items())
    config.write_text(world.config.read_text().replace("    return config\n", f"{changes}    return config\n"))
    from vigos_jax import main

    flags = [f"--config={config}", f"--workdir={workdir}", f"--config.data.source={rows}", f"--config.steps={steps}"]
    return main.main(["vigos_jax", *flags, "--config.data.max_bad_fraction=0.5", *args])


@pytest.mark.parametrize("kind", ROLES)
def test_two_steps(world, rows, tmp_path, kind):
    assert run(world, rows, tmp_path / "run", ROLES[kind]) == 0
    metrics = runs.metrics_of(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2] and all(np.isfinite(row["loss"]) for row in metrics)
    assert sum(row["bad_rows"] for row in metrics) == (2 if kind == "crop" else 0)


def test_what_a_role_sees_changes_what_it_teaches_and_nothing_else(world, rows, tmp_path):
    """The first step's rollouts are alike: of valid ones, perception alone has another loss."""
    valid = "<description> red </description> <think> so </think> \\boxed{1}"
    out = {}
    for name, fields in {"original": {}, "none": ROLES["none"], "other": ROLES["other"]}.items():
        rollouts = [row | {"completion": valid} for row in runs.read_rows(rows)]
        file = runs.write_rows(world.folder / "rollouts.jsonl", rollouts)
        args = ["--mode=score", f"--config.score.rollouts={file}", f"--config.score.output={tmp_path / name}"]
        assert run(world, rows, tmp_path / f"{name}-run", fields, *args) == 0
        out[name] = [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
    for plain, *others in zip(*out.values(), strict=True):
        for other in others:
            for a, b, role in zip(plain["teacher_logp"], other["teacher_logp"], plain["role"], strict=True):
                assert a is None or (abs(a - b) < 1e-5) == (role == "reasoning"), role
            assert plain["student_logp"] == pytest.approx(other["student_logp"], abs=1e-5)


def test_data_shows_what_each_role_sees(world, rows, tmp_path, capsys):
    assert run(world, rows, tmp_path / "run", ROLES["crop"], "--mode=data") == 1
    said = capsys.readouterr().out
    assert "perception (image: crop of box): " in said and "1 bad: no_box; " in said and "1 bad: bad_box; " in said
    page = (tmp_path / "run" / "data.html").read_text()
    assert page.count("data:image/png;base64,") >= 6, "three rows, each with its image and its crop"


def test_the_planner_counts_views(world, rows, tmp_path, capsys):
    args = ["--mode=plan", "--config.plan.topology=cpu:8", "--config.plan.memory_gb=1", "--config.plan.advise=False"]
    sizes = []
    for name, fields in (("original", {}), ("none", ROLES["none"]), ("other", ROLES["other"])):
        file = tmp_path / f"{name}.json"
        assert run(world, rows, tmp_path / name, fields, *args, f"--config.plan.output={file}") == 0
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
    assert run(world, rows, tmp_path / "run", fields) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]


def test_the_demo_has_no_columns(world, tmp_path, capsys):
    assert run(world, "demo", tmp_path / "run", ROLES["crop"], "--config.model.path=demo") == 2
    assert "reads box (image_column), which the demo's rows lack" in capsys.readouterr().err


def test_rows_without_a_box_are_too_many(world, rows, tmp_path, capsys):
    assert run(world, rows, tmp_path / "run", ROLES["crop"], "--config.data.max_bad_fraction=0.1", steps=4) == 1
    assert "no_box 1" in capsys.readouterr().err
