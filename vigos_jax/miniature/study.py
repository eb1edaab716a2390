"""The paper in miniature, as one command that can be stopped and started again.

    python -m vigos_jax.miniature.study --config configs/miniature/study.py --workdir runs/miniature

Every job is a command line that a person could type: a base, then training and PALR on it, then the next base. What is
finished is not done again. results.json, report.md and the figures are written after each base's last job.
"""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from vigos_jax.errors import InputError
from vigos_jax.main import find_config
from vigos_jax.miniature import plots, tables
from vigos_jax.miniature.jobs import Job, Jobs
from vigos_jax.miniature.units import BASES, Unit, check, is_list_of, units
from vigos_jax.runtime import shell
from vigos_jax.runtime.files import read_object, write_json
from vigos_jax.runtime.progress import say

USAGE = """\
usage: python -m vigos_jax.miniature.study [--config configs/miniature/study.py] [--workdir DIR]
           [--config.FIELD=VALUE ...]

Makes the bases, trains and measures whatever is not finished in --workdir (default runs/miniature), and writes
results.json, report.md and figures there after each base's last job. Exit codes: 0 done, 2 a job failed or bad input,
130 stopped; the same command resumes. What is finished is known by its command line: after a change of a config file or
of the code, take another --workdir.
"""
Record = dict[str, Any]


def jobs_of(unit: Unit, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Job]:
    """Its base, then each method's training and, where there are descriptions, PALR."""
    base = unit.folder(workdir)
    seed, captions = f"--config.seed={unit.seed}", unit.captions_file(workdir)
    options = (seed, f"--config.leak={unit.leak}", f"--config.output={base}", f"--config.captions_file={captions}")
    command = ("vigos_jax.miniature.make_base", "--config", str(find_config(config.worlds[unit.world])), *options)
    jobs = [Job(base.name, command, base / "README.md")]
    for method in unit.methods:
        folder = unit.folder(workdir, method)
        common = (
            *("vigos_jax.main", *config.methods[method], f"--config.data.source={unit.world}"),
            *("--workdir", str(folder), f"--config.model.path={base}", seed),
        )
        training = (
            *(f"--config.demo_eval.seed={unit.seed}", f"--config.demo_eval.questions={config.questions}"),
            *("--config.report.rows=0", "--config.export.after_training=False"),
        )
        jobs.append(Job(folder.name, (*common, *training), folder / "results.json", needs=(base.name,)))
        if method not in config.free_form:
            palr = (f"--config.diagnose.rows={config.palr_rows}", f"--config.diagnose.seed={unit.seed}")
            done = folder / "diagnose" / "summary.json"
            command = (*common, "--mode", "diagnose", *palr)
            # It has nothing to measure where a method has lost the format altogether.
            jobs.append(Job(f"{folder.name}-palr", command, done, needs=(folder.name,), may_fail=True))
    return jobs


def all_jobs(work: Sequence[Unit], config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Job]:
    """The jobs of `work`. Bases that share two stages wait for the first of them."""
    out: list[Job] = []
    first: dict[pathlib.Path, str] = {}
    for unit in work:
        base, *others = jobs_of(unit, config, workdir)
        if (shared := unit.captions_file(workdir)) in first:
            base = dataclasses.replace(base, needs=(first[shared],))
        first.setdefault(shared, base.name)
        out += [base, *others]
    return out


def read_known(config: ml_collections.ConfigDict) -> list[Record]:
    """The records of `config.known`; none without one.

    Raises:
      InputError: it is not a study's, or what both have was measured with other settings.
    """
    if not config.known:
        return []
    stored = read_object(pathlib.Path(config.known).expanduser(), owner="config.known")
    before, records, now = stored.get("settings"), stored.get("records") or [], settings(config)
    key = {"world", "leak_strength", "seed", "method"}
    if not (isinstance(before, dict) and records and is_list_of(records, dict) and all(key <= set(r) for r in records)):
        raise InputError(f"config.known={config.known}: must be the results.json of a study, with settings and records")
    for field in ("questions", "palr_rows"):
        if before.get(field) != now[field]:
            raise InputError(
                f"config.known={config.known} was measured with config.{field}={before.get(field)}, not {now[field]}; "
                "choose the same"
            )
    for field in ("worlds", "methods"):
        others = before.get(field) or {}
        for name in others.keys() & now[field].keys():
            if others[name] != now[field][name]:
                raise InputError(
                    f"config.known={config.known} has config.{field}.{name}={others[name]}, not {now[field][name]}; "
                    "choose the same, or another name"
                )
    return records


