"""A folder is one run's at a time; a run that was killed does not keep it, here or on another host."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from vigos_jax.errors import InputError
from vigos_jax.runtime import lock
from vigos_jax.runtime.lock import Holder, alone, held

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOLD = """
import pathlib, sys, time
from vigos_jax.runtime.lock import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(folder: pathlib.Path) -> subprocess.Popen:
    """A process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(path: pathlib.Path, *, silent: float) -> Holder:
    """Writes the lock of a process on another host, whose last heartbeat was some seconds ago."""
    holder = dataclasses.replace(Holder.me(), place=("far", "boot", "namespace"))
    path.write_bytes(holder.to_json())
    os.utime(path, (time.time() - silent,) * 2)
    return holder


def test_one_at_a_time(tmp_path):
    process = holding(tmp_path / "run")
    try:
        with pytest.raises(InputError) as error, held(tmp_path / "run"):
            pytest.fail("two in one folder")
        said = str(error.value)
        assert f"in use by process {process.pid} on {Holder.me().place[0]} since 20" in said and "\n" not in said
        with held(tmp_path / "other"):
            pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("reaped", [True, False])
def test_kill_minus_nine_leaves_no_lock_that_counts(tmp_path, reaped):
    """Also while the dead process is still listed, as where nobody waits for it."""
    process = holding(tmp_path)
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / ".lock").exists()
    with held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["processes"].keys() == {str(os.getpid())}
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_does_not_count(tmp_path):
    holder = dataclasses.replace(Holder.me(), processes={str(os.getpid()): "1"})
    (tmp_path / ".lock").write_bytes(holder.to_json())
    with held(tmp_path):
        pass
    (tmp_path / ".lock").write_bytes(Holder.me().to_json())  # the negative case
    with pytest.raises(InputError, match=rf"in use .*\(process {os.getpid()} is running\)"), held(tmp_path):
        pass


def test_another_host_counts_by_its_heartbeat(tmp_path):
    elsewhere(tmp_path / ".lock", silent=lock.STALE_SECONDS - 30)
    said = r"on far since .* last heartbeat was (89|90|91) s ago, after 120 s"
    with pytest.raises(InputError, match=said), held(tmp_path):
        pass
    elsewhere(tmp_path / ".lock", silent=lock.STALE_SECONDS + 5)
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_local_clock_plays_no_part(tmp_path, monkeypatch):
    elsewhere(tmp_path / ".lock", silent=10)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    with pytest.raises(InputError, match="on far"), held(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"place": 3}', '{"place": ["a"], "processes": {"x": ""}}'])
def test_a_lock_that_cannot_be_read_counts_until_it_is_old(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(InputError, match="by a process that left no name"), held(tmp_path):
        pass
    os.utime(tmp_path / ".lock", (time.time() - 500,) * 2)
    with held(tmp_path):
        pass


def test_a_holder_gives_signs_of_life_and_mends_what_was_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    path = tmp_path / ".lock"

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with held(tmp_path):
        os.utime(path, (1, 1))
        wait_for(lambda: path.stat().st_mtime > 1)
        path.unlink()
        wait_for(path.exists)


def test_a_run_that_was_taken_over_ends(tmp_path):
    """It slept for longer than its heartbeat may fail, and another host began."""
    code = HOLD.replace("with held", "from vigos_jax.runtime import lock\nlock.BEAT_SECONDS = 0.05\nwith held")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    other = elsewhere(tmp_path / "theirs", silent=0)
    os.replace(tmp_path / "theirs", tmp_path / ".lock")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2 and f"taken over by {other}" in said and said.count("\n") == 1
    assert json.loads((tmp_path / ".lock").read_text())["token"] == other.token  # and it is left alone


@pytest.mark.parametrize("left", ["nothing", "a stale lock", "a stale takeover"])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_try_at_once_one_succeeds(tmp_path, monkeypatch, left, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        for name in [".lock", ".lock.takeover"][: ["nothing", "a stale lock", "a stale takeover"].index(left)]:
            elsewhere(folder / name, silent=1000)
        start, won, lost = threading.Barrier(8), [], []

        def attempt(folder=folder, start=start, won=won, lost=lost) -> None:
            own = lock.FileLock(folder / ".lock")
            start.wait()
            try:
                own.take()
                won.append(own)
            except InputError as e:
                lost.append(e)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(won) == 1 and len(lost) == 7
        assert json.loads((folder / ".lock").read_text())["token"] == won[0]._holder.token
        won[0].release()
        assert list(folder.iterdir()) == []


def test_a_process_may_enter_again(tmp_path):
    with held(tmp_path / "run"):
        with held(tmp_path / "run"), held(tmp_path / "run" / "eval"):
            assert (tmp_path / "run" / "eval" / ".lock").exists()
        assert (tmp_path / "run" / ".lock").exists() and not (tmp_path / "run" / "eval").exists()


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, SystemExit])
def test_it_is_released_on_every_way_out(tmp_path, error):
    with pytest.raises(error), held(tmp_path / "a" / "b"):
        raise error
    assert list(tmp_path.iterdir()) == []  # and what was made for it is gone
    with held(tmp_path / "a"):
        (tmp_path / "a" / "kept").write_text("")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


def test_what_was_started_here_keeps_the_folder(tmp_path):
    """As a study's jobs do when the study itself is killed."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        with alone(tmp_path) as own:
            own.share(child.pid)
            shared = json.loads((tmp_path / ".lock").read_text())
            assert shared["processes"].keys() == {str(os.getpid()), str(child.pid)}
            own.unshare(child.pid)
            assert json.loads((tmp_path / ".lock").read_text())["processes"].keys() == {str(os.getpid())}
        del shared["processes"][str(os.getpid())]  # as if this process had ended
        (tmp_path / ".lock").write_text(json.dumps(shared))
        with pytest.raises(InputError, match=f"process {child.pid} is running"), held(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    said = "cannot write to .*file: .*; choose a writable folder"
    with pytest.raises(InputError, match=said), held(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="cannot write config.x: "), held(tmp_path / "file", called="config.x"):
        pass
