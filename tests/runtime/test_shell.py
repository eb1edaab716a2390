"""What a shell sees: exit codes, quiet, and no traceback when the reader of the output leaves."""

import os
import pathlib
import platform
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
