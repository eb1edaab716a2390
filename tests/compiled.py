"""Compiled programs, shared by all processes of a test session and kept for the next in .jax_cache/.

A program's key is its code, its options and the compiler's version: what a change does not touch need not be compiled
again. A session works in a folder of its own, and keeps it only when it has come to its end: an entry of a process that
was killed may be cut off, and jax would warn of it ever after.
"""

import atexit
import os
import pathlib
import shutil
import tempfile
from importlib import metadata

KEPT = pathlib.Path(__file__).resolve().parents[1] / ".jax_cache"
MOST = 2**30  # bytes; with more, all begins anew
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Tiny programs spend their time in the compiler, which takes a fifth of it with these XLA_FLAGS.
QUICK = "--xla_backend_optimization_level=0"
# The options of a program that a test wants compiled as a user gets it: what the compiler says of it matters.
OPTIMIZED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if metadata.version("jaxlib").startswith("0.10."):  # later ones end the process at a flag that they no longer have
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def share() -> pathlib.Path | None:
    """Makes the session's folder, and names it to all processes; None where the environment names one already."""
    if VARIABLE in os.environ:
        return None
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vigos_jax_compiled_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = str(folder)
    for entry in KEPT.iterdir() if KEPT.is_dir() else ():
        shutil.copyfile(entry, folder / entry.name)
    return folder


def keep(folder: pathlib.Path) -> None:
    """Keeps what a session that has come to its end compiled. A checkout that cannot be written to keeps nothing."""
    try:
        KEPT.mkdir(exist_ok=True)
        kept = {entry.name: entry.stat().st_size for entry in KEPT.iterdir()}
        new = [entry for entry in folder.iterdir() if entry.name not in kept]
        if sum(kept.values()) + sum(entry.stat().st_size for entry in new) > MOST:
            shutil.rmtree(KEPT)
            KEPT.mkdir()
        for entry in new:
            temporary = KEPT / f".{entry.name}.{os.getpid()}"
            shutil.copyfile(entry, temporary)
            temporary.replace(KEPT / entry.name)
    except OSError:
        return
