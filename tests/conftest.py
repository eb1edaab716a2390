"""Settings that must stand before jax is imported: the CPU with 8 devices, quick compilation, and no network.

Computations without a mesh run on the first device as ever. A test that starts a program of its own in a
subprocess hands these settings on, unless it drops XLA_FLAGS from the environment.
"""

import gc
import os
import pathlib
import signal

import compiled

# A shell starts background jobs with Ctrl-C ignored; programs under test are to get it as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = f"--xla_force_host_platform_device_count=8 {compiled.QUICK}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["HF_HUB_OFFLINE"] = "1"
# Each program is compiled once, by whichever process comes to it first: xdist's workers and programs under test find
# the folder in their environment. An entry that another one is still writing is compiled again.
COMPILED = compiled.share()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # or the folder's name would be part of every key

import error_form  # noqa: E402
import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from shape_checks import CHECKED  # noqa: E402

# The one switch of the shape checks: without it, annotations are documentation, as when the program runs.
jaxtyping.install_import_hook(CHECKED, "shape_checks.checked")

# A first call compiles, so its time says nothing. The same examples in every run: failures are repeatable.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

error_form.check_all()

FOLDER = pathlib.Path(__file__).resolve().parent
# The files that take longest, longest first. Several processes share the tests file by file: a long file that starts
# last keeps one busy while the others have nothing left. A file that is not named here takes below half a minute.
LONGEST = (
    # In `make test-slow`; of `make test` they are a small part.
    *("training/test_first_light.py", "test_notebooks.py", "runtime/test_multihost.py"),
    *("training/test_served_hosts.py", "test_benchmarks.py", "weights/test_large_checkpoint.py"),
    *("training/test_loop.py", "training/test_served_run.py", "method/test_properties.py"),
    *("weights/test_output_head.py", "data/test_bad_rows.py", "plan/test_planner.py"),
    *("training/test_step.py", "method/test_scoring.py", "runtime/test_sharding.py"),
    *("models/test_attention.py", "export/test_folders.py", "weights/test_weights.py"),
    *("method/test_goldens.py", "models/test_models.py", "training/test_teachers_run.py"),
    *("method/test_token_weights.py", "rollouts/test_sampler.py", "models/test_qwen3_vl.py"),
    *("method/test_other_models.py", "grading/test_judge.py", "evaluation/test_benchmark.py"),
    *("miniature/test_demo_base.py", "models/test_quantization.py", "analysis/test_score_rollouts.py"),
    *("training/test_quantised_run.py", "models/test_qwen3_5.py", "analysis/test_diagnose.py"),
    *("method/test_losses.py", "test_fuzz.py", "method/test_hybrid_packing.py"),
    *("runtime/test_signals.py", "training/test_hybrid_run.py", "training/test_views_run.py"),
    *("rollouts/test_engine.py", "training/test_periodic_eval.py", "training/test_snapshots.py"),
    *("training/test_guards.py",),
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would start with the files of most tests instead


def pytest_sessionfinish(exitstatus):
    if COMPILED is not None and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        compiled.keep(COMPILED)


def pytest_collection_finish():
    # What is imported by now stays, and looking for garbage among jax's and torch's many objects takes long.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


def pytest_collection_modifyitems(items):
    place = {FOLDER / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
