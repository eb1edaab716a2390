"""Trains the demo for 500 steps and samples the memory of the process and the programs it has compiled.

    python tests/stress/soak.py             # 500 steps, about five minutes on two cores
    python tests/stress/soak.py --steps 2000

Exits with 1 if memory grows by 2 % or more after step 50, or a program is compiled after it. What counts is what the
process holds: before a sample, the allocator hands back what it only keeps for later; and of each window the smallest
sample counts, because a step's own buffers are in some samples and not in others.
"""

import argparse
import ctypes
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
SETTLED = 50  # steps after which nothing may grow
WINDOW = 50  # steps whose smallest samples are compared


def resident() -> int:
    """Bytes of this process that no file stands behind."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what RssAnon is")


def hand_back() -> None:
    """Has glibc return its free memory to the system; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main(steps: int, folder: pathlib.Path) -> int:
    from vigos_jax import main as command_line
    from vigos_jax.runtime import shell
    from vigos_jax.training.run_log import MetricsFile

    shell.keep_one_heap()  # as `python -m vigos_jax.main` does

    memory, write = [], MetricsFile.write

    def sampled(self, row):
        write(self, row)
        hand_back()
        memory.append(resident())
        if len(memory) % SETTLED == 0:
            print(f"step {len(memory)}: {memory[-1] / 1e6:.1f} MB", flush=True)

    MetricsFile.write = sampled
    # One size of each array: a size that is met late is compiled late, which is growth, but none that goes on.
    sizes = {"patches": (36,), "prompt": (64,), "completion": (48,), "sequence": (112, 224)}  # student, teachers
    flags = [f"--config.steps={steps}", "--config.demo_eval.questions=0", "--config.export.after_training=False"]
    flags += [f"--config.buckets.{kind}={size}" for kind, size in sizes.items()]
    if command_line.main(["vigos_jax", "--config=configs/base.py", f"--workdir={folder / 'run'}", *flags]):
        return 1
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    early, late = min(memory[SETTLED : SETTLED + WINDOW]), min(memory[-WINDOW:])
    compiled = sum(row["compilations"] for row in rows[SETTLED:])
    growth = late / early - 1
    print(f"{len(rows)} steps; memory after step {SETTLED}: {early / 1e6:.1f} MB, at the end {late / 1e6:.1f} MB")
    print(f"growth {growth:+.2%} (must stay under 2 %); programs compiled after step {SETTLED}: {compiled}")
    return int(growth >= 0.02 or compiled > 0 or len(rows) != steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(arguments.steps, pathlib.Path(folder)))
