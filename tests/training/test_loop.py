"""A run: every step once, the same numbers after an interruption, bad rows counted, the base untouched."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_runs as runs
from cases import others_slow
from tiny_runs import STEPS

from vigos_jax import main
from vigos_jax.method import packing
from vigos_jax.rollouts import engine
from vigos_jax.training import loop
from vigos_jax.training.run_log import MetricsFile
from vigos_jax.weights import reading

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# Those for published models are tests/test_published_sizes.py's.
OF_THE_HUB = ("vision_opd", "opd", "va_opd", "big_teacher")  # see test_teachers_run.py
METHODS = sorted(
    p
    for p in CONFIGS.glob("*.py")
    if p.stem not in ("__init__", *OF_THE_HUB) and "qwen" not in p.stem and not p.stem.endswith("_base")
)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


def test_every_step_is_written_once_and_learns(undisturbed):
    rows = runs.metrics_of(undisturbed.workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
        total = sum(r.weight * row[f"{r.name}/loss"] for r in undisturbed.session.roles)
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    state = runs.saved_state(undisturbed.workdir, STEPS)
    assert all(np.any(x != 0) for x in jax.tree.leaves(state["trained"]["lora"]))  # B started from zero


def test_the_base_is_not_modified(undisturbed, world):
    loaded = undisturbed.session
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded.base)
    runs.assert_same_trees(loaded.base, reading.load_params(world.model, loaded.config, shapes, dtype=np.float32))


def test_bad_rows_are_counted_and_said_by_the_exit_code(undisturbed, world, tmp_path, capsys):
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config.data.source={world.bad_data}"]
    assert world.run(*arguments) == 1
    rows = runs.metrics_of(tmp_path / "run")
    assert rows[-1]["bad_rows"] >= len(runs.BAD)  # 16 rows are more than an epoch of 10
    assert "16 rows bad: " in capsys.readouterr().err
    assert world.run(*arguments) == 1  # nothing is left to be done, and the rows are as bad
    assert runs.metrics_of(undisturbed.workdir)[-1]["bad_rows"] == 0


def test_too_many_bad_rows_stop_the_run(world, tmp_path, capsys):
    bad = f"--config.data.source={world.bad_data}"
    assert world.run(f"--workdir={tmp_path / 'run'}", bad, "--config.data.max_bad_fraction=0.0") == 2
    said = capsys.readouterr().err
    assert any(reason in said for reason in runs.BAD.values()) and "max_bad_fraction" in said


def test_a_finished_run_changes_nothing(undisturbed, world):
    before = runs.bytes_of(undisturbed.workdir)
    assert world.run(f"--workdir={undisturbed.workdir}") == 0
    assert runs.bytes_of(undisturbed.workdir) == before


def test_the_next_batch_is_packed_while_the_step_runs(world, tmp_path):
    """What comes next is on the mesh before anything of the running step is waited for."""
    events, fetch, pack = [], jax.device_get, engine.pack_prompts

    def note_fetch(x):
        events.extend(["metrics"] * (isinstance(x, dict) and "loss" in x))
        return fetch(x)

    def note_pack(*args, **kwargs):
        events.append("packed")
        return pack(*args, **kwargs)

    with mock.patch.object(jax, "device_get", note_fetch), mock.patch.object(engine, "pack_prompts", note_pack):
        assert world.run(f"--workdir={tmp_path / 'run'}", "--config.steps=3") == 0
    assert events == ["packed", "packed", "metrics", "packed", "metrics", "metrics"]


class Killed(BaseException):
    """Not an error that anything could handle."""


def run_killed_once(world, workdir, killed_at, arguments):
    """Kills a run after a step, before the step's checkpoint, and goes on to its end."""
    write = MetricsFile.write

    def write_then_die(self, row):
        write(self, row)
        if row["step"] == killed_at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsFile, "write", write_then_die)
        world.run(f"--workdir={workdir}", *arguments)
    assert world.run(f"--workdir={workdir}", *arguments) == 0


# Killed after a checkpoint, and before the first; a second case of each is slow.
KILLS = others_slow([(1, 3), (2, 2), (1, 1), (2, 3)], quick=2)


