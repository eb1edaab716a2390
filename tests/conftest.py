"""Settings that must stand before jax is imported: the CPU with 8 devices, and no network.

Computations without a mesh run on the first device as ever. A test that starts a program of its own in a
subprocess hands these settings on, unless it drops XLA_FLAGS from the environment.
"""

import os
import signal

# A shell starts background jobs with Ctrl-C ignored; programs under test are to get it as in a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402

# A first call compiles, so its time says nothing. The same examples in every run: failures are repeatable.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")
