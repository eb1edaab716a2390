"""Several processes do what one does: the same rows once, the same numbers, no process waits for another in vain."""

import os
import pathlib
import shutil
from unittest import mock

import hosts
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_runs as runs

from vigos_jax import main
from vigos_jax.errors import InputError
from vigos_jax.runtime import distributed
from vigos_jax.runtime.distributed import _from_variables, _to_find_out
from vigos_jax.runtime.lock import held

# -- joining ----------------------------------------------------------------------------------------------------

VARIABLES = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "RANK": "3", "WORLD_SIZE": "4"}


def test_variables():
    got = _from_variables(VARIABLES)
    assert got.pop("coordinator_address") == "10.0.0.1:1234" and got.pop("cluster_detection_method") == "deactivate"
    assert got == {"num_processes": 4, "process_id": 3, "local_device_ids": []}  # all devices of the host
    assert _from_variables(VARIABLES | {"LOCAL_RANK": "1"})["local_device_ids"] == [1]
    assert _from_variables(VARIABLES | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})["local_device_ids"] == [1]
    assert _from_variables(VARIABLES | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})["local_device_ids"] == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": ""}, "missing: RANK$"),
        ({"MASTER_ADDR": "", "WORLD_SIZE": ""}, "missing: MASTER_ADDR, WORLD_SIZE$"),
        ({"RANK": "4"}, "RANK=4 must be from 0 to WORLD_SIZE - 1"),
        ({"RANK": "-1"}, "RANK='-1' must be a whole number"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four' must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be from 1 to 65535"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 must go with RANK=3"),
        ({"RANK": "0", "LOCAL_RANK": "1"}, "LOCAL_RANK=1 must go with RANK=0"),
    ],
)
def test_variables_that_are_missing_or_contradict(changes, message):
    with pytest.raises(InputError, match=message):
        _from_variables(VARIABLES | changes)


