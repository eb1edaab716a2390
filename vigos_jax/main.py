"""The command line: reads flags, checks the config, and runs a mode. Nothing else happens here."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

# A user's config file may import ours, also when this runs from a checkout that is not installed.
PACKAGES = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(PACKAGES))
# transformers warns about a missing torch; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from vigos_jax import __version__  # noqa: E402
from vigos_jax.config import TEMPLATE_SWITCHES, read_json, renamed, validate  # noqa: E402
from vigos_jax.errors import InputError, Stopped  # noqa: E402
from vigos_jax.runtime import distributed, lock, shell  # noqa: E402
from vigos_jax.runtime import workdir as files  # noqa: E402

# Flags put the traceback of a config file's error into their own message.
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(\s.*\n)*")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # or not to be written to
VERBOSE = ("-v", "--v", "--verbose")
HELP_FLAGS = ("--help", "-h", "-help", "--helpfull")
SEVERAL = ("train", "export")  # modes that several processes may run together
WITHOUT_CONFIG = ("generate", "report")  # modes that --config may be left out for
HELP = """\
usage: python -m vigos_jax.main --config FILE [--mode MODE] [--workdir DIR] [--config.FIELD=VALUE ...]
       python -m vigos_jax.main --help [FIELD]

modes
  train     (default) post-train a model; resumes an earlier run in the same workdir; with more config.steps, a finished
            one too
  data      read some rows and show how they are understood: columns, bad rows, sizes, padding, and a few as the student
            and each teacher will read them; --config.preview.rows=200, --config.preview.output=DIR for a page
  generate  answer one question about one image: --config.generate.image=FILE --config.generate.question=TEXT;
            without them, two questions of the demo, for which --config may be left out
  score     score rollouts made by any engine: --config.score.rollouts=FILE.jsonl --config.score.output=DIR
  diagnose  how much of the teachers' correction the answer made, and how much the image (PALR): on rollouts of the
            student, or --config.diagnose.rollouts=FILE.jsonl; writes palr.jsonl and palr.html
  eval      answer benchmark questions and grade them, --config.eval.tasks="('vilp_f', 'cv_bench')"; resumes an
            earlier one
  export    write a Hugging Face folder: --config.export.output=DIR --config.export.kind=merged|adapter
            (--config.export.check=true loads it again and compares; --config.export.step=N takes an older checkpoint)
  plan      what a run takes on devices that are not here: memory, time, whether it fits; its programs are compiled,
            nothing is loaded: --config.plan.topology=v5e:2x4 (or cpu:8) --config.plan.output=FILE.json
  report    a page of all runs in the folder --workdir (default runs), to compare them: index.html; of one run's workdir
            its report.html, drawn anew. --config may be left out

--config names a file of yours, or one that is shipped: configs/NAME.py is taken from the installed package where there
is no such file in the current folder. --help FIELD says what a field means, what it may be and when to change it, as in
--help sampling.max_tokens; --help SECTION, as in --help sampling, lists a section. configs/base.py has all of them.
--workdir is where a training run keeps its files (default runs/NAME for configs/NAME.py). All others but report read
the trained student and the config from it if given; without it they use config.model.path and config.model.adapter.
-v (--verbose) shows what other libraries log and warn of; --version prints the version.

examples
  python -m vigos_jax.main --mode generate
  python -m vigos_jax.main --config configs/base.py
  python -m vigos_jax.main --config configs/base.py --config.steps=10 --workdir /tmp/short
  python -m vigos_jax.main --config configs/base.py --mode generate --workdir runs/base \\
      --config.generate.image=cat.png --config.generate.question='what color are the bananas ?'
  python -m vigos_jax.main --config configs/base.py --mode export --workdir runs/base --config.export.output=/tmp/hf

