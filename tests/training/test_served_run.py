"""A run whose rollouts come from a server: the same numbers, and what happens when the server is wrong or goes away."""

import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import tiny_runs as runs
from policy_server import FakePolicy, ModelPolicy, PolicyServer, refused, serving
from tiny_runs import STEPS

from vigos_jax.rollouts import server_client
from vigos_jax.rollouts.engine import NativeEngine, Sampled
from vigos_jax.rollouts.server_engine import ServerEngine
from vigos_jax.training import loop

BATCH = 4
GENERATE = "/inference/v1/generate"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_client, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


def options(url, **fields):
    fields = {"engine": "vllm", "urls": f"('{url}',)", "model": "base", "retries": 3, "timeout": 100.0} | fields
    return ["--config.lora.dropout=0.0", *(f"--config.rollout.{k}={v}" for k, v in fields.items())]


@pytest.fixture(scope="module")
def policy(world):
    """The world's model behind a server: the very programs that a run compiles."""
    return ModelPolicy.of_config(world.config, batch=BATCH)


@pytest.fixture(scope="module")
def served(world, policy, tmp_path_factory):
    """(workdir, sampled batches) of a run that nothing disturbs."""
    workdir, sampled = tmp_path_factory.mktemp("served") / "run", []
    real = ServerEngine.finish

    def finish(self, ticket):
        sampled.append(real(self, ticket))
        return sampled[-1]

    with serving(policy) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerEngine, "finish", finish)
        assert world.run(f"--workdir={workdir}", *options(server.url)) == 0
        assert not server.adapters and len(server.bodies(GENERATE)) == STEPS * BATCH
    assert not list((workdir / "adapters").iterdir())
    return workdir, sampled


def close(row, other):
    """The numbers of two steps whose sums have other orders."""
    return all(row[k] == pytest.approx(other[k], rel=1e-4, abs=2e-5) for k in row)


