"""A signal stops a run where nothing is lost: after the running step, saved; a second one stops it at once."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import hosts
import pytest
import tiny_runs as runs
from cases import others_slow

from vigos_jax.data.examples import Encoder
from vigos_jax.data.loader import Order, make_batches
from vigos_jax.errors import InputError, Stopped
from vigos_jax.runtime.signals import Interrupt
from vigos_jax.training import loop, snapshots
from vigos_jax.training.run_log import MetricsFile


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


@contextlib.contextmanager
def signalled(number: int, owner: object, name: str, *, when=lambda *_: True):
    """`owner.name` sends this process a signal after what it does, the first time that `when` says so."""
    real, sent = getattr(owner, name), []

    def then(*args, **kwargs):
        result = real(*args, **kwargs)
        if not sent and when(*args):
            sent.append(number)
            os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, then)
        yield
    assert sent


@pytest.mark.parametrize("number", others_slow([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_ends_a_run_after_its_step(world, undisturbed, tmp_path, capfd, number):
    workdir, name = tmp_path / "run", signal.Signals(number).name
    arguments = [f"--workdir={workdir}", "--config.checkpoint_every=4"]
    with signalled(number, loop, "parse"):
        assert world.run(*arguments) == 0
    said = capfd.readouterr().err
    assert f"{name}: stopping after this step" in said
    assert f"{name}: stopped, saved at step 1 of {runs.STEPS}; the same command resumes" in said
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert len(runs.read_rows(workdir / "metrics.jsonl")) == 1
    assert world.run(*arguments) == 0
    assert "resuming from step 1" in capfd.readouterr().err
    runs.assert_same_trees(runs.saved_state(workdir, runs.STEPS), runs.saved_state(undisturbed.workdir, runs.STEPS))


def test_a_signal_before_the_first_step_leaves_nothing_behind(world, tmp_path, capfd):
    with signalled(signal.SIGTERM, loop, "load"):
        assert world.run(f"--workdir={tmp_path / 'run'}") == 0
    assert "SIGTERM: stopped" in capfd.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_after_the_last_step_stops_what_comes_then(world, tmp_path, capfd):
    """In the last step, or in the export itself: no half export, and started again it is made."""
    arguments = [f"--workdir={tmp_path / 'run'}", "--config.steps=2", "--config.export.after_training=True"]
    is_last = lambda _, row: row["step"] == 2  # noqa: E731
    with signalled(signal.SIGTERM, MetricsFile, "write", when=is_last):
        assert world.run(*arguments) == 0
    assert not (tmp_path / "run" / "export").exists()
    with signalled(signal.SIGTERM, loop.RunFacts, "of"):
        assert world.run(*arguments) == 0
    assert not (tmp_path / "run" / "export").exists()
    assert world.run(*arguments) == 0
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_a_signal_while_servers_sample_a_snapshot_loses_no_step(world, tmp_path, monkeypatch):
    """What waits for a server raises at once, and the step before was not due to be saved."""

    def at(self, step, state):
        if step == 2:
            raise Stopped("SIGINT: stopped")

    monkeypatch.setattr(snapshots.Snapshots, "at", at)
    options = ["--config.checkpoint_every=100", "--config.steps=4"]
    assert world.run(f"--workdir={tmp_path / 'run'}", *options) == 0
    assert runs.saved_state(tmp_path / "run", 2)


def test_a_second_signal_ends_the_process():
    code = """
import os, signal
from vigos_jax.runtime.signals import Interrupt
with Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGTERM)
    print(interrupt.asked, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("went on", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=hosts.ROOT)
    assert done.returncode == 128 + signal.SIGINT and done.stdout == "SIGTERM\n"
    assert "once more stops at once" in done.stderr


def test_at_once():
    with Interrupt() as interrupt:
        with interrupt.at_once():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked == "SIGINT"
        with pytest.raises(Stopped, match="SIGINT"), interrupt.at_once():
            pytest.fail("went on")
    with pytest.raises(Stopped), Interrupt() as interrupt, interrupt.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_threads_have_no_handlers():
    """A notebook may train in a thread."""
    problems = []

    def work():
        try:
            with Interrupt() as interrupt, interrupt.at_once():
                pass
        except BaseException as e:
            problems.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not problems


def children() -> list[int]:
    stats = [path.read_text() for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
    return [int(text.split()[0]) for text in stats if int(text.rpartition(")")[2].split()[1]) == os.getpid()]


def undelivered_signals(pid: int) -> int:
    """Bits of the signals that a process blocks or ignores."""
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["SigBlk"], 16) | int(status["SigIgn"], 16)


@pytest.mark.slow
def test_workers_never_get_a_signal(world):
    """A terminal sends its signal to them too; without them the running step could not be finished."""
    from vigos_jax.data.sources import JsonlSource

    source = JsonlSource(world.data)
    encoder = Encoder(runs.processor(world.model), max_images=1)
    batches = make_batches(source, encoder, Order(2, seed=0, shuffle=False), workers=2)
    try:
        next(batches)
        spawned = [p for p in children() if "spawn_main" in pathlib.Path(f"/proc/{p}/cmdline").read_text()]
        bits = (1 << (signal.SIGTERM - 1)) | (1 << (signal.SIGINT - 1))
        assert len(spawned) == 2 and all(undelivered_signals(p) & bits == bits for p in spawned)
        os.kill(spawned[0], signal.SIGKILL)
        with pytest.raises(InputError, match="a data worker ended with exit code -9, .*config.data.workers"):
            for _ in range(10):
                next(batches)
    finally:
        batches.close()
    assert not set(spawned) & set(children())
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
