"""Steps whose numbers are not finite change nothing and are written down; a policy that collapses is told of."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

from vigos_jax.training import loop
from vigos_jax.training.guards import Health, write_nonfinite

GUARDS = {
    "max_skipped": 3, "window": 2, "valid_rate": (0.5, 1.0), "completion_tokens": (2.0, 1e9), "entropy": (0.0, 5.0),
    "stop": False,
}  # fmt: skip
GOOD = {"step": 1, "skipped": 0.0, "valid_rate": 0.9, "completion_tokens": 9.0, "entropy": 1.0}


def test_means_that_leave_their_bounds(tmp_path):
    health = Health(GUARDS)
    for valid_rate, news in ((0.2, 0), (0.2, 1), (0.2, 0), (0.9, 0), (0.9, 0), (0.0, 1), (0.0, 0)):
        health.update(GOOD | {"valid_rate": valid_rate})
        assert len(health.news) == news, valid_rate
    assert health.news == [] and health.alerts["valid_rate"] == (
        "valid_rate is 0 over the last 2 steps, and must be inside config.guards.valid_rate=(0.5, 1)"
    )
    assert not health.reason_to_stop(tmp_path)
    stopping = Health(GUARDS | {"stop": True}, health.state())
    assert "valid_rate is 0" in stopping.reason_to_stop(tmp_path)


@pytest.mark.parametrize("name, value", [("completion_tokens", 1.0), ("entropy", 5.1), ("valid_rate", 0.4)])
def test_each_guard(name, value):
    health = Health(GUARDS)
    for _ in range(2):
        health.update(GOOD | {name: value})
    assert list(health.alerts) == [name]


def test_what_a_step_has_not_measured_is_no_alarm():
    """A batch of bad rows has no rollouts, and no rates."""
    health = Health(GUARDS)
    for _ in range(4):
        health.update({"step": 1, "skipped": 0.0, "entropy": math.nan})
    assert not health.alerts


def test_skipped_steps_in_a_row(tmp_path):
    health, states = Health(GUARDS), []
    for i, skipped in enumerate((1, 1, 0, 1, 1, 1)):
        assert not health.reason_to_stop(tmp_path)
        health = Health(GUARDS, json.loads(json.dumps(health.state())))  # gone on from a checkpoint at every step
        health.update(GOOD | {"step": i, "skipped": float(skipped)})
        states.append(health.state())
        assert bool(health.news) == bool(skipped)
    assert health.skipped == 5 and "3 steps in a row" in health.reason_to_stop(tmp_path / "nonfinite")
    assert str(tmp_path / "nonfinite") in health.reason_to_stop(tmp_path / "nonfinite")


def test_what_was_sick_is_json(tmp_path):
    write_nonfinite(tmp_path / "nonfinite", {"step": 3, "loss": math.nan, "x": 1.0}, [{"id": "a"}])
    (path,) = (tmp_path / "nonfinite").iterdir()
    assert path.name == "step-3-process-0.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 3, "loss": None, "x": 1.0}, {"id": "a"}
    ]  # fmt: skip


# -- in a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


def poisoned(monkeypatch, steps):
    """The sampler's log-probabilities stay as they are; the embedding of the base is not a number in these steps."""
    make, at = loop.train_step_of, iter(range(100))

    def make_poisoned(*args):
        step = make(*args)

        def run(state, base, batches, key, **rest):
            if next(at) in steps:
                base = jax.tree.map(lambda x: x * jnp.nan, base)
            return step(state, base, batches, key, **rest)

        return run

    monkeypatch.setattr(loop, "train_step_of", make_poisoned)


def test_a_step_that_is_not_finite_changes_nothing(world, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {1, 2})
    workdir = tmp_path / "run"
    assert world.run(f"--workdir={workdir}") == 0
    rows = runs.read_rows(workdir / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0] and [row["skipped_steps"] for row in rows] == [0, 1, 2, 2]
    assert rows[1]["loss"] is None and math.isfinite(rows[3]["loss"])
    states = [runs.saved_state(workdir, step) for step in (1, 2, 3, 4)]
    runs.assert_same_trees(states[0], states[1])
    runs.assert_same_trees(states[1], states[2])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (states[2], states[3])), strict=True))
    # The learning rate that is told is the one that was used: skipped steps do not count.
    said = capsys.readouterr().err
    assert "step 2 changed nothing" in said and "step 3 changed nothing" in said and "step 4 changed" not in said
    first, *rest = runs.read_rows(workdir / "nonfinite" / "step-2-process-0.jsonl")
    assert first["step"] == 2 and len(rest) == 4 and {"id", "completion_ids", "completion"} <= set(rest[0])
    assert sorted(p.name for p in (workdir / "nonfinite").iterdir()) == [f"step-{n}-process-0.jsonl" for n in (2, 3)]


@pytest.mark.slow
def test_many_in_a_row_end_the_run(world, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, set(range(1, 100)))
    arguments = [f"--workdir={tmp_path / 'run'}", "--config.guards.max_skipped=2", "--config.steps=6"]
    assert world.run(*arguments) == 2
    said = capsys.readouterr().err
    assert (
        "2 steps in a row had a loss or gradient that is not finite" in said and str(tmp_path / "run/nonfinite") in said
    )
    assert [row["skipped"] for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1]
    assert runs.saved_state(tmp_path / "run", 3)


@pytest.mark.slow
def test_a_collapse_warns_and_stops_if_asked_to(world, tmp_path, capsys):
    """A random model writes no format at all: its valid rate is 0."""
    arguments = [f"--workdir={tmp_path / 'run'}", "--config.guards.valid_rate=(0.5,1.0)", "--config.guards.window=2"]
    assert world.run(*arguments) == 0
    said = capsys.readouterr().err
    assert said.count("warning: valid_rate is 0 over the last 2 steps") == 1
    assert [row["alerts"] for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1, 1]
    arguments = [a.replace("run", "stops") for a in arguments]
    assert world.run(*arguments, "--config.guards.stop=True") == 2
    assert "valid_rate is 0" in capsys.readouterr().err
    assert len(runs.read_rows(tmp_path / "stops" / "metrics.jsonl")) == 2
    # Other bounds are not another run.
    assert world.run(f"--workdir={tmp_path / 'stops'}") == 0


@pytest.mark.slow
def test_batches_without_a_loss_are_legal(world, tmp_path):
    rows = [row | {"answer": ""} for row in runs.read_rows(world.data)[:3]]
    data = runs.write_rows(tmp_path / "data.jsonl", [*rows, runs.read_rows(world.data)[0]])
    runs.write_pictures(tmp_path / "pictures", 4)
    own = [f"--config.data.source={data}", "--config.data.max_bad_fraction=1.0", "--config.data.shuffle=False"]
    own += ["--config.steps=2", "--config.roles.reference.weight=0"]
    assert world.run(f"--workdir={tmp_path / 'run'}", *own) == 1
    for row in runs.read_rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["loss"] == 0 and row["skipped"] == 0 and row["grad_norm"] == 0


@pytest.mark.parametrize("value", ["(1.0,0.5)", "(0.5,)", "('a','b')"])
def test_bounds_must_be_bounds(world, tmp_path, capsys, value):
    assert world.run(f"--workdir={tmp_path / 'run'}", f"--config.guards.valid_rate={value}") == 2
    assert "config.guards.valid_rate" in capsys.readouterr().err and not (tmp_path / "run").exists()