@pytest.mark.slow
def test_a_served_run_trains_as_a_native_one_on_the_same_rollouts(world, served, tmp_path, monkeypatch):
    workdir, sampled = served
    rows = runs.metrics_of(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sampler_logp_gap"] < 1e-4 for row in rows), "the server had another adapter"
    assert all(row["rollout_staleness"] == row["rollout_failed"] == 0 for row in rows)
    assert any(len(ids) > 1 for s in sampled for ids in s.completions.ids)

    class Replay(NativeEngine):
        replies = iter(sampled)

        def sample(self, prepared, keys):
            images = super().sample(prepared, keys).images
            return Sampled(next(self.replies).completions, 0, images)

    monkeypatch.setattr(loop, "engine_of", lambda *_, **__: Replay)
    assert world.run(f"--workdir={tmp_path / 'native'}", "--config.lora.dropout=0.0") == 0
    for row, native in zip(rows, runs.metrics_of(tmp_path / "native"), strict=True):
        assert row["loss"] == pytest.approx(native["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(native["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_server_that_is_restarted_in_the_middle_changes_nothing(world, served, policy, tmp_path):
    first = PolicyServer(policy).start()
    port, again = first.server_address[1], []

    def restart(handler, right):
        """In the middle of the third step's requests, with all it knows lost."""
        handler.connection.close()
        threading.Thread(target=stop_and_start).start()

    def stop_and_start():
        first.stop()
        time.sleep(0.1)
        again.append(PolicyServer(policy, port=port).start())

    first.script = [*[lambda handler, right: right()] * (2 * BATCH + 1), restart]
    assert world.run(f"--workdir={tmp_path / 'run'}", *options(first.url, retries=9)) == 0
    (second,) = again
    second.stop()
    assert second.bodies(GENERATE) and len(second.bodies("/v1/load_lora_adapter")) >= 2
    rows, undisturbed = runs.metrics_of(tmp_path / "run"), runs.metrics_of(served[0])
    assert len(rows) == STEPS and all(map(close, rows, undisturbed))


@pytest.mark.slow
def test_a_stale_adapter_is_caught(world, policy, tmp_path, capsys):
    with serving(policy, is_stale=True) as server:
        assert world.run(f"--workdir={tmp_path / 'run'}", *options(server.url)) == 2
    said = capsys.readouterr().err
    assert "above 0.001 ends the run" in said
    line = said.strip().splitlines()[-1]
    assert re.search(r"step 2: sampler_logp_gap is [\d.]+, and must be at most 0\.001 .*saved at step 2 of 4", line)
    rows = runs.metrics_of(tmp_path / "run")
    assert len(rows) == 2 and rows[0]["sampler_logp_gap"] < 1e-4 < 1e-3 < rows[1]["sampler_logp_gap"]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_servers_that_are_lost_end_the_run_and_it_goes_on(world, served, policy, tmp_path, capsys):
    server = PolicyServer(policy).start()
    lost = [lambda handler, right: right()] * (2 * BATCH)
    lost.append(lambda handler, right: (server.stop(), handler.connection.close()))
    server.script, port = lost, server.server_address[1]
    command = [f"--workdir={tmp_path / 'run'}", *options(server.url), "--config.checkpoint_every=100"]
    assert world.run(*command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"^vigos_jax: no server of config\.rollout\.urls answers .*; saved at step 2 of 4; the same", line)
    assert len(runs.metrics_of(tmp_path / "run")) == 2
    again = PolicyServer(policy, port=port).start()
    assert world.run(*command) == 0
    again.stop()
    rows, undisturbed = runs.metrics_of(tmp_path / "run"), runs.metrics_of(served[0])
    assert len(rows) == STEPS and all(map(close, rows, undisturbed))


def test_a_signal_during_a_request_saves_and_stops(world, policy, tmp_path, capsys):
    def interrupt(handler, right):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with serving(policy, *[lambda handler, right: right()] * BATCH, interrupt) as server:
        start = time.monotonic()
        command = [f"--workdir={tmp_path / 'run'}", *options(server.url), "--config.checkpoint_every=100"]
        assert world.run(*command) == 0
        assert "SIGINT: stopped, saved at step 1 of 4" in capsys.readouterr().err
        assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
        assert time.monotonic() - start < 30


def test_a_row_that_fails_alone_is_counted(world, policy, tmp_path, capsys):
    with serving(policy, refused(400, "odd")) as server:
        command = [f"--workdir={tmp_path / 'run'}", *options(server.url), "--config.steps=2"]
        assert world.run(*command) == 1
    rows = runs.metrics_of(tmp_path / "run")
    assert [row["rollout_failed"] for row in rows] == [1, 1] and [row["bad_rows"] for row in rows] == [0, 0]
    said = capsys.readouterr().err
    assert "1 of 8 rows bad: rollout_failed 1" in said and "400: odd" in said
    assert np.isfinite(rows[0]["loss"])


def test_generate_asks_the_server(world, policy, tmp_path, capsys):
    fake = FakePolicy(policy.processor)
    arguments = [f"--config.generate.image={world.folder}/pictures/0.png", "--config.generate.question=What?"]
    with serving(fake) as server:
        assert world.run("--mode=generate", *arguments, *options(server.url)) == 0
        assert {body["model"] for body in server.bodies(GENERATE)} == {"base"}
    assert capsys.readouterr().out.startswith("<description>")
    url = server.url
    assert world.run("--mode=generate", *arguments, *options(url)) == 2
    assert "must be servers that are well" in capsys.readouterr().err


@pytest.mark.slow
def test_rollouts_of_the_next_step_are_under_way_during_an_update(world, policy, tmp_path, monkeypatch):
    """One step behind at most: each batch but the first is asked for before the update that is before its own."""
    events, real = [], loop.RolloutQueue.take

    def take(self, trained, *, step):
        out = real(self, trained, step=step)
        events.append((step, len(server.bodies("/v1/load_lora_adapter")), self._next))
        return out

    monkeypatch.setattr(loop.RolloutQueue, "take", take)
    limit = "--config.guards.sampler_gap=9.0"
    with serving(policy) as server:
        command = [f"--workdir={tmp_path / 'run'}", *options(server.url, max_staleness=1), limit]
        assert world.run(*command, "--config.steps=3") == 0
        names = [body["model"] for body in server.bodies(GENERATE)]
    rows = runs.metrics_of(tmp_path / "run")
    assert [row["rollout_staleness"] for row in rows] == [0, 1, 1]
    assert [next_one for _, _, next_one in events] == [2, 3, 3]
    steps = [int(name.rpartition("-")[2]) for name in names]
    assert sorted(steps) == [0] * 2 * BATCH + [1] * BATCH and rows[0]["sampler_logp_gap"] < 1e-4
    # Each step's rollouts are scored by a student that is one update ahead.
    assert all(row["sampler_logp_gap"] > 1e-3 for row in rows[1:])
    # A run that goes on asks again for what was under way, with the weights it has.
    with serving(policy) as server:
        assert world.run(*command[:1], *options(server.url, max_staleness=1), limit, "--config.steps=4") == 0
    assert [row["rollout_staleness"] for row in runs.metrics_of(tmp_path / "run")] == [0, 1, 1, 0]