@pytest.mark.parametrize("every, killed_at", KILLS)
def test_a_killed_run_goes_on_to_the_same_numbers(undisturbed, world, tmp_path, every, killed_at):
    run_killed_once(world, tmp_path / "run", killed_at, [f"--config.checkpoint_every={every}"])
    assert runs.metrics_of(tmp_path / "run") == runs.metrics_of(undisturbed.workdir)
    runs.assert_same_trees(runs.saved_state(tmp_path / "run", STEPS), runs.saved_state(undisturbed.workdir, STEPS))


EMA = ("--config.teacher.weights=ema", "--config.teacher.ema_rate=0.5", "--config.lora.dropout=0.0")


@pytest.mark.slow
def test_a_killed_run_keeps_its_average(tmp_path_factory, undisturbed, world, tmp_path):
    whole = runs.finished_run(tmp_path_factory, *EMA)
    run_killed_once(world, tmp_path / "run", 3, EMA)
    assert runs.metrics_of(tmp_path / "run") == runs.metrics_of(whole.workdir)
    saved = runs.saved_state(whole.workdir, STEPS)
    runs.assert_same_trees(runs.saved_state(tmp_path / "run", STEPS), saved)
    apart = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), saved["average"], saved["trained"])
    assert all(jax.tree.leaves(apart)) and "average" not in runs.saved_state(undisturbed.workdir, STEPS)
    # It moved as it says, from where the adapter started.
    steps = [runs.saved_state(whole.workdir, n) for n in (STEPS - 1, STEPS)]
    want = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, steps[0]["average"], steps[1]["trained"])
    for a, b in zip(jax.tree.leaves(saved["average"]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.slow
def test_other_modes_use_the_average_as_the_run_did(tmp_path_factory, world, tmp_path):
    whole = runs.finished_run(tmp_path_factory, *EMA)
    saved = runs.saved_state(whole.workdir, STEPS)
    asked = [f"--config.score.rollouts={world.data}", f"--config.score.output={tmp_path / 'scores'}"]
    with mock.patch("vigos_jax.analysis.score_rollouts.score_rollouts", return_value=({}, [])) as score:
        assert world.run("--mode=score", f"--workdir={whole.workdir}", *asked) == 0
    runs.assert_same_trees(jax.device_get(score.call_args.kwargs["teacher_params"]), saved["average"])
    runs.assert_same_trees(jax.device_get(score.call_args.args[1]), saved["trained"])


def test_a_further_column_is_shown_to_the_role_that_names_it(world, tmp_path):
    rows = [row | {"caption": f"seen {i}"} for i, row in enumerate(runs.read_rows(world.data))]
    data = runs.write_rows(tmp_path / "data.jsonl", rows)
    runs.write_pictures(tmp_path / "pictures", len(rows))
    own = [f"--config.data.source={data}", "--config.data.fields=('caption',)", "--config.steps=1"]
    with mock.patch("vigos_jax.session.pack_scores", side_effect=packing.pack_scores) as pack:
        assert world.run(f"--workdir={tmp_path / 'run'}", "--config.prompts.reference.user=<{caption}>", *own) == 0
    decode = runs.processor(world.model).decode
    seen = [[decode(t.rest_ids) for t in (r.student, *r.teachers)] for r in pack.call_args.args[0] if r.student]
    assert seen
    for *others, reference in seen:
        assert re.match(r"<seen \d>", reference) and not any("seen" in text for text in others)


def test_a_changed_data_set_is_not_gone_on_with(world, tmp_path, capsys):
    data = runs.write_rows(tmp_path / "data.jsonl", runs.read_rows(world.data)[:1])
    runs.write_pictures(tmp_path / "pictures", 1)
    allowed = ["--config.data.max_bad_fraction=1.0", f"--config.data.source={data}", "--config.steps=1"]
    assert world.run(f"--workdir={tmp_path / 'run'}", *allowed) == 0
    rows = runs.read_rows(data)
    runs.write_rows(data, [rows[0] | {"problem": "another question"}])
    capsys.readouterr()
    assert world.run(f"--workdir={tmp_path / 'run'}", *allowed) == 2
    assert "cannot resume with other data" in capsys.readouterr().err


@pytest.mark.slow
def test_training_starts_from_a_given_adapter(world, tmp_path):
    workdir = tmp_path / "run"
    still = ["--config.optimizer.learning_rate=0.0", "--config.steps=1", "--config.lora.dropout=0.0"]
    assert world.run(f"--workdir={workdir}", f"--config.model.adapter={world.adapter}", *still) == 0
    saved = runs.saved_state(workdir, 1)["trained"]["lora"]
    tensors = safetensors.numpy.load_file(world.adapter / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(np.asarray(saved["layers"]["q_proj"]["a"])[0], tensors[name].T)
    assert np.asarray(saved["layers"]["q_proj"]["a"]).shape[-1] == runs.SPEC.rank


@pytest.mark.slow
def test_full_fine_tuning_trains_every_parameter_in_float32(tmp_path_factory, world):
    run = runs.finished_run(tmp_path_factory, "--config.lora.rank=0", "--config.optimizer.learning_rate=1e-3")
    # No dropout: sampler and scorer see the same student. A sampler of the base would be far off after step 1.
    assert max(row["sampler_logp_gap"] for row in runs.metrics_of(run.workdir)) < 1e-4
    params = runs.saved_state(run.workdir, STEPS)["trained"]["params"]
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), params, run.session.base)
    assert all(jax.tree.leaves(moved)), moved
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.slow  # the step itself is tests/training/test_step.py's, on a mesh tests/runtime/test_sharding.py's
def test_accumulation_changes_nothing_but_rounding(undisturbed, world, tmp_path):
    one = ["--config.lora.dropout=0.0", "--config.steps=1"]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=4"]
    for name, n in (("one", 1), ("two", 2)):
        assert world.run(f"--workdir={tmp_path / name}", f"--config.gradient_accumulation_steps={n}", *one, *mesh) == 0
    a, b = runs.metrics_of(tmp_path / "one")[0], runs.metrics_of(tmp_path / "two")[0]
    assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


# These differ from a config that is not slow in a row of the role table.
ALIKE = ("no_perception", "no_reasoning", "no_reference", "reference_forward_kl", "opsd_same_prompt")
ALIKE += ("text_only_teacher",)  # which test_views_run.py has in a run of its own


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in ALIKE else []) for p in METHODS],
    ids=[p.stem for p in METHODS],
)
def test_every_config_trains_on_the_demo(path, tmp_path):
    """What is shipped runs as it is, only shorter."""
    short = ["--config.steps=2", "--config.batch_size=8", "--config.demo_eval.questions=0"]
    short.append("--config.report.rows=0")
    arguments = [f"--config={path}", f"--workdir={tmp_path}", *short, "--config.export.after_training=False"]
    assert main.main(["vigos_jax", *arguments]) == 0
    rows = runs.metrics_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    roles = json.loads((tmp_path / "config.json").read_text())["roles"]
    for row in rows:
        assert all(np.isfinite(x) for x in row.values()), row
        assert row["grad_norm"] > 0 and row["bad_rows"] == 0
        here = [name for name, role in roles.items() if role["weight"]]
        for kind in ("loss_share", "grad_share"):
            assert sum(row[f"{name}/{kind}"] for name in here) == pytest.approx(1, abs=1e-5)
        assert all(row[f"{name}/tokens"] > 0 or row[f"{name}/loss"] == 0 for name in here)
        assert not any(f"{name}/loss" in row for name, role in roles.items() if not role["weight"])


@pytest.mark.slow
def test_worker_processes_give_the_same_run(undisturbed, world, tmp_path):
    assert world.run(f"--workdir={tmp_path / 'run'}", "--config.steps=4", "--config.data.workers=2") == 0
    assert runs.metrics_of(tmp_path / "run") == runs.metrics_of(undisturbed.workdir)


@pytest.mark.slow
def test_kill_minus_nine(world, tmp_path):
    """A real process, really killed; the undisturbed run is a process of its own too."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

    def start(workdir) -> subprocess.Popen:
        command = [sys.executable, "-m", "vigos_jax.main", f"--config={world.config}", f"--workdir={workdir}"]
        return subprocess.Popen(command, cwd=loop.__file__.rsplit("/", 3)[0], env=environment)

    assert start(tmp_path / "a").wait() == 0
    process = start(tmp_path / "b")
    metrics = tmp_path / "b" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "b").wait() == 0
    assert runs.metrics_of(tmp_path / "b") == runs.metrics_of(tmp_path / "a")
    runs.assert_same_trees(*(runs.saved_state(tmp_path / name, STEPS) for name in "ab"))
