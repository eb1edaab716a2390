"""What a shell sees: exit codes, quiet, and no traceback when the reader of the output leaves."""

import os
import pathlib
import platform
import signal
import subprocess
import sys

import pytest

from vigos_jax.runtime import shell

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """\
import logging, warnings
from absl import logging as absl_logging
from configs import base

def get_config():
    warnings.warn("old ways", DeprecationWarning, stacklevel=2)
    warnings.warn("a donated buffer", UserWarning)
    logging.getLogger("orbax").warning("saved in a way")
    logging.getLogger("orbax").info("saved")
    absl_logging.warning("a flag")
    logging.getLogger("jax._src.xla_bridge").warning("a GPU may be present")
    logging.getLogger("grain").error("broken")
    config = base.get_config()
    config.steps = 0
    return config
"""


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-m", "vigos_jax.main", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("flag", ["", "-v", "--verbose"])
def test_other_libraries_are_heard_with_v_alone(tmp_path, flag):
    (tmp_path / "mine.py").write_text(CONFIG)
    process = start(*filter(None, ["--config", str(tmp_path / "mine.py"), flag]), stdout=subprocess.DEVNULL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "config.steps=0" in said.splitlines()[-1]
    words = ["a donated buffer", "saved in a way", "saved\n", "a flag"]
    assert [word for word in words if word in said] == (words if flag else []), said
    # An accelerator that lies idle and a library's error are for everyone.
    assert "a GPU may be present" in said and "broken" in said


@pytest.mark.parametrize("arguments, code", [(["--help"], 141), (["--config=none.py"], 2)])
def test_a_reader_that_leaves(arguments, code):
    """As in `... | head -0`: gone before the first word. What writes nothing to it does not notice."""
    read, write = os.pipe()
    os.close(read)
    process = start(*arguments, stdout=write)
    os.close(write)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "Traceback" not in said and "BrokenPipe" not in said and said.count("\n") == (code == 2)


@pytest.fixture
def loud(monkeypatch):
    """The tests' own logging and warnings stay as they are."""
    monkeypatch.setattr(shell, "set_verbosity", lambda verbose: None)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_code_is_the_programs(loud, code):
    assert shell.run(lambda argv: code + len(argv), [], verbose=False) == code


def test_interrupted(loud, capsys):
    def program(argv):
        raise KeyboardInterrupt

    assert shell.run(program, [], verbose=False) == 130
    assert capsys.readouterr().err == "\nvigos_jax: interrupted\n"


def test_a_broken_pipe_of_our_own_is_an_error(loud):
    """A server that hangs up is not a broken pipe."""

    def program(argv):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        shell.run(program, [], verbose=False)


# What a program says, and the file it leaves when its work is done.
SAY = """
import pathlib, sys
from vigos_jax.runtime import shell

def program(argv):
    print("é" * 10_000, flush=True)
    print("first", file=sys.stderr)
    own = open(argv[1] + ".number", "w")
    own.write(str(own.fileno()))
    print("last")
    pathlib.Path(argv[1]).write_text("done")
    return int(argv[2])

sys.exit(shell.run(program, sys.argv, verbose=False))
"""


def say(folder: pathlib.Path, redirection: str, *, code: int = 0, **environment: str):
    """Runs SAY in a shell that redirects it; (exit code, stdout, stderr)."""
    (folder / "say.py").write_text(SAY)
    line = f"exec {sys.executable} {folder}/say.py {folder}/result {code} {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=100)
    assert (folder / "result").read_text() == "done"
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("redirection, reason", [(">&-", "Bad file descriptor"), (">/dev/full", "No space left")])
def test_work_is_done_though_nothing_can_be_printed(tmp_path, redirection, reason, code):
    got, _, said = say(tmp_path, redirection, code=code)
    assert got == (code or 1) and reason in said
    assert said.splitlines()[0] == "first" and said.count("\n") == 2, said
    assert int((tmp_path / "result.number").read_text()) > 2  # no file took the place of a stream


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_nowhere_to_say_errors(tmp_path, redirection):
    code, out, _ = say(tmp_path, redirection)
    assert code == 0 and out == "é" * 10_000 + "\nlast\n"  # and no error among the results


def test_no_stream_at_all(tmp_path):
    assert say(tmp_path, "<&- >&- 2>&-")[0] == 1
    assert int((tmp_path / "result.number").read_text()) > 2


def test_what_the_encoding_lacks_is_escaped(tmp_path):
    code, out, said = say(tmp_path, "", PYTHONIOENCODING="ascii")
    assert code == 0 and out == "\\xe9" * 10_000 + "\nlast\n" and said == "first\n"
    assert say(tmp_path, "", PYTHONIOENCODING="ascii:strict")[1] == out
    assert say(tmp_path, "")[1].startswith("éé")


def test_help_that_cannot_be_printed():
    with open("/dev/full", "wb") as full:
        process = start("--help", stdout=full)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and said.count("\n") == 1 and "No space left on device" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_releases_what_is_held(tmp_path, number):
    code = """
import pathlib, sys, time
from vigos_jax.runtime import shell
from vigos_jax.runtime.lock import held

def program(argv):
    with held(pathlib.Path(argv[1])):
        print("held", flush=True)
        time.sleep(60)
    return 0

sys.exit(shell.run(program, sys.argv, verbose=False))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **streams)
    assert process.stdout.readline() == "held\n" and (tmp_path / "run" / ".lock").exists()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert said == {2: "\nvigos_jax: interrupted\n"}.get(number, f"vigos_jax: {number.name}: ended\n")
    assert not (tmp_path / "run").exists()


def test_an_ignored_signal_stays_ignored(loud):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert shell.run(lambda argv: int(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN), [], verbose=False) == 1
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


HEAPS = """
import ctypes, sys, threading
from vigos_jax.runtime import shell

if sys.argv[1] == "one":
    shell.keep_one_heap()
libc, together = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype = ctypes.c_void_p

def work():
    together.wait()
    for _ in range(1000):
        libc.malloc(ctypes.c_size_t(1000))
    together.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads] + [t.join() for t in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has several heaps")
@pytest.mark.parametrize("heaps", ["one", "many"])
def test_threads_share_a_heap(heaps):
    done = subprocess.run([sys.executable, "-c", HEAPS, heaps], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.count("<heap ") == 1) == (heaps == "one")
