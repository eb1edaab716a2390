"""A workdir is one run's at a time, and its own config's; a run may go on beyond its end where that changes nothing."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny_runs as runs
from tiny_runs import STEPS

from vigos_jax.errors import InputError
from vigos_jax.export.folder import Record
from vigos_jax.runtime.lock import Holder, held
from vigos_jax.training import loop, run_folder

ROOT = pathlib.Path(loop.__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


def refusal(capsys, call) -> str:
    capsys.readouterr()
    assert call() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


# -- one run at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "diagnose"])
def test_a_workdir_that_is_in_use(world, undisturbed, capsys, mode):
    """By another run of whatever mode that writes there."""
    before = runs.bytes_of(undisturbed.workdir)
    holder = dataclasses.replace(Holder.me(), processes={str(os.getppid()): ""})
    (undisturbed.workdir / ".lock").write_bytes(holder.to_json())
    try:
        said = refusal(capsys, lambda: world.run(f"--mode={mode}", f"--workdir={undisturbed.workdir}"))
    finally:
        (undisturbed.workdir / ".lock").unlink()
    assert f"{undisturbed.workdir} is in use by process {os.getppid()} on {holder.place[0]} since 20" in said
    assert runs.bytes_of(undisturbed.workdir) == before


def test_reading_a_workdir_needs_no_lock(world, undisturbed, tmp_path):
    """An export of a running run's checkpoint is written elsewhere."""
    (undisturbed.workdir / ".lock").write_bytes(Holder.me().to_json())
    try:
        export = ["--mode=export", f"--workdir={undisturbed.workdir}", f"--config.export.output={tmp_path / 'out'}"]
        assert world.run(*export) == 0
    finally:
        (undisturbed.workdir / ".lock").unlink()


@pytest.mark.parametrize("mode, field", [("eval", "eval.output"), ("export", "export.output")])
def test_an_output_that_is_in_use(world, tmp_path, capsys, mode, field):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_bytes(Holder.me().to_json())
    said = refusal(capsys, lambda: world.run(f"--mode={mode}", f"--config.{field}={tmp_path / 'out'}"))
    assert "out is in use by process" in said