def settings(config: ml_collections.ConfigDict) -> Record:
    """What of the config decides the results."""
    return {k: v for k, v in json.loads(config.to_json_best_effort()).items() if k not in ("known", "workers")}


def collect(unit: Unit, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Record]:
    """What was measured of a unit that is done, a record per base or run: its key, method, revision and rates in 0..1.

    A rate is None where it was not measured. The base is there as `base`, with ViGOS's prompt, and as
    `base_free_form` with that of the methods in free form.

    Raises:
      InputError: the base is not of the unit's world.
    """

    def read(path: pathlib.Path) -> Record:
        return read_object(path, owner="the study")

    def revision(method: str) -> Record:
        return {"revision": read(workdir / "jobs" / f"{unit.folder(workdir, method).name}.json").get("revision", "")}

    card = read(unit.folder(workdir) / "measured.json")
    if card["world"] != unit.world:
        config_file = config.worlds[unit.world]
        raise InputError(
            f"config.worlds.{unit.world}={config_file} makes bases of {card['world']}; choose another file"
        )
    follows = card["teachers_given_a_wrong_reference"]["reference"]["description_follows_reference"]
    out: list[Record] = []
    for method in unit.methods:
        folder, free_form = unit.folder(workdir, method), method in config.free_form
        measured = read(folder / "results.json")
        base = BASES[free_form]
        if not any(r["method"] == base for r in out):  # every run has measured it, on the same questions
            rates = tables.rates(measured["base"], None, free_form=free_form)
            learned = {} if free_form else {"follows_reference": follows}
            out.append({**unit.key, "method": base, **revision("base"), **rates, **learned})
        summary = folder / "diagnose" / "summary.json"
        palr = read(summary) if summary.exists() and not free_form else None
        rates = tables.rates(measured["trained"], palr, free_form=free_form)
        out.append({**unit.key, "method": method, **revision(method), **rates})
    return out


def _revision() -> str:
    """The commit of this package's code; "" where it lies in no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def not_measured(records: Sequence[Record], config: ml_collections.ConfigDict) -> str:
    """Names the bases of the study that `records` lack, and the runs without PALR; "" where there are none."""
    lacking: dict[str, list[str]] = {}
    for unit in units(config):
        if not any(unit.key.items() <= r.items() for r in records):
            lacking.setdefault(f"{unit.world} at leak strength {unit.leak:g}", []).append(str(unit.seed))
    out = []
    if named := "; ".join(f"{group}: {', '.join(seeds)}" for group, seeds in lacking.items()):
        out.append(f"Not measured yet, by seed: {named}.")
    no_palr = [
        f"{r['method']} on {r['world']} at leak strength {r['leak_strength']:g} with seed {r['seed']}"
        for r in records
        if r["method"] not in (*BASES, *config.free_form) and r["palr_y"] is None
    ]
    if no_palr:
        out.append(f"PALR could not be measured of {', '.join(no_palr)}.")
    return " ".join(out)


def write(records: Sequence[Record], config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """Writes results.json, report.md and the figures; returns the report."""
    write_json(workdir / "results.json", {"settings": settings(config), "records": list(records)})
    text = "\n\n".join(filter(None, (tables.report(records), not_measured(records, config))))
    (workdir / "report.md").write_text(text + "\n", encoding="utf-8")
    plots.draw(records, workdir)
    return text


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """The whole study; returns its tables as text.

    Raises:
      InputError: a job failed or was stopped, or the workdir holds another study's.
    """
    check(config)
    plots.check()
    known = read_known(config)
    there = {(r["world"], r["leak_strength"], r["seed"], r["method"]) for r in known}
    work = [u for u in units(config) if not {(*u.key.values(), m) for m in u.methods} <= there]
    known = [r for r in known if not any(u.key.items() <= r.items() for u in work)]  # such a base is done as a whole
    with Jobs(workdir / "jobs", workers=config.workers, revision=_revision()) as jobs:
        # Fails now, not in hours, where another study's results lie.
        left = {u: {job.name for job in jobs_of(u, config, workdir) if not jobs.is_done(job)} for u in work}

        def write_what_is_complete() -> str:
            found = [r for u in work if not left[u] for r in collect(u, config, workdir)]
            return write([*known, *found], config, workdir)

        def take_off(job: Job) -> None:
            for names in left.values():
                if job.name in names:
                    names.remove(job.name)
                    if not names:
                        write_what_is_complete()

        say(f"{sum(map(len, left.values()))} jobs for {len(work)} bases")
        jobs.run(all_jobs(work, config, workdir), on_end=take_off)
        return write_what_is_complete()


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
