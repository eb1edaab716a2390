"""Benchmarks during training: their numbers beside the run's, and a run that goes on as if nothing had happened."""

import json

import hosts
import pytest
import tiny_runs as runs
from tiny_runs import STEPS

from vigos_jax.evaluation.answers import Asker
from vigos_jax.evaluation.benchmark import Evaluation
from vigos_jax.training import periodic_eval
from vigos_jax.training.run_log import MetricsFile

EVERY = ("--config.eval_every=2", "--config.eval.tasks=('demo',)", "--config.eval.demo_questions=2")
EVERY += ("--config.eval.samples=2", "--config.eval.max_tokens=8", "--config.eval.batch_size=8")
EVERY += ("--config.eval.limit=3", "--config.buckets.patches=(128,)", "--config.buckets.prompt=(192,)")
SAMPLES = 3 * 2


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def without(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory, *EVERY, "--config.eval_every=0").workdir


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory, *EVERY).workdir


def rows_of(workdir, name="eval") -> list[dict]:
    """Rows without what the clock and the compiler's cache say."""
    rows = runs.read_rows(workdir / f"{name}.jsonl")
    clock = ("seconds", "compilations", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def answers(workdir) -> list[dict]:
    return runs.read_rows(workdir / "eval" / "responses.jsonl")


@pytest.mark.slow
def test_rows_of_the_steps_whose_turn_it_is(evaluated, without):
    rows = rows_of(evaluated)
    assert [row["step"] for row in rows] == [2, 4] and rows[0]["model"] != rows[1]["model"]
    for row in rows:
        assert (row["demo/questions"], row["demo/samples"], row["demo/errors"]) == (3, SAMPLES, 0)
        assert 0 <= row["demo/avg_low"] <= row["demo/avg"] <= row["demo/pass"] <= 100
        assert {"demo/score", "demo/prior", "demo/format_valid", "demo/truncated"} <= set(row)
    texts = [r["text"] for r in answers(evaluated)]
    assert len(texts) == 2 * SAMPLES and texts[:SAMPLES] != texts[SAMPLES:]  # the student had moved
    assert not (without / "eval.jsonl").exists() and not (without / "eval").exists()


@pytest.mark.slow
def test_the_run_is_not_disturbed(evaluated, without):
    """The same parameters and optimizer state, bit by bit, and the same metrics, each step once."""
    runs.assert_same_trees(runs.saved_state(evaluated, STEPS), runs.saved_state(without, STEPS))
    assert rows_of(evaluated, "metrics") == rows_of(without, "metrics")


class Killed(BaseException):
    """Not an error that anything could handle."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["between answers", "before the row"])
def test_a_killed_run_samples_no_answer_twice(evaluated, world, tmp_path, monkeypatch, place):
    """Killed while it evaluates step 4, and started again: from the answers that are there to the same rows."""
    workdir, record, count = tmp_path / "run", Asker._record, 0

    def record_then_die(self, job, ids):
        nonlocal count
        count += 1
        if count == SAMPLES + 3:
            raise Killed
        return record(self, job, ids)

    def die(self, row):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if place == "between answers":
            patch.setattr(Asker, "_record", record_then_die)
        else:
            patch.setattr(periodic_eval, "MetricsFile", type("Dead", (MetricsFile,), {"write": die}))
        world.run(f"--workdir={workdir}", *EVERY)
    before = answers(workdir)
    assert len(before) == (SAMPLES + 2 if place == "between answers" else SAMPLES)
    assert world.run(f"--workdir={workdir}", *EVERY) == 0
    assert answers(workdir) == answers(evaluated) and answers(workdir)[: len(before)] == before
    assert rows_of(workdir) == rows_of(evaluated)


@pytest.mark.slow
def test_a_step_done_again_is_not_evaluated_again(evaluated, world, tmp_path, monkeypatch):
    """Step 2's checkpoint is lost with the run: its answers are not."""
    workdir, write, own = tmp_path / "run", MetricsFile.write, [*EVERY, "--config.checkpoint_every=4"]

    def die_at_three(self, row):
        write(self, row)
        if row["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsFile, "write", die_at_three)
        world.run(f"--workdir={workdir}", *own)
    said = []
    run = Evaluation.run
    monkeypatch.setattr(Evaluation, "run", lambda *args, **kwargs: said.append(1) or run(*args, **kwargs))
    assert world.run(f"--workdir={workdir}", *own) == 0
    assert len(said) == 1 and rows_of(workdir) == rows_of(evaluated) and answers(workdir) == answers(evaluated)


@pytest.mark.slow
def test_the_finished_run_is_evaluated_from_the_same_answers(evaluated, world, monkeypatch):
    """`--mode eval` of the newest checkpoint finds what was sampled during training."""
    monkeypatch.setattr(Asker, "_sample_batch", lambda *args: pytest.fail("sampled again"))
    assert world.run("--mode=eval", f"--workdir={evaluated}", *EVERY) == 0
    numbers = json.loads((evaluated / "eval" / "results.json").read_text())["demo"]
    last = rows_of(evaluated)[-1]
    assert all(last[f"demo/{k}"] == numbers[k] for k in ("pass", "avg", "tokens", "score"))


def test_what_is_wrong_is_said_before_the_first_step(world, tmp_path, capsys):
    for option, word in (
        ("--config.eval.tasks=('nothing',)", "'nothing' is unknown"),
        ("--config.eval_every=-1", "config.eval_every=-1"),
    ):
        assert world.run(f"--workdir={tmp_path / 'run'}", *EVERY, option) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1
        assert not (tmp_path / "run").exists()  # a run that cannot begin takes no workdir


@pytest.mark.slow
def test_several_processes(world, tmp_path):
    """Two processes with four devices each ask, keep and count what one process with eight does."""
    args = [f"--config={world.config}", *EVERY, "--config.steps=2", "--config.optimizer.learning_rate=0.0"]
    for processes in (1, 2):
        jobs = [{"name": "a", "args": [*args, f"--workdir={tmp_path / f'run-{processes}'}"]}]
        results = hosts.launch(tmp_path / f"jobs-{processes}", jobs, processes=processes, devices=8 // processes)
        assert [r["a"]["code"] for r in results] == [0] * processes
    one, two = (tmp_path / f"run-{n}" for n in (1, 2))
    assert answers(two) == answers(one) and len(answers(one)) == SAMPLES
    assert rows_of(two) == rows_of(one) and len(rows_of(one)) == 1