exit codes: 0 done (or stopped by a signal and saved), 1 done but some rows were bad, or not all could be printed (or,
with a traceback, a crash), 2 bad config or input, 130 interrupted, 141 broken pipe, 143 ended by SIGTERM
"""


def _parse(argv: list[str]):
    """Returns (config, mode, workdir or None); InputError for anything that is off."""
    file, rest = _take_config([a for a in argv[1:] if a not in VERBOSE])
    if file is None and any(_asks_for(rest, mode) for mode in WITHOUT_CONFIG):
        file = "configs/base.py"
    if file is None:
        raise InputError("--config FILE is missing; try --config configs/base.py, or --help")
    path = find_config(file)
    file = file.replace(file.split(":")[0], str(path), 1)  # what follows a colon is for get_config
    # The file goes first: its fields can only be overridden once it is read, in whatever order they were given.
    config_only, everything = [argv[0], f"--config={file}"], [argv[0], f"--config={file}", *rest]
    try:
        _check_fields(_read_flags(config_only)[0].config, rest)
        values, unexpected = _read_flags(everything)
        config = values.config
    except InputError:
        raise
    except Exception as e:  # a config file is code and may raise anything
        # ml_collections puts a whole traceback into some messages; what happened follows its last frame.
        message = re.sub(r"Traceback \(most recent call last\):.*\n  +\S[^\n]*", "", str(e), flags=re.DOTALL)
        reason = " ".join(message.split())
        reason = re.sub(r" Other fields present: .*?(?=Did you mean|$)", " ", reason)  # all of them
        # A locked config names the field that it does not have first, in quotes.
        asked = re.search(r"""["'](?:Key )?["']?(\w+)["']""", reason)
        if asked and (new := renamed(asked[1])):
            raise InputError(f"--config {file}: config.{asked[1]} is now config.{new}") from e
        raise InputError(f"bad command line or config: {type(e).__name__}: {reason}; see --help") from e
    if config is None:
        raise InputError(f"--config {file}: its get_config() returns nothing; it must return the config")
    if unexpected:
        raise InputError(f"unexpected argument {unexpected[0]!r}; see --help")
    workdir = values.workdir
    if not workdir:
        workdir = {"train": f"runs/{path.stem}", "report": "runs"}.get(values.mode)
    try:
        return config, values.mode, pathlib.Path(workdir).expanduser() if workdir else None
    except RuntimeError as e:
        raise InputError(
            f"--workdir {workdir} begins with the home of a user that does not exist; write the path instead of ~"
        ) from e


def find_config(file: str) -> pathlib.Path:
    """The config file that `--config` names: one of the user's, else one that is shipped. InputError for neither."""
    path = pathlib.Path(file.split(":")[0])
    if path.is_file():
        return path
    shipped = PACKAGES / path
    if path.parts[:1] == ("configs",) and shipped.is_file():
        return shipped
    names = sorted(p.relative_to(PACKAGES) for p in (PACKAGES / "configs").rglob("[!_]*.py"))
    raise InputError(f"--config {file}: there is no such file; shipped are {', '.join(map(str, names))}")


def _asks_for(arguments: list[str], mode: str) -> bool:
    """Whether --mode is given as `mode`, before flags are parsed, for which a config must be known."""
    return f"--mode={mode}" in arguments or ("--mode", mode) in itertools.pairwise(arguments)


