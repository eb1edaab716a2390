"""The scripts of tests/stress that take minutes; the others are for hours."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def script(name: str, *arguments: str) -> str:
    """What a script printed; it must have ended well."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, f"tests/stress/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.stress
def test_twenty_kills():
    said = script("kills", "--kills=20")
    assert "20 kills survived" in said and "the same to the bit" in said


@pytest.mark.stress
def test_memory_and_programs_stay_as_they_are_over_500_steps():
    assert "programs compiled after step 50: 0" in script("soak", "--steps=500")
