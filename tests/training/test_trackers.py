"""TensorBoard and Weights & Biases: every step once, also when a run is done again from its checkpoint."""

import importlib
import json
import math
import struct
import time
from collections.abc import Iterator

import pytest
import tiny_runs as runs
from tiny_runs import STEPS

from vigos_jax.errors import InputError
from vigos_jax.training import trackers
from vigos_jax.training.run_log import MetricsFile
from vigos_jax.training.trackers import TensorBoard, WeightsAndBiases


def shown_by_tensorboard(workdir) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader makes of the folder."""
    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: fragments (checksum 4, length 2, type 1 byte) in blocks of 32 KiB, which end in zeros
    where no header fits. W&B's file begins with 7 bytes of its own."""
    whole, at = b"", 7
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, the last fragment of one
            yield whole
            whole = b""


def sent_to_wandb(workdir) -> list[tuple[str, dict]]:
    """(run id, row) of every row in the files that `wandb sync` would send, oldest file first."""
    importlib.import_module("wandb").teardown()  # what the end of a process does: all is written
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    out = []
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        run_id = path.stem.removeprefix("run-")
        for data in log_records(path.read_bytes()):
            record = pb.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                out.append((run_id, row))
    return out


def test_tensorboard_shows_a_step_that_is_done_again_once(tmp_path):
    first = TensorBoard(tmp_path, True, first=0, last_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 4, "perception/loss": None, "entropy": math.nan})
    del first  # killed: never closed
    again = TensorBoard(tmp_path, True, first=2, last_step=3)
    again.write({"step": 3, "loss": 7.0})
    again.write({"step": 4, "loss": 8.0})
    again.close()
    assert shown_by_tensorboard(tmp_path) == {"loss": [(1, 0.25), (2, 0.5), (3, 7.0), (4, 8.0)]}


@pytest.mark.slow
def test_wandb_gets_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text('{"steps": 4}')
    first = WeightsAndBiases(tmp_path, "vigos", first=0, last_step=0)
    for step in (1, 2):
        first.write({"step": step, "loss": step / 4, "entropy": None})
    first.close()
    time.sleep(1.1)  # W&B names its folders by the second
    again = WeightsAndBiases(tmp_path, "vigos", first=2, last_step=2)
    for step in (2, 3):
        again.write({"step": step, "loss": step / 4})
    again.close()
    sent = sent_to_wandb(tmp_path)
    assert [(row["_step"], row["loss"]) for _, row in sent] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert not any("entropy" in row for _, row in sent)
    assert {run_id for run_id, _ in sent} == {(tmp_path / "wandb-id").read_text().strip()}


@pytest.mark.parametrize("field, value", [("tensorboard", True), ("wandb", "vigos")])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, field, value):
    real = importlib.import_module

    def without(name, *args):
        if name.split(".")[0] == field:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(trackers.importlib, "import_module", without)
    with pytest.raises(InputError, match=rf"^config.log.{field} needs {field}: pip install 'vigos-jax\[tracking\]'"):
        trackers.check_installed({"tensorboard": False, "wandb": ""} | {field: value})


def test_neither_is_imported_unless_asked_for(monkeypatch):
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    trackers.check_installed({"tensorboard": False, "wandb": ""})


def test_a_tracker_of_ones_own_is_a_class_and_a_row(monkeypatch, tmp_path):
    class Mine:
        import_package = staticmethod(lambda: pytest.fail("asked for what it needs"))

        def __init__(self, workdir, asked, *, first, last_step):
            self.made = (workdir, asked, first, last_step)

    monkeypatch.setitem(trackers.TRACKERS, "mine", Mine)
    log = {"tensorboard": False, "wandb": "", "mine": "here"}
    (mine,) = trackers.open_trackers(log, tmp_path, first=3, last_step=5)
    assert mine.made == (tmp_path, "here", 3, 5)
    with pytest.raises(pytest.fail.Exception, match="asked for what it needs"):
        trackers.check_installed(log)
    trackers.check_installed(log | {"mine": ""})


class Killed(BaseException):
    """Not an error that anything could handle."""


@pytest.mark.slow
def test_a_run_that_was_killed_logs_every_step_once(tmp_path_factory, tmp_path, monkeypatch):
    """Killed at step 4, gone on from step 2's checkpoint."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir, write = tmp_path / "run", MetricsFile.write
    args = [f"--workdir={workdir}", "--config.log.tensorboard=True", "--config.log.wandb=vigos"]
    args += ["--config.checkpoint_every=2"]

    def die_at_four(self, row):
        write(self, row)
        if row["step"] == 4:
            raise Killed

    with runs.compile_once():
        world = runs.make_world(tmp_path_factory)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(MetricsFile, "write", die_at_four)
            world.run(*args)
        importlib.import_module("wandb").teardown()  # what the end of its process does
        assert world.run(*args) == 0
    rows = runs.read_rows(workdir / "metrics.jsonl")
    shown = shown_by_tensorboard(workdir)
    assert shown["loss"] == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert {"perception/loss", "valid_rate", "seconds/rollout", "tokens_per_second"} <= set(shown)
    sent = [row for _, row in sent_to_wandb(workdir)]
    assert [row["_step"] for row in sent] == [1, 2, 3]  # step 4 was in metrics.jsonl, and not yet handed over
    assert [row["loss"] for row in sent] == [row["loss"] for row in rows[:3]] and len(rows) == STEPS
