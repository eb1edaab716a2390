"""Kills a demo run again and again, at random moments of each of its phases, and compares its end with that of a run
that nobody disturbed: parameters, optimizer state, metrics, results and export, bit for bit.

    python tests/stress/kills.py            # 20 kills, about five minutes on two cores
    python tests/stress/kills.py --kills 100 --seed 1

Prints what each kill met, and exits with 1 at the first difference.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
EVERY = 2  # steps between checkpoints
# What a kill waits for, in turn. A run ends only when its turn of "evaluation" and "export" is over, so they come last.
EARLY = ("rollout", "save", "start", "rollout", "save", "rollout")
LATE = ("evaluation", "export", "evaluation")


def command(workdir: pathlib.Path, steps: int, cache: pathlib.Path) -> list[str]:
    own = {"steps": steps, "checkpoint_every": EVERY, "demo_eval.questions": 100, "compilation_cache": cache}
    flags = [f"--config.{k}={v}" for k, v in own.items()]
    return [sys.executable, "-m", "vigos_jax.main", "--config=configs/base.py", f"--workdir={workdir}", *flags]


def start(workdir: pathlib.Path, steps: int, cache: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with log.open("a") as out:
        return subprocess.Popen(command(workdir, steps, cache), cwd=ROOT, env=env, stdout=out, stderr=out)


def rows(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saves(workdir: pathlib.Path) -> tuple[set[str], set[str]]:
    """(complete, unfinished) checkpoints."""
    names = {p.name for p in (workdir / "checkpoints").glob("*")}
    return {n for n in names if n.isdecimal()}, {n for n in names if "tmp" in n}


def newest(workdir: pathlib.Path) -> int:
    return max(map(int, saves(workdir)[0]), default=0)


def wait_for(process: subprocess.Popen, condition, *, log: pathlib.Path) -> None:
    end = time.monotonic() + 300
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before it could be killed:\n{log.read_text()}")
        if time.monotonic() > end:
            raise SystemExit(f"nothing to kill after five minutes:\n{log.read_text()}")
        time.sleep(0.0005)


def kill(process: subprocess.Popen, phase: str, workdir: pathlib.Path, steps: int, rng: random.Random, log) -> None:
    """Waits for the phase, a random moment longer, and kills."""
    if phase == "start":
        time.sleep(rng.uniform(0, 8))
    elif phase == "rollout":
        before = newest(workdir)
        wait_for(process, lambda: newest(workdir) > before, log=log)  # one more is whole: the run has got on
        seen = rows(workdir)
        wait_for(process, lambda: rows(workdir) > seen, log=log)  # a step ends, the next begins with its rollout
        time.sleep(rng.uniform(0, 0.4))
    elif phase == "save":
        before = newest(workdir)
        wait_for(process, lambda: newest(workdir) > before, log=log)
        wait_for(process, lambda: saves(workdir)[1], log=log)
        time.sleep(rng.uniform(0, 0.02))
    elif phase == "evaluation":
        wait_for(process, lambda: rows(workdir) == steps and str(steps) in saves(workdir)[0], log=log)
        time.sleep(rng.uniform(0, 3))
    else:
        wait_for(process, lambda: (workdir / "results.json").exists(), log=log)
        time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()


def tear(cache: pathlib.Path) -> int:
    """Cuts every file of the compilation cache in half."""
    files = [p for p in cache.rglob("*") if p.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return len(files)


def difference(a: pathlib.Path, b: pathlib.Path, steps: int) -> str:
    """The first difference of two finished runs, or ""."""
    import tiny_runs

    def metrics(workdir: pathlib.Path) -> list[dict]:
        found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        clock = ("seconds/", "compilations", "tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in found]

    for i, (x, y) in enumerate(zip(metrics(a), metrics(b), strict=False)):
        if x != y:
            return f"metrics of step {i + 1}: {x} and {y}"
    if [row["step"] for row in metrics(b)] != list(range(1, steps + 1)):
        return f"the steps of {b / 'metrics.jsonl'}"
    for name in ("config.json", "report.jsonl", "results.json", "export/model.safetensors"):
        x, y = ((workdir / name).read_bytes() for workdir in (a, b))
        if x != y:
            return name
    try:
        tiny_runs.assert_same_trees(*(tiny_runs.saved_state(workdir, steps) for workdir in (a, b)))
    except AssertionError as e:
        return f"the last checkpoint: {e}"
    return ""


def main(kills: int, seed: int, folder: pathlib.Path) -> int:
    rng, cache, log = random.Random(seed), folder / "cache", folder / "log.txt"
    late = max(1, min(len(LATE), kills // 5))
    phases = [EARLY[i % len(EARLY)] for i in range(kills - late)] + list(LATE[:late])
    steps = 2 * EVERY * len(phases)
    print(f"{steps} steps, undisturbed", flush=True)
    if start(folder / "a", steps, cache, log).wait():
        print(log.read_text())
        return 1
    met, resumed = collections.Counter(), set()
    for i, phase in enumerate(phases):
        log.write_text("")
        torn = tear(cache) if i == kills // 2 else 0
        process = start(folder / "b", steps, cache, log)
        try:
            kill(process, phase, folder / "b", steps, rng, log)
        finally:
            process.kill()
        said = [line for line in log.read_text().splitlines() if line.startswith("resuming from step")]
        resumed |= {int(line.split()[4]) for line in said}
        unfinished = sorted(saves(folder / "b")[1])
        where = "save" if phase == "save" and not unfinished else phase
        met["inside a save" if unfinished else f"in the {where}"] += 1
        note = f", after {torn} torn files of the compilation cache" if torn else ""
        print(f"kill {i + 1}: {phase}, {rows(folder / 'b')} rows, unfinished saves: {unfinished}{note}", flush=True)
    log.write_text("")
    if start(folder / "b", steps, cache, log).wait():
        print(log.read_text())
        return 1
    left = saves(folder / "b")[1]
    problem = difference(folder / "a", folder / "b", steps) or (left and f"left behind: {left}")
    if not resumed - {0}:
        problem = problem or "no run went on from a step above 0"
    print(f"{sum(met.values())} kills survived: {dict(met)}; gone on from steps {sorted(resumed)}")
    print(f"differs: {problem}" if problem else "the same to the bit")
    return bool(problem)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = parser.parse_args()
        sys.exit(main(arguments.kills, arguments.seed, pathlib.Path(folder)))
