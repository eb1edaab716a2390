"""The paper in miniature, as one command that can be stopped and started again.

    python -m vigos_jax.demo.study --config configs/miniature/study.py --workdir runs/miniature

Every job is a command line that a person could type: bases first, then training, then PALR. What is finished is not
done again. At the end stand results.json, report.md and three figures.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from vigos_jax import shell
from vigos_jax.demo import study_plots, study_tables
from vigos_jax.errors import InputError
from vigos_jax.main import find_config
from vigos_jax.metrics import say, write_json

USAGE = """\
usage: python -m vigos_jax.demo.study [--config configs/miniature/study.py] [--workdir DIR] [--config.FIELD=VALUE ...]

Makes the bases, trains and measures whatever is not finished in --workdir (default runs/miniature), then writes
results.json, report.md, methods.svg, palr.svg and leak.svg there. Exit codes: 0 done, 2 a job failed or bad input,
130 stopped; the same command goes on.
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One command line.

    Attributes:
      name: unique, a file name.
      arguments: behind `python -m`.
      done: the file that the command writes last.
    """

    name: str
    arguments: tuple[str, ...]
    done: pathlib.Path


def phases(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[list[Job], list[Job], list[Job]]:
    """(bases, runs, PALR): the jobs of each may run together, and need those before."""
    bases, runs, palr = [], [], []
    for leak, seed, method in cells(config):
        if method is None:
            folder = base_folder(workdir, leak, seed)
            options = (f"--config.seed={seed}", f"--config.leak={leak}", f"--config.output={folder}")
            command = ("vigos_jax.demo.make_base", "--config", str(find_config(config.base)), *options)
            bases.append(Job(folder.name, command, folder / "README.md"))
            continue
        folder = run_folder(workdir, leak, seed, method)
        command = (
            *("vigos_jax.main", "--config", config.methods[method], "--workdir", str(folder)),
            *(f"--config.model.path={base_folder(workdir, leak, seed)}", f"--config.seed={seed}"),
            *(f"--config.evaluate.seed={seed}", f"--config.evaluate.questions={config.questions}"),
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
    """Raises InputError for a config that is no study's, or has something twice or a method that is not there."""
    wanted = {"base", "methods", "free_form", "groups", "questions", "palr_rows", "workers"}
    if missing := sorted(wanted - set(config)):
        raise InputError(f"this config is no study: it lacks {', '.join(missing)}; see configs/miniature/study.py")
    for field in ("questions", "palr_rows", "workers"):
        if not isinstance(config[field], int) or config[field] < 1:
            raise InputError(f"config.{field}={config[field]!r}: must be a whole number of at least 1")
    for name, group in config.groups.items():
        if unknown := set(group.methods) - set(config.methods):
            raise InputError(
                f"config.groups.{name}.methods: {sorted(unknown)[0]!r} is unknown; choices: {', '.join(config.methods)}"
            )
    for cell, times in Counter(cells(config)).items():
        if times > 1:
            raise InputError(f"leak {cell[0]}, seed {cell[1]}, {cell[2] or 'its base'} is there {times} times; once")


def base_folder(workdir: pathlib.Path, leak: float, seed: int) -> pathlib.Path:
    """Where the base of a leak strength and seed lies."""
    return workdir / f"base-{leak}-{seed}"


def run_folder(workdir: pathlib.Path, leak: float, seed: int, method: str) -> pathlib.Path:
    """The workdir of one training run."""
    return workdir / f"{method}-{leak}-{seed}"


def is_done(job: Job, records: pathlib.Path) -> bool:
    """Whether the job was finished before, by this very command.

    Raises:
      InputError: it was finished by another one.
    """
    record = records / f"{job.name}.json"
    if not (job.done.exists() and record.exists()):
        return False
    made_by = json.loads(record.read_text(encoding="utf-8"))["arguments"]
    if made_by != list(job.arguments):
        before, now = (sorted(set(a) - set(b)) for a, b in ((made_by, job.arguments), (job.arguments, made_by)))
        raise InputError(f"{job.done.parent} was made with {before}, not {now}; choose another --workdir")
    return True


def run_jobs(jobs: Sequence[Job], records: pathlib.Path, *, workers: int) -> None:
    """Runs what is not done, `workers` at a time.

    Raises:
      InputError: a command failed, or was stopped. Then no further one starts, and those that run are asked to end.
    """
    records.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not is_done(job, records)]
    shares, running = _shares(workers), set()
    pool = ThreadPoolExecutor(workers, initializer=lambda: _stay_on(shares.pop()))
    try:
        for n, (job, seconds) in enumerate(pool.map(lambda job: (job, _run(job, records, running)), waiting), 1):
            say(f"{n}/{len(waiting)}  {job.name}  {seconds:.0f} s")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(running):
            process.terminate()  # a training run then saves its step
        raise
    finally:
        pool.shutdown()


def _shares(workers: int) -> list[set[int]]:
    """The cores of each worker; empty where a process cannot be held on some."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i % len(cores) :: workers]) for i in range(workers)]


def _stay_on(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread, and of the processes it starts


def _run(job: Job, records: pathlib.Path, running: set[subprocess.Popen]) -> float:
    """Runs one command, in `running` meanwhile, and returns its seconds."""
    began, log = time.perf_counter(), records / f"{job.name}.log"
    write_json(records / f"{job.name}.json", {"arguments": list(job.arguments)})
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", *job.arguments]
        # In a session of its own: Ctrl-C is for the study, which asks its jobs to end once.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code or not job.done.exists():
        how = f"exit code {code}" if code else "it was stopped"
        raise InputError(f"{job.name}: {how}; what it said is in {log}; the same command goes on")
    return time.perf_counter() - began


def collect(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What was measured, a record per base or run: leak, seed, method, rates in 0..1; None where there is no such rate.

    The base answers before every run: as `base` by ViGOS's prompt, and as `base_free_form` by free-form OPSD's.
    """
    out = []
    for leak, seed, method in cells(config):
        if method is None:
            continue
        folder, free_form = run_folder(workdir, leak, seed, method), method in config.free_form
        measured = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        key = {"leak_strength": leak, "seed": seed}
        if method in ("vigos", "opsd"):
            name = "base_free_form" if free_form else "base"
            out.append({**key, "method": name, **study_tables.rates(measured["base"], None, free_form=free_form)})
        palr = None if free_form else json.loads((folder / "diagnose" / "summary.json").read_text(encoding="utf-8"))
        out.append({**key, "method": method, **study_tables.rates(measured["trained"], palr, free_form=free_form)})
    return out


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """The whole study; returns its tables as text.

    Raises:
      InputError: a job failed or was stopped, or the workdir holds another study's.
    """
    check(config)
    study_plots.check()
    for title, jobs in zip(("bases", "runs", "PALR"), phases(config, workdir), strict=True):
        say(f"{title}: {len(jobs)}")
        run_jobs(jobs, workdir / "jobs", workers=config.workers)
    records = collect(config, workdir)
    write_json(workdir / "results.json", {"settings": json.loads(config.to_json_best_effort()), "records": records})
    text = study_tables.report(records)
    (workdir / "report.md").write_text(text + "\n", encoding="utf-8")
    study_plots.draw(records, workdir)
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
            raise InputError(f"bad command line or config: {type(e).__name__}: {' '.join(str(e).split())}") from e
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
    sys.exit(shell.run(main, sys.argv, verbose=False))
