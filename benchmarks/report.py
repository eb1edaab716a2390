"""The tables of benchmarks/README.md, made by the run that measured them."""

import datetime
import os
import pathlib
import platform
from collections.abc import Sequence

import jax

from benchmarks.harness import Result

END = "<!-- end -->"


def start(module: str) -> str:
    """The marker in front of the table that a module makes."""
    return f"<!-- made by `python -m {module} --readme benchmarks/README.md` -->"


START = start("benchmarks")


def machine() -> str:
    if jax.default_backend() != "cpu":
        return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores of {model}, jax {jax.__version__}"


def table(results: Sequence[Result]) -> str:
    lines = [f"{datetime.date.today()}, {machine()}.", ""]
    lines += ["| | ratio | rounds | must reach | |", "|---|---|---|---|---|"]
    for r in results:
        ratio = "" if r.ratio is None else f"**{r.ratio:.2f}**" if r.holds else f"{r.ratio:.2f} (fails)"
        spread = f"{r.spread[0]:.2f} - {r.spread[1]:.2f}" if r.spread else ""
        detail = "<br>".join(f"{k}: {v}" for k, v in r.detail)
        gate = "" if r.gate is None else f"{r.gate:g}"
        lines.append(f"| `{r.name}` | {ratio} | {spread} | {gate} | {r.what}<br>{detail} |")
    return "\n".join(lines)


def write_readme(path: pathlib.Path, results: Sequence[Result], *, marker: str = START) -> None:
    """Puts the table between a marker and the next end."""
    before, _, rest = path.read_text(encoding="utf-8").partition(marker)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path} lacks {marker} with {END} behind it")
    path.write_text(f"{before}{marker}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")
