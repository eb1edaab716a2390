"""One step of the demo by phase, through the command line."""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks.harness import Result

STEPS = 25


def demo() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vigos_jax.main", "--config=configs/base.py", f"--workdir={folder}/run"]
        command += [f"--config.steps={STEPS}", "--config.demo_eval.questions=0", "--config.export.after_training=False"]
        subprocess.run(command, check=True, capture_output=True, cwd=pathlib.Path(__file__).parents[1])
        rows = [json.loads(x) for x in (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steady = [r for r in rows[1:] if not r["compilations"]]
    phases = {k: statistics.median(r[f"seconds/{k}"] for r in steady) for k in ("data", "rollout", "pack", "update")}
    total = sum(x for k, x in phases.items() if k != "data")
    detail = [(k, f"{1e3 * x:.0f} ms") for k, x in phases.items()]
    detail[0] = ("data", f"{1e3 * phases['data']:.0f} ms, during the update before")
    detail += [("a step", f"{1e3 * total:.0f} ms, {32 / total:.0f} rows a second, {rows[0]['compilations']} programs")]
    return Result("demo", "one demo step by phase, B = 32", None, None, None, tuple(detail))