def _read_flags(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Parses a command line into flags of its own, and returns what was left over."""
    values = flags.FlagValues()
    flags.DEFINE_enum("mode", "train", tuple(MODES), "what to do", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of a run", flag_values=values)
    # A config locks itself, but for what users name: `_check_fields` refuses what else it does not have.
    options = {"lock_config": False, "accept_new_attributes": True, "flag_values": values, "sys_argv": argv}
    config_flags.DEFINE_config_file("config", None, "config file", **options)
    unexpected = values(argv)[1:]
    if isinstance(values.config, ConfigDict):
        values.config.lock()
    return values, unexpected


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The last --config FILE or --config=FILE, and all other arguments."""
    file, rest, i = None, [], 0
    while i < len(arguments):
        if arguments[i] in ("--config", "-config") and i + 1 < len(arguments):
            file, i = arguments[i + 1], i + 2
        elif arguments[i].startswith(("--config=", "-config=")):
            file, i = arguments[i].split("=", 1)[1], i + 1
        else:
            rest.append(arguments[i])
            i += 1
    return file, rest


def _check_fields(config, arguments: list[str]) -> None:
    """Raises InputError for an override of a field that the config does not have, with the fields it has there."""
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            continue
        node, parts = config, argument.split("=", 1)[0].split(".")[1:]
        if new := renamed(".".join(parts)):
            raise InputError(f"{argument}: config.{'.'.join(parts)} is now config.{new}")
        if ".".join(parts[:-1]) == TEMPLATE_SWITCHES:
            continue
        for i, part in enumerate(parts):
            fields = list(node.keys()) if hasattr(node, "keys") else []
            if part not in fields:
                where = ".".join(["config", *parts[:i]])
                raise InputError(f"{argument}: {where} has no field {part!r}; choices: {', '.join(fields) or 'none'}")
            node = node[part]


def _config_of_run(config, workdir: pathlib.Path | None):
    """The config to use: with a run's workdir, the saved one, but sections of modes, devices and logs from `config`."""
    if workdir is None:
        return config
    saved = read_json(workdir / files.CONFIG)
    modes = ("preview", "generate", "score", "diagnose", "eval", "eval_every", "export", "plan", "rollout")
    for section in (*modes, "mesh", "distributed", "report", "log"):
        saved[section] = config[section]
    return saved


def _train(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.training.loop import train

    assert workdir is not None  # `_parse` gives a run one
    return 1 if train(config, workdir) else 0


def _data(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.analysis.preview import preview

    folder = config.preview.output or workdir
    output = pathlib.Path(folder).expanduser() if folder else None
    with _writing("preview.output", output, workdir) if output else contextlib.nullcontext():
        text, bad_rows = preview(config, output)
    print(text)
    return 1 if bad_rows else 0


def _generate(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.rollouts.engines import check_engine, engine_of
    from vigos_jax.rollouts.generate import stream
    from vigos_jax.training.checkpoints import load_student

    check_engine(config, trains=False)
    student = load_student(config, workdir)
    for piece in stream(student.session, student.trained, config, open_engine=engine_of(config, workdir)):
        print(piece, end="", flush=True)
    print()
    return 0


def _score(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.analysis.score_rollouts import output_of, score_rollouts
    from vigos_jax.training.checkpoints import load_student

    with _writing("score.output", output_of(config), workdir):
        student = load_student(config, workdir, teaches=True)
        options = {"teacher_params": student.teacher_params}
        summary, bad_lines = score_rollouts(student.session, student.trained, config, **options)
    return _told(json.dumps(summary, indent=2), bad_lines)


def _diagnose(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.analysis.diagnose import diagnose, output_of
    from vigos_jax.rollouts.engines import check_engine, engine_of
    from vigos_jax.training.checkpoints import load_student

    output = output_of(config, workdir)
    with _writing("diagnose.output", output, workdir):
        if not config.diagnose.rollouts:
            check_engine(config, trains=False)
        student = load_student(config, workdir, teaches=True)
        options: dict[str, Any] = {"teacher_params": student.teacher_params, "output": output}
        options["open_engine"] = engine_of(config, workdir)
        text, bad_lines = diagnose(student.session, student.trained, config, **options)
    return _told(text, bad_lines)


def _writing(field: str, output: pathlib.Path, workdir: pathlib.Path | None) -> contextlib.AbstractContextManager[None]:
    """Inside, no other run writes to the folder of config.`field`, or to the workdir that it lies in."""
    return lock.held_for(output, workdir=workdir, called=f"to config.{field}={str(output)!r}")


def _told(text: str, bad_lines: list[str]) -> int:
    """Prints what came out, and the bad rows; the exit code."""
    print(text)
    for line in bad_lines:
        print(line, file=sys.stderr)
    return 1 if bad_lines else 0


def _eval(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.evaluation.benchmark import output_of
    from vigos_jax.evaluation.report import evaluate
    from vigos_jax.rollouts.engines import check_engine, engine_of
    from vigos_jax.training.checkpoints import load_student

    with _writing("eval.output", output_of(config, workdir), workdir):
        check_engine(config, trains=False, for_evaluation=True)
        student = load_student(config, workdir)
        options: dict[str, Any] = {"workdir": workdir, "step": student.step}
        options["open_engine"] = engine_of(config, workdir, for_evaluation=True)
        table, is_complete = evaluate(student.session, student.trained, config, **options)
    print(table)
    return 0 if is_complete else 1


def _export(config, workdir: pathlib.Path | None) -> int:
    if not config.export.output:
        raise InputError("--mode export needs --config.export.output=DIR")
    if config.export.step and workdir is None:
        raise InputError(f"config.export.step={config.export.step} needs --workdir of a run, whose checkpoint it is")
    from vigos_jax.export.export import export
    from vigos_jax.export.model_card import RunFacts
    from vigos_jax.training.checkpoints import load_student

    student = load_student(config, workdir, step=config.export.step)
    output = pathlib.Path(config.export.output).expanduser()
    run = RunFacts.of(workdir, student.step) if workdir else None
    export(student.session, student.trained, config, output, run=run)
    print(output)
    return 0


def _plan(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.plan.planner import plan

    print(plan(config))
    return 0


def _report(config, workdir: pathlib.Path | None) -> int:
    from vigos_jax.report.index_page import write_index
    from vigos_jax.report.run_page import write_run_page

    assert workdir is not None  # `_parse` gives it one
    try:
        print(write_run_page(workdir) if (workdir / files.CONFIG).is_file() else write_index(workdir))
    except PermissionError as e:
        raise InputError(f"cannot write to {str(workdir)!r}: {e.strerror}; it must be a folder of yours") from e
    return 0


# Each takes the config and the workdir (None if not given) and returns the exit code. A mode imports what it needs when
# it runs, so that --help and a refused config are fast.
MODES = {
    "train": _train,
    "data": _data,
    "generate": _generate,
    "score": _score,
    "diagnose": _diagnose,
    "eval": _eval,
    "export": _export,
    "plan": _plan,
    "report": _report,
}


def _help(arguments: list[str]) -> str | None:
    """What --help prints: of the fields that follow it, else of the program. None where it is not asked for."""
    at = next((i for i, argument in enumerate(arguments) if argument in HELP_FLAGS), None)
    if at is None:
        return None
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[at + 1 :]))
    if not names:
        return HELP
    from vigos_jax.explain.render import explain

    return "\n".join(map(explain, names))


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (program name first) and returns the exit code."""
    if "--version" in argv[1:]:
        print(f"vigos_jax {__version__}")
        return 0
    try:
        if (help_text := _help(argv[1:])) is not None:
            print(help_text, end="")
            return 0
        config, mode, workdir = _parse(argv)
        if mode not in ("train", "report"):
            config = _config_of_run(config, workdir)
        validate(config)
        with distributed.joined(config.distributed):
            if distributed.several() and mode not in SEVERAL:
                choices = ", ".join(SEVERAL)
                raise InputError(
                    f"--mode {mode} must run in one process (config.distributed=off); choices for several: {choices}"
                )
            return MODES[mode](config, workdir)
    except InputError as e:
        print(f"vigos_jax: {e}", file=sys.stderr)
        return 2
    except Stopped as e:
        if distributed.is_first():
            print(f"vigos_jax: {e}", file=sys.stderr)
        return 0
    except OSError as e:
        if e.errno not in _FULL:
            raise
        problem = InputError(f"cannot write {e.filename or 'a file'}: {e.strerror}; make room and start again")
        print(f"vigos_jax: {problem}; what was complete before stays", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(shell.run(main, sys.argv, verbose=any(a in VERBOSE for a in sys.argv[1:])))