def test_one_process_on_a_host_gets_all_its_devices():
    assert _to_find_out({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4"}) == {"local_device_ids": []}
    assert _to_find_out({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) == {"local_device_ids": []}
    for left_to_jax in (
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "4"},
        {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4", "JAX_LOCAL_DEVICE_IDS": "0,1"},
        {},
    ):
        assert _to_find_out(left_to_jax) == {}


@pytest.mark.parametrize(
    "how, variables, message",
    [
        ("env", {}, "config.distributed=env needs MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE; missing: MASTER_ADDR,"),
        ("env", VARIABLES | {"RANK": "9"}, "RANK=9 must be"),
        ("off", VARIABLES, "WORLD_SIZE=4 and config.distributed=off"),
        (
            "auto",
            {},
            "cannot join the processes, which it needs: no coordinator; choices: off, or env with MASTER_ADDR",
        ),
        ("maybe", {}, "config.distributed='maybe' is unknown; choices: off, auto, env"),
    ],
)
def test_the_command_line_says_what_is_wrong(how, variables, message, monkeypatch, capsys):
    for name in (*VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", mock.Mock(side_effect=ValueError("no coordinator")))
    assert main.main(["vigos_jax", "--config=configs/base.py", f"--config.distributed={how}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# -- talking ----------------------------------------------------------------------------------------------------

TALK = """
import functools, json, os, sys, time
import jax
from vigos_jax.runtime import distributed
from vigos_jax.runtime.distributed import exchange, first_decides, largest, total
from vigos_jax.errors import InputError

i = int(os.environ["RANK"])
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=5)
distributed._FAREWELL_MS = 1000
try:
    with distributed.joined("env"):
        {}
except InputError as e:
    print("stopped:", e, flush=True)
    sys.exit(2)
"""


def talk(folder: pathlib.Path, lines: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two processes that run these lines; `i` is the process's number."""
    script = folder / "talk.py"
    script.write_text(TALK.format("\n        ".join(lines.splitlines())))
    codes = hosts.start([str(script)], processes=2, devices=1, folder=folder)
    return codes, [(folder / f"output-{i}.txt").read_text() for i in range(2)]


def test_processes_agree(tmp_path):
    codes, said = talk(
        tmp_path,
        """\
for n in range(50):
    assert exchange([n, i]) == [[n, 0], [n, 1]]
    time.sleep(0.02 * ((n + i) % 3 == 0))
assert largest(3 * i + 1) == 4 and largest(7 - i) == 7
assert total({"a": 1, f"b{i}": 2}) == {"a": 2, "b0": 2, "b1": 2}
assert total({"a": 1} if i else {}) == {"a": 1}
assert first_decides(lambda: f"by {i}") == "by 0"
assert distributed.several() and distributed.is_first() == (i == 0)
assert len(exchange("x" * 3_000_000)[1 - i]) == 3_000_000
left = distributed.jax_distributed.global_state.client.key_value_dir_get("vigos_jax/")
assert len(left) <= 4, left  # the store does not grow
print("agreed")""",
    )
    assert codes == [0, 0], said
    assert all("agreed" in text for text in said)


def test_a_process_that_stops_stops_the_others(tmp_path):
    codes, said = talk(
        tmp_path,
        """\
exchange(1)
if i == 1:
    raise InputError("row 7 is not a row")
exchange(2)
print("went on")""",
    )
    assert codes == [2, 2], said
    assert "stopped: process 1 stopped: row 7 is not a row" in said[0] and "went on" not in said[0]
    assert "stopped: row 7 is not a row" in said[1]


def test_a_bug_in_one_process_is_named_in_the_others(tmp_path):
    codes, said = talk(tmp_path, "first_decides(lambda: 1 // i)")
    assert codes == [1, 2], said
    assert "ZeroDivisionError" in said[0]
    assert "stopped: process 0 stopped: ZeroDivisionError: integer" in said[1]


@pytest.mark.slow
def test_a_process_leaves_others_that_do_not_answer(tmp_path):
    """As if they waited for it on the devices. jax notices that its heartbeats have stopped, and ends them."""
    codes, said = talk(
        tmp_path,
        """\
if i == 1:
    raise InputError("row 7 is not a row")
time.sleep(60)""",
    )
    assert codes[1] == 2 and codes[0] not in (0, 2), (codes, said)
    assert "row 7 is not a row" in said[1] and "do not answer" in said[1]
    assert "JAX distributed service detected fatal errors" in said[0]


HELD = """\
import pathlib
from vigos_jax.runtime.lock import held
with held(pathlib.Path({!r})):
    exchange(1)
    print(sorted(p.name for p in pathlib.Path({!r}).iterdir()))
    exchange(2)"""


def test_the_first_process_holds_the_folder_for_all(tmp_path):
    folder = tmp_path / "run"
    with held(folder):
        codes, said = talk(tmp_path, HELD.format(str(folder), str(folder)))
    assert codes == [2, 2]
    assert all(f"run is in use by process {os.getpid()} on " in text for text in said), said
    codes, said = talk(tmp_path, HELD.format(str(folder), str(folder)))
    assert codes == [0, 0] and all("['.lock']" in text for text in said), said
    assert not folder.exists()


def test_alone_nothing_is_asked_of_anyone():
    assert distributed.exchange({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert distributed.total({"a": 1}) == {"a": 1} and distributed.largest(3) == 3
    assert distributed.first_decides(lambda: 5) == 5
    with pytest.raises(InputError, match="x=1 must be said as it is"), distributed.joined("off"):
        raise InputError("x=1 must be said as it is")


# -- training ---------------------------------------------------------------------------------------------------

SHORT = "a </description> <think> b </think> \\boxed{c}"
LONG = "a red square, a blue circle, three squares </description> <think> it is red, it is red </think> \\boxed{red}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory, world):
    """Rows in order: eight, of which the first four are short in everything and the others long; then four bad ones
    and four good ones."""
    folder = tmp_path_factory.mktemp("unequal")
    runs.write_pictures(folder / "pictures", 16)
    rows = [
        {"id": f"row{i}", "images": [f"pictures/{i}.png"], "problem": "colour " * (1 if i < 4 else 40), "answer": "red"}
        for i in range(16)
    ]
    for row in rows[8:12]:
        row["answer"] = ""
    return runs.write_rows(folder / "data.jsonl", rows)


def jobs(world, unequal, folder):
    """The same jobs for any number of processes, but for those that only several can do."""
    own = [f"--config={world.config}", "--config.batch_size=8"]
    still = ["--config.lora.dropout=0.0", "--config.steps=1"]
    ordered = [f"--config.data.source={unequal}", "--config.data.shuffle=False", "--config.data.max_bad_fraction=1.0"]
    ordered += ["--config.buckets.prompt=(64,256)", "--config.buckets.sequence=(128,384,768)"]
    ordered += ["--config.sampling.max_tokens=64", "--config.gradient_accumulation_steps=2", *still]
    stored = {f"row{i}": SHORT if i < 4 else LONG for i in range(8)}
    early = [*own, *ordered, "--config.steps=2", "--config.buckets.completion=(4,16,64)"]
    tensor = [f"--config.mesh.{axis}={n}" for axis, n in (("data", 1), ("fsdp", 1), ("tensor", 8))]
    listed = [
        {"name": "whole", "args": [*own, "--config.data.window=2", f"--config.data.source={world.bad_data}"]},
        {"name": "unequal", "args": [*own, *ordered], "rollouts": stored},
        {"name": "interleaved", "args": [*own, *ordered], "rollouts": stored, "interleaved": True},
        {"name": "early", "args": early, "end_below": 60},
        {"name": "same_rows", "args": [*own, *still, *tensor]},
    ]
    for job in listed:
        job["args"].append(f"--workdir={folder / job['name']}")
    return listed


@pytest.fixture(scope="module")
def one(tmp_path_factory, world, unequal):
    """(folder of workdirs, what the one process of eight devices saw)."""
    folder = tmp_path_factory.mktemp("one")
    listed = [job for job in jobs(world, unequal, folder) if not job.get("interleaved")]
    return folder, hosts.launch(folder / "launch", listed, processes=1, devices=8)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory, world, unequal):
    """(folder of workdirs, what each of two processes with four devices saw).

    One job is sent a signal and gone on with by the next, one exports; the last one fails in the second process.
    """
    folder = tmp_path_factory.mktemp("two")
    listed = jobs(world, unequal, folder)
    again = listed[0]["args"][:-1] + [f"--workdir={folder / 'signalled'}", "--config.checkpoint_every=4"]
    listed += [{"name": "signalled", "args": again, "signalled": 1}, {"name": "gone_on", "args": again}]
    exported = [f"--config={world.config}", "--mode=export", f"--workdir={folder / 'whole'}"]
    listed.append({"name": "export", "args": [*exported, f"--config.export.output={folder / 'exported'}"]})
    fails = {"name": "fails", "args": [f"--config={world.config}", f"--workdir={folder / 'fails'}"], "fails": 1}
    return folder, hosts.launch(folder / "launch", [*listed, fails], processes=2, devices=4)


def assert_same_rows(a: pathlib.Path, b: pathlib.Path, first: int = 0) -> None:
    wanted, got = runs.metrics_of(a)[first:], runs.metrics_of(b)[first:]
    assert wanted and len(wanted) == len(got)
    for x, y in zip(wanted, got, strict=True):
        assert y == pytest.approx(x, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_the_same_numbers_and_rollouts_as_one_process(one, two):
    assert_same_rows(one[0] / "whole", two[0] / "whole")
    assert (
        len(runs.metrics_of(two[0] / "whole")) == runs.STEPS and runs.metrics_of(two[0] / "whole")[-1]["bad_rows"] > 0
    )
    whole, halves = one[1]["whole"], [result["whole"] for result in two[1]]
    for step in range(runs.STEPS):
        assert whole["ids"][step] == sum((half["ids"][step] for half in halves), [])
        ours = np.concatenate([np.concatenate(half["logps"][step]) for half in halves])
        np.testing.assert_allclose(ours, np.concatenate(whole["logps"][step]), atol=1e-5)


@pytest.mark.slow
def test_each_process_reads_and_parses_its_own_rows(one, two):
    whole, halves = one[1]["whole"], [result["whole"] for result in two[1]]
    for step in range(runs.STEPS):
        assert whole["read"][step] == halves[0]["read"][step] + halves[1]["read"][step]
    assert [half["parsed"] for half in halves] == [[4] * runs.STEPS] * 2
    # Where rows and devices alternate, so do the processes.
    (rows,) = one[1]["unequal"]["read"]
    assert [result["interleaved"]["read"][0] for result in two[1]] == [
        [rows[i] for i in part] for part in ((0, 1, 4, 5), (2, 3, 6, 7))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unequal", "interleaved"])
def test_the_same_loss_on_stored_rollouts_of_very_unequal_lengths(one, two, name):
    # Micro-batches are formed otherwise by two processes; what they add up to is the same.
    assert_same_rows(one[0] / "unequal", two[0] / name)
    (row,) = runs.metrics_of(two[0] / name)
    assert row["valid_rate"] == 1 and row["loss"] > 0
    first, second = (result[name] for result in two[1])
    assert first["shapes"] == second["shapes"]
    if name == "unequal":
        lengths = [max(map(len, result["ids"][0])) for result in (first, second)]
        assert 4 * lengths[0] < 2 * lengths[1]
        # Of each process's own rows alone the sizes would have been others.
        assert any(256 in shape for shape in first["shapes"][0])


@pytest.mark.slow
def test_early_ends_are_agreed_on(one, two):
    first, second = (result["early"] for result in two[1])
    whole = one[1]["early"]
    assert first["decoded"] == second["decoded"] == whole["decoded"]
    assert first["shapes"] == second["shapes"]
    for step in range(2):
        assert whole["ids"][step] == first["ids"][step] + second["ids"][step]
    lengths = [[len(x) for x in ids] for ids in whole["ids"]]
    assert max(lengths[0]) < 64 and len(set(lengths[0])) > 2  # all ended, at different places
    assert [len(x) for x in first["ids"][1]] == [0] * 4 and min(lengths[1][4:]) > 0  # one had nothing to do
    assert_same_rows(one[0] / "early", two[0] / "early")


@pytest.mark.slow
def test_rows_that_both_hold_count_once(one, two):
    first, second = (result["same_rows"] for result in two[1])
    assert first["read"] == second["read"] == one[1]["same_rows"]["read"]
    assert_same_rows(one[0] / "same_rows", two[0] / "same_rows")


@pytest.mark.slow
def test_only_the_first_process_talks(two):
    said = [(two[0] / "launch" / f"output-{i}.txt").read_text() for i in range(2)]
    assert "the run is complete" in said[0] and "train 4/4" in said[0]
    assert "complete" not in said[1] and "train " not in said[1]


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(one, two):
    for result in two[1]:
        assert result["signalled"]["code"] == 0 and len(result["signalled"]["parsed"]) == 2
        assert result["gone_on"]["code"] == 1 and len(result["gone_on"]["parsed"]) == runs.STEPS - 2
    said = (two[0] / "launch" / "output-0.txt").read_text()
    assert f"SIGTERM: stopped, saved at step 2 of {runs.STEPS}" in said and "resuming from step 2" in said
    assert_same_rows(one[0] / "whole", two[0] / "signalled")


@pytest.mark.slow
def test_an_export_by_two_is_that_of_one(world, two, tmp_path):
    assert [result["export"]["code"] for result in two[1]] == [0, 0]
    whole = [f"--workdir={two[0] / 'whole'}", f"--config.export.output={tmp_path / 'alone'}"]
    assert world.run("--mode=export", *whole) == 0
    folders = tmp_path / "alone", two[0] / "exported"
    alone, together = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in folders)
    assert alone.keys() == together.keys()
    for name, x in alone.items():
        np.testing.assert_allclose(x, together[name], atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_process_that_cannot_read_ends_the_run(two):
    first, second = (result["fails"] for result in two[1])
    assert first["code"] == 2 and second["error"] == "a disk that broke"
    said = (two[0] / "launch" / "output-0.txt").read_text()
    assert "vigos_jax: process 1 stopped: OSError: a disk that broke" in said


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_meshes(world, one, two, tmp_path):
    """Eight devices of two processes, then four of one, then one: the data, and all numbers, as without a stop."""
    before = two[0] / "whole"
    for name, devices, mesh, done in (("four", 4, (1, 2, 2), 2), ("single", 1, (1, 1, 1), 3)):
        shutil.copytree(before, tmp_path / name)
        for step in range(done + 1, runs.STEPS + 1):
            shutil.rmtree(tmp_path / name / "checkpoints" / str(step))
        axes = [f"--config.mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
        own = [f"--config={world.config}", "--config.batch_size=8", "--config.data.window=2", *axes]
        own.append(f"--config.data.source={world.bad_data}")
        job = {"name": name, "args": [*own, f"--workdir={tmp_path / name}"]}
        (result,) = hosts.launch(tmp_path / f"launch-{name}", [job], processes=1, devices=devices)
        assert result[name]["code"] == 1  # some rows are bad
        assert result[name]["read"] == one[1]["whole"]["read"][done:]
        assert_same_rows(one[0] / "whole", tmp_path / name)
        assert_same_rows(one[0] / "whole", tmp_path / name, first=done)
        before = tmp_path / name
    states = [runs.saved_state(folder, runs.STEPS) for folder in (one[0] / "whole", tmp_path / "single")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-5)
