"""The paper in miniature, as one command that can be stopped and started again.

    python -m vigos_jax.miniature.study --config configs/miniature/study.py --workdir runs/miniature

Every job is a command line that a person could type: bases first, then training, then PALR. What is finished is not
done again. At the end stand results.json, report.md and three figures.
"""

import json
import pathlib
import signal
import sys
from collections import Counter
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from vigos_jax.errors import InputError
from vigos_jax.main import find_config
from vigos_jax.miniature import plots, tables
from vigos_jax.miniature.jobs import Job, Jobs
from vigos_jax.runtime import shell
from vigos_jax.runtime.files import read_object, write_json
from vigos_jax.runtime.progress import say

USAGE = """\
usage: python -m vigos_jax.miniature.study [--config configs/miniature/study.py] [--workdir DIR]
           [--config.FIELD=VALUE ...]

Makes the bases, trains and measures whatever is not finished in --workdir (default runs/miniature), then writes
results.json, report.md, methods.svg, palr.svg and leak.svg there. Exit codes: 0 done, 2 a job failed or bad input,
130 stopped; the same command resumes. What is finished is known by its command line: after a change of a config file or
of the code, take another --workdir.
"""


def phases(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[list[Job], list[Job], list[Job]]:
    """(bases, runs, PALR): the jobs of each may run together, and need those before."""
    bases, runs, palr = [], [], []
    for leak, seed, method in cells(config):
        if method is None:
            folder = base_folder(workdir, leak, seed)
            options = (f"--config.seed={seed}", f"--config.leak={leak}", f"--config.output={folder}")
            command = ("vigos_jax.miniature.make_base", "--config", str(find_config(config.base)), *options)
            bases.append(Job(folder.name, command, folder / "README.md"))
            continue
        folder = run_folder(workdir, leak, seed, method)
        command = (
            *("vigos_jax.main", "--config", config.methods[method], "--workdir", str(folder)),
            *(f"--config.model.path={base_folder(workdir, leak, seed)}", f"--config.seed={seed}"),
            *(f"--config.demo_eval.seed={seed}", f"--config.demo_eval.questions={config.questions}"),
            *("--config.report.rows=0", "--config.export.after_training=False"),
        )
        runs.append(Job(folder.name, command, folder / "results.json"))
        if method not in config.free_form:
            options = (f"--config.diagnose.rows={config.palr_rows}", f"--config.diagnose.seed={seed}")
            command = (*command[:5], "--mode", "diagnose", *options)
            palr.append(Job(f"{folder.name}-palr", command, folder / "diagnose" / "summary.json"))
    return bases, runs, palr


def cells(config: ml_collections.ConfigDict) -> list[tuple[float, int, str | None]]:
    """(leak, seed, method) of everything in the study; method None is the base."""
    groups = config.groups.values()
    return [(g.leak, seed, method) for g in groups for seed in g.seeds for method in (None, *g.methods)]


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a config that is not a study's, or has something twice or a method that is not there."""
    wanted = {"base", "methods", "free_form", "groups", "questions", "palr_rows", "workers"}
    if missing := sorted(wanted - set(config)):
        raise InputError(f"this config is not a study: it lacks {', '.join(missing)}; see configs/miniature/study.py")
    for field, least in (("questions", 1), ("palr_rows", 2), ("workers", 1)):
        if type(config[field]) is not int or config[field] < least:
            raise InputError(f"config.{field}={config[field]!r}: must be a whole number of at least {least}")
    if unknown := set(config.free_form) - set(config.methods):
        raise InputError(f"config.free_form: {sorted(unknown)[0]!r} is unknown; choices: {', '.join(config.methods)}")
    for name, group in config.groups.items():
        if unknown := set(group.methods) - set(config.methods):
            raise InputError(
                f"config.groups.{name}.methods: {sorted(unknown)[0]!r} is unknown; choices: {', '.join(config.methods)}"
            )
    for cell, times in Counter(cells(config)).items():
        if times > 1:
            raise InputError(
                f"leak {cell[0]}, seed {cell[1]}, {cell[2] or 'its base'} is there {times} times; it must be there once"
            )


def base_folder(workdir: pathlib.Path, leak: float, seed: int) -> pathlib.Path:
    """Where the base of a leak strength and seed lies."""
    return workdir / f"base-{leak}-{seed}"


def run_folder(workdir: pathlib.Path, leak: float, seed: int, method: str) -> pathlib.Path:
    """The workdir of one training run."""
    return workdir / f"{method}-{leak}-{seed}"


def collect(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What was measured, a record per base or run: leak, seed, method, rates in 0..1; None where there is no such rate.

    The base is there as `base`, with ViGOS's prompt, and as `base_free_form` with that of the methods in free form.
    """
    out: list[dict[str, Any]] = []
    for leak, seed, method in cells(config):
        if method is None:
            continue
        folder, free_form = run_folder(workdir, leak, seed, method), method in config.free_form
        measured = read_object(folder / "results.json", owner="the study")
        key = {"leak_strength": leak, "seed": seed}
        base = key | {"method": "base_free_form" if free_form else "base"}
        if not any(base.items() <= r.items() for r in out):  # every run has measured it, on the same questions
            out.append(base | tables.rates(measured["base"], None, free_form=free_form))
        palr = None if free_form else read_object(folder / "diagnose" / "summary.json", owner="the study")
        out.append(key | {"method": method} | tables.rates(measured["trained"], palr, free_form=free_form))
    return out


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """The whole study; returns its tables as text.

    Raises:
      InputError: a job failed or was stopped, or the workdir holds another study's.
    """
    check(config)
    plots.check()
    with Jobs(workdir / "jobs", workers=config.workers) as jobs:
        all_phases = phases(config, workdir)
        for phase in all_phases:
            for job in phase:
                jobs.is_done(job)  # fails now, not in hours, where another study's results lie
        for title, phase in zip(("bases", "runs", "PALR"), all_phases, strict=True):
            say(f"{title}: {len(phase)}")
            jobs.run(phase)
    records = collect(config, workdir)
    write_json(workdir / "results.json", {"settings": json.loads(config.to_json_best_effort()), "records": records})
    text = tables.report(records)
    (workdir / "report.md").write_text(text + "\n", encoding="utf-8")
    plots.draw(records, workdir)
    return text


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (program name first) and returns the exit code."""
    if {"--help", "-h"} & set(argv[1:]):
        print(USAGE, end="")
        return 0
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "runs/miniature", "folder of the study", flag_values=values)
    default = str(find_config("configs/miniature/study.py"))
    try:
        try:
            config_flags.DEFINE_config_file("config", default, "config file", flag_values=values, sys_argv=argv)
            unexpected, config = values(argv)[1:], values.config
            set(config)  # fails if the file could not be read
        except Exception as e:  # a config file is code and may raise anything
            raise InputError(
                f"bad command line or config: {type(e).__name__}: {' '.join(str(e).split())}; see --help"
            ) from e
        if unexpected:
            raise InputError(f"unexpected argument {unexpected[0]!r}; see --help")
        print(run(config, pathlib.Path(values.workdir).expanduser()))
    except InputError as e:
        print(f"vigos_jax: {e}", file=sys.stderr)
        return 2
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    sys.exit(shell.run(main, sys.argv, verbose=False))
