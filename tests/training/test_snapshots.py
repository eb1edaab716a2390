"""Snapshots: the same rows again and again, each once, scored as everywhere, and a run that notices nothing."""

import hosts
import numpy as np
import pytest
import tiny_runs as runs
from tiny_runs import STEPS

from vigos_jax.data.sources import JsonlSource
from vigos_jax.demo.scenes import PRIORS, describe
from vigos_jax.demo.source import DemoProbes
from vigos_jax.demo.world import WORLDS
from vigos_jax.runtime.journal import Journal
from vigos_jax.training.run_log import MetricsFile
from vigos_jax.training.snapshots import Snapshots

EVERY = ("--config.report.rows=3", "--config.report.every=2")
KEYS = [*(f"row/{i}" for i in range(3)), *(f"{step}/{i}" for step in (0, 2, 4) for i in range(3))]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


def bad_data(world) -> str:
    """Row 2 is a bad one; the exit code of a run says that there are some."""
    return f"--config.data.source={world.bad_data}"


@pytest.fixture(scope="module")
def without(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory, bad_data(world)).workdir


@pytest.fixture(scope="module")
def watched(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory, *EVERY, bad_data(world)).workdir


def metrics(workdir) -> list[dict]:
    clock = ("seconds/", "compilations", "tokens_per_second")
    rows = runs.read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def records(workdir) -> dict[str, dict]:
    rows = runs.read_rows(workdir / "report.jsonl")
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


@pytest.mark.slow
def test_the_run_is_not_disturbed(watched, without):
    """The same parameters and optimizer state, bit by bit, and the same metrics."""
    runs.assert_same_trees(runs.saved_state(watched, STEPS), runs.saved_state(without, STEPS))
    assert metrics(watched) == metrics(without)
    assert not (without / "report.jsonl").exists() and (without / "report.html").exists()


@pytest.mark.slow
def test_what_is_written(watched):
    found = records(watched)
    assert sorted(found) == sorted(KEYS)
    assert found["row/2"]["bad_reason"] == runs.BAD[2] and "tokens" not in found["0/2"]
    assert found["row/1"]["picture"].startswith("data:image/png;base64,")
    assert (found["row/1"]["problem"], found["row/1"]["reference"]) == ("What colour is 1?", "1")
    for key in ("0/0", "4/1"):
        record = found[key]
        scored = [j for j, role in enumerate(record["role"]) if role]
        assert scored and len(record["tokens"]) == len(record["kl"]) == len(record["role"])
        assert all((record["kl"][j] is None) == (j not in scored) for j in range(len(record["kl"])))
    assert any(found[f"0/{i}"]["tokens"] != found[f"4/{i}"]["tokens"] for i in (0, 1))  # the student has moved
    page = (watched / "report.html").read_text()
    assert '"steps": [0, 2, 4]' in page and "image_missing" in page and "Loss by role" in page


@pytest.mark.slow
def test_scores_are_those_of_mode_score(watched, world, tmp_path):
    """The last snapshot's rollouts, scored by --mode score from their tokens, have the same divergences."""
    found, shots = records(watched), []
    for i in (0, 1):
        record, asked = found[f"{STEPS}/{i}"], found[f"row/{i}"]
        row = {"id": asked["id"], "images": [str(world.folder / f"pictures/{i}.png")], "problem": asked["problem"]}
        shots.append(row | {"answer": asked["reference"], "completion_ids": record["completion_ids"]})
    rollouts = runs.write_rows(tmp_path / "rollouts.jsonl", shots)
    args = [f"--workdir={watched}", "--mode=score", f"--config.score.rollouts={rollouts}"]
    assert world.run(*args, f"--config.score.output={tmp_path / 'scores'}") == 0
    for i, scored in enumerate(runs.read_rows(tmp_path / "scores" / "scores.jsonl")):
        record = found[f"{STEPS}/{i}"]
        assert record["role"] == scored["role"]
        for name in ("kl", "student_logp", "teacher_logp"):
            ours, theirs = ([np.nan if x is None else x for x in r[name]] for r in (record, scored))
            np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=name)


class Killed(BaseException):
    """Not an error that anything could handle."""