@pytest.mark.slow
def test_two_processes_on_one_fresh_workdir(world, tmp_path):
    """One trains as if it were alone; the other says who has the workdir. One that is killed does not keep it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vigos_jax.main", f"--config={world.config}", f"--workdir={tmp_path / 'run'}"]
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate(timeout=500)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    winner, loser = both[codes.index(0)], said[codes.index(2)]
    assert f"run is in use by process {winner.pid} on" in loser and loser.count("\n") == 1
    assert [row["step"] for row in runs.metrics_of(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert not (tmp_path / "run" / ".lock").exists()

    process = subprocess.Popen([*command[:-1], f"--workdir={tmp_path / 'killed'}"], **options)
    while not (tmp_path / "killed" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "killed" / ".lock").exists()
    assert subprocess.run(process.args, env=environment).returncode == 0
    assert runs.metrics_of(tmp_path / "killed") == runs.metrics_of(tmp_path / "run")
    assert not (tmp_path / "killed" / ".lock").exists()


def test_a_run_lets_its_workdir_go_when_it_fails(world, tmp_path, capsys):
    bad = ["--config.data.max_bad_fraction=0.0", f"--config.data.source={world.bad_data}"]
    assert world.run(f"--workdir={tmp_path / 'run'}", *bad) == 2
    assert (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / ".lock").exists()
    with held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html", "checkpoints/1/x", "results.json"])
def test_files_of_somebody_else_are_not_written_over(world, tmp_path, capsys, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    said = refusal(capsys, lambda: world.run(f"--workdir={tmp_path / 'run'}"))
    assert "run has no config.json, but a " in said
    assert path.read_text() == "mine" and len(list((tmp_path / "run").iterdir())) == 1


@pytest.mark.parametrize(
    "mode, name",
    [("eval", "results.json"), ("eval", "report.md"), ("diagnose", "summary.json"), ("score", "summary.json")],
)
def test_nor_by_other_modes(world, tmp_path, capsys, mode, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    options = [f"--mode={mode}", f"--config.{mode}.output={tmp_path / 'out'}", f"--config.score.rollouts={world.data}"]
    said = refusal(capsys, lambda: world.run(*options))
    assert f"config.{mode}.output=" in said and f"holds a {name}" in said and "choose another folder" in said
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {name: "mine"}


# -- the export at the end --------------------------------------------------------------------------------------


def test_the_export_goes_into_an_empty_folder_and_is_known_again(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    own = [f"--workdir={tmp_path / 'run'}", "--config.steps=1", "--config.export.after_training=True"]
    own.append(f"--config.export.output={tmp_path / 'out'}")
    assert world.run(*own) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert capsys.readouterr().out.splitlines()[-1] == f"  {tmp_path / 'out'}"
    before = runs.bytes_of(tmp_path)
    monkeypatch.setattr(loop, "export", lambda *_, **__: pytest.fail("exported again"))
    assert world.run(*own) == 0  # it is known again
    assert capsys.readouterr().out.splitlines()[-1] == f"  {tmp_path / 'out'}" and runs.bytes_of(tmp_path) == before
    (tmp_path / "out" / "config.json").write_text("{}")  # as if another export had been put there
    assert "not an empty folder" in refusal(capsys, lambda: world.run(*own))
    monkeypatch.undo()
    monkeypatch.setattr(loop, "export", lambda *_, **__: pytest.fail("exported"))
    assert "not an empty folder" in refusal(capsys, lambda: world.run(*own, "--config.export.kind=adapter"))


# -- going on beyond the end ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(world, undisturbed, tmp_path, capsys):
    """Bitwise as if it had been that long from the start; what was made at its former end stays, under that step."""
    own = [f"--workdir={tmp_path / 'run'}", "--config.export.after_training=True"]
    assert world.run(*own, "--config.steps=2") == 0
    (tmp_path / "run" / "results.json").write_text('{"of": "step 2"}')
    first = runs.bytes_of(tmp_path / "run" / "export")
    assert world.run(*own, f"--config.steps={STEPS}") == 0
    assert runs.metrics_of(tmp_path / "run") == runs.metrics_of(undisturbed.workdir)
    runs.assert_same_trees(runs.saved_state(tmp_path / "run", STEPS), runs.saved_state(undisturbed.workdir, STEPS))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == STEPS
    assert runs.bytes_of(tmp_path / "run" / "export-step-2") == first
    assert runs.bytes_of(tmp_path / "run" / "export")["model.safetensors"] != first["model.safetensors"]
    assert (tmp_path / "run" / "results-step-2.json").exists() and not (tmp_path / "run" / "results.json").exists()
    assert Record.of(tmp_path / "run" / "exported.json").step == STEPS
    said = refusal(capsys, lambda: world.run(*own, "--config.steps=2"))
    assert "steps: 4 -> 2" in said
    said = refusal(capsys, lambda: world.run(*own, "--config.steps=9", "--config.seed=3"))
    assert "steps: 4 -> 9" in said and "seed: 0 -> 3" in said


@pytest.mark.slow
def test_a_run_whose_rates_would_have_been_others_is_not_gone_on_with(world, tmp_path, capsys):
    own = [f"--workdir={tmp_path / 'run'}", "--config.optimizer.schedule=linear"]
    assert world.run(*own, "--config.steps=1") == 0
    assert world.run(*own, "--config.steps=3") == 0  # the first step's rate is the same
    said = refusal(capsys, lambda: world.run(*own, "--config.steps=5"))
    assert "config.steps: 3 -> 5: with optimizer.schedule=linear the 3 steps taken" in said
    assert "schedule=constant from the start, or another --workdir" in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 3


def test_rates_are_compared_up_to_the_newest_checkpoint(world, tmp_path):
    config = loop_config(steps=100, warmup=10)
    longer = loop_config(steps=200, warmup=10)
    for done, is_same in ((0, True), (10, True), (11, True), (12, False), (100, False)):
        folder = tmp_path / str(done)
        (folder / "checkpoints" / str(done)).mkdir(parents=True)
        if is_same:
            run_folder._check_extension(config, longer, folder)
        else:
            with pytest.raises(InputError, match=f"the {done} steps taken would have had other learning rates"):
                run_folder._check_extension(config, longer, folder)


def loop_config(*, steps: int, warmup: int):
    from configs import base

    config = base.get_config()
    config.steps, config.optimizer.warmup_steps, config.optimizer.schedule = steps, warmup, "linear"
    return config
