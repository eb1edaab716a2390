"""The paper in miniature, as one command that can be stopped and started again.

    python -m vigos_jax.miniature.study --config configs/miniature/study.py --workdir runs/miniature

Every job is a command line that a person could type: a base, then training and PALR on it, then the next base. What is
finished is not done again. results.json, report.md and the figures are written anew whenever a base is done with.
"""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from vigos_jax.demo.world import WORLDS
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

Makes the bases, trains and measures whatever is not finished in --workdir (default runs/miniature), and writes
results.json, report.md and figures there whenever a base is done with. Exit codes: 0 done, 2 a job failed or bad input,
130 stopped; the same command resumes. What is finished is known by its command line: after a change of a config file or
of the code, take another --workdir.
"""
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A base and the methods that are run on it."""

    world: str
    leak: float
    seed: int
    methods: tuple[str, ...]

    @property
    def key(self) -> Record:
        """What its records have in common."""
        return {"world": self.world, "leak_strength": self.leak, "seed": self.seed}

    def folder(self, workdir: pathlib.Path, method: str = "base") -> pathlib.Path:
        """Where its base or a run lies."""
        return workdir / f"{method}-{self.world}-{self.leak}-{self.seed}"

    def captions_file(self, workdir: pathlib.Path) -> pathlib.Path:
        """What its base shares with those of other leak strengths: its params before the responses are trained."""
        return workdir / f"captions-{self.world}-{self.seed}.npz"


def units(config: ml_collections.ConfigDict) -> list[Unit]:
    """The whole study, in the order in which it is done: the strongest leak first."""
    groups = sorted(config.groups.values(), key=lambda group: -group.leak)
    return [Unit(w, g.leak, seed, tuple(g.methods)) for g in groups for seed in g.seeds for w in config.worlds]


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
            # It has nothing to measure where a method has lost the format altogether.
            options = {"needs": (folder.name,), "may_fail": True}
            jobs.append(Job(f"{folder.name}-palr", (*common, "--mode", "diagnose", *palr), done, **options))
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


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a config that is not a study's, or has something twice or a method that is not there."""
    wanted = {"worlds", "methods", "free_form", "groups", "questions", "palr_rows", "workers", "known"}
    if missing := sorted(wanted - set(config)):
        raise InputError(f"this config is not a study: it lacks {', '.join(missing)}; see configs/miniature/study.py")
    for field, least in (("questions", 1), ("palr_rows", 2), ("workers", 1)):
        if type(config[field]) is not int or config[field] < least:
            raise InputError(f"config.{field}={config[field]!r}: must be a whole number of at least {least}")
    methods = {"free_form": config.free_form} | {f"groups.{n}.methods": g.methods for n, g in config.groups.items()}
    asked = [("worlds", tuple(config.worlds), tuple(WORLDS))]
    asked += [(field, names, tuple(config.methods)) for field, names in methods.items()]
    for field, names, choices in asked:
        if unknown := sorted(set(names) - set(choices)):
            raise InputError(f"config.{field}: {unknown[0]!r} is unknown; choices: {', '.join(choices)}")
    cells = Counter((*u.key.values(), method) for u in units(config) for method in ("its base", *u.methods))
    for (world, leak, seed, method), times in cells.items():
        if times > 1:
            raise InputError(f"{world}, leak {leak}, seed {seed}, {method} is there {times} times; it must be once")


def read_known(config: ml_collections.ConfigDict) -> list[Record]:
    """The records of `config.known`; none without one.

    Raises:
      InputError: they were measured with other settings.
    """
    if not config.known:
        return []
    stored = read_object(pathlib.Path(config.known).expanduser(), owner="config.known")
    before, now = (_comparable(s) for s in (stored.get("settings", {}), settings(config)))
    if before != now:
        differ = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        raise InputError(
            f"config.known={config.known} was measured with other {', '.join(differ)}; it must be the same study"
        )
    return stored["records"]


def settings(config: ml_collections.ConfigDict) -> Record:
    """The config as results.json has it."""
    return json.loads(config.to_json_best_effort())


def _comparable(stored: Record) -> Record:
    return {k: v for k, v in stored.items() if k not in ("groups", "workers", "known")}


def collect(unit: Unit, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Record]:
    """What was measured of a unit that is done, a record per base or run: its key, method, revision and rates in 0..1.

    A rate is None where there is no such. The base is there as `base`, with ViGOS's prompt, and as `base_free_form`
    with that of the methods in free form.
    """
    key = {**unit.key, "revision": _revision()}
    learned = read_object(unit.folder(workdir) / "measured.json", owner="the study")["teachers_given_a_wrong_reference"]
    out: list[Record] = []
    for method in unit.methods:
        folder, free_form = unit.folder(workdir, method), method in config.free_form
        measured = read_object(folder / "results.json", owner="the study")
        base = {**key, "method": "base_free_form" if free_form else "base"}
        if not any(base.items() <= r.items() for r in out):  # every run has measured it, on the same questions
            rates = tables.rates(measured["base"], None, free_form=free_form)
            out.append({**base, **rates, "follows_reference": learned["reference"]["description_follows_reference"]})
        palr, summary = None, folder / "diagnose" / "summary.json"
        if summary.exists() and not free_form:
            palr = read_object(summary, owner="the study")
        out.append({**key, "method": method, **tables.rates(measured["trained"], palr, free_form=free_form)})
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
    """A sentence that names the bases of the study which `records` lack; "" where there are none."""
    lacking: dict[str, list[str]] = {}
    for unit in units(config):
        if not any(unit.key.items() <= r.items() for r in records):
            lacking.setdefault(f"{unit.world} at leak strength {unit.leak:g}", []).append(str(unit.seed))
    named = "; ".join(f"{group}: {', '.join(seeds)}" for group, seeds in lacking.items())
    return f"Not measured yet, by seed: {named}." if named else ""


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
    with Jobs(workdir / "jobs", workers=config.workers) as jobs:
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