@pytest.mark.slow
def test_a_run_killed_within_a_line_has_every_snapshot_once(watched, world, tmp_path, monkeypatch):
    workdir, append = tmp_path / "run", Journal.append

    def append_then_die(self, key, record):
        append(self, key, record)
        if key == "2/1":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "append", append_then_die)
        world.run(f"--workdir={workdir}", *EVERY, bad_data(world), "--config.checkpoint_every=4")
    path = workdir / "report.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert world.run(f"--workdir={workdir}", *EVERY, bad_data(world), "--config.checkpoint_every=4") == 1
    assert records(workdir) == records(watched)
    assert metrics(workdir) == metrics(watched)


@pytest.mark.slow
def test_a_step_that_is_done_again_samples_nothing(watched, world, tmp_path, monkeypatch):
    workdir, write, taken = tmp_path / "run", MetricsFile.write, []

    def die_at_three(self, row):
        write(self, row)
        if row["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsFile, "write", die_at_three)
        world.run(f"--workdir={workdir}", *EVERY, bad_data(world), "--config.checkpoint_every=4")
    answer = Snapshots._answer
    monkeypatch.setattr(Snapshots, "_answer", lambda self, *args: taken.append(1) or answer(self, *args))
    assert world.run(f"--workdir={workdir}", *EVERY, bad_data(world), "--config.checkpoint_every=4") == 1
    assert len(taken) == 1 and records(workdir) == records(watched)  # step 4 alone


def test_a_finished_run_changes_nothing(watched, world):
    before = runs.bytes_of(watched)
    assert world.run(f"--workdir={watched}", *EVERY, bad_data(world)) == 1
    assert runs.bytes_of(watched) == before


@pytest.mark.parametrize("world", WORLDS)
def test_demo_probes_take_turns(world):
    probes = DemoProbes(world, seed=42, length=5, blank=False)
    assert [probes.item(i).is_conflict for i in range(5)] == [True, False, True, False, True]
    for i in range(5):
        row, item = probes[i], probes.item(i)
        assert (row["id"], row["problem"], row["answer"]) == (item.id, item.question, item.answer)


@pytest.mark.parametrize("world", WORLDS)
def test_leaky_on_the_demo_is_the_prior_in_a_description_of_a_conflict(world):
    probes = DemoProbes(world, seed=42, length=2, blank=False)
    for i in (0, 1):
        item = probes.item(i)
        expected = describe([PRIORS[kind] for kind in item.things])
        assert probes.is_leaky(i, expected, item.answer) == item.is_conflict
        assert not (item.is_conflict and probes.is_leaky(i, describe(item.scene.things), item.answer))


def test_leaky_elsewhere_is_a_description_with_the_answer(world):
    source = JsonlSource(world.data)
    assert source.probes(count=3, seed=0) is source.for_diagnosis(count=3, seed=0) is source
    assert source.is_leaky(0, "two red cars", "red") and not source.is_leaky(0, "two red cars", "blue")
    assert not source.is_leaky(0, "two red cars", None)


@pytest.mark.slow
def test_several_processes(world, tmp_path):
    """Two processes with four devices each write what one process with eight does."""
    args = [f"--config={world.config}", *EVERY, "--config.steps=2", "--config.optimizer.learning_rate=0.0"]
    for processes in (1, 2):
        jobs = [{"name": "a", "args": [*args, f"--workdir={tmp_path / f'run-{processes}'}"]}]
        results = hosts.launch(tmp_path / f"jobs-{processes}", jobs, processes=processes, devices=8 // processes)
        assert [r["a"]["code"] for r in results] == [0] * processes
    one, two = (records(tmp_path / f"run-{n}") for n in (1, 2))
    assert one.keys() == two.keys()
    # Sums over devices come in any order, and now and then a draw lies on an edge.
    same = [key for key in one if one[key].get("tokens") == two[key].get("tokens")]
    assert len(same) >= 0.9 * len(one)
    assert any("kl" in one[key] for key in same)
    for key in same:
        if "kl" in one[key]:
            ours, theirs = ([np.nan if x is None else x for x in r["kl"]] for r in (one[key], two[key]))
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
