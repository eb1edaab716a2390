"""The demo's claim, run for real on one seed; tests/evidence/first_light.py does it for three."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_vigos_gains_opsd_does_not_and_blank_pictures_teach_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as for a user
    command = [sys.executable, "tests/evidence/first_light.py", "--seeds", "0", "--workdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 6
