"""WORKDIR/report.html: a run's curves, its config and its snapshots, drawn from the files the run writes."""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.config import flatten
from vigos_jax.demo.world import WORLDS
from vigos_jax.report.charts import SMOOTH_FROM, Chart, Line, Mark, number
from vigos_jax.report.page import PALETTE, Browser, Charts, Folded, Probe, Section, Shot, Table, Text, write_page
from vigos_jax.report.run_files import read_run
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.jsonl import parse_object

_SKIPPED, _ALERT = (190, 30, 30), (214, 150, 20)
MAX_SHOTS = 25  # of a row, evenly spread over the run: what a page holds does not grow with the run
_KEY = re.compile(rb'\{"key": "(\d+|row)/')  # what a line of report.jsonl begins with
_FULL_DIVERGENCE = 1.0  # nats from which a token's color is as strong as it gets
_RATES = {"valid_rate": "valid", "truncated_rate": "cut off"}
_RATES |= {"leak_rate": "answer in description"}
_LENGTHS = {"completion_tokens": "completion", **{f"length/{p}": p for p in ("description", "reasoning", "answer")}}
_PHASES = {f"seconds/{phase}": phase for phase in ("rollout", "pack", "update")}
_RESULTS = {
    "score": "Score",
    "prior": "Prior",
    "valid": "valid format",
    "description_accuracy": "descriptions all correct",
    "leak": "leak",
    "reasoning": "right where what is asked is described right",
}

Row = Mapping[str, Any]


def write_run_page(workdir: pathlib.Path) -> pathlib.Path:
    """Draws the page anew from config.json, metrics.jsonl, report.jsonl, eval.jsonl and results.json; returns where.

    Those that are not there are left out; equal files give an equal page.

    Raises:
      InputError: the config is not a run's, or a file cannot be read.
    """
    run = read_run(workdir)
    config, rows = run.config, run.rows
    records, snapshots = _shown_records(workdir / files.SNAPSHOTS)
    roles = [name for name, role in config["roles"].items() if role["weight"]]
    sections: list[Section] = [_summary(config, rows)]
    if run.results:
        sections.append(_results_table(run.results))
    sections += [*_curves(config, rows, run.evals, roles), *_browser(config, records, snapshots, roles)]
    fields = (f"{field} = {json.dumps(value, ensure_ascii=False)}" for field, value in flatten(config))
    sections.append(Folded("Config", "\n".join(fields)))
    write_page(workdir / files.PAGE, f"Run {workdir.absolute().name}", sections)
    return workdir / files.PAGE


def _shown_records(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """(records of report.jsonl: the questions and up to MAX_SHOTS snapshots; the number of all snapshots).

    Only lines that are shown are parsed: the file of a long run is too large to hold in memory.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        steps = sorted({int(key[1]) for line in file if (key := _KEY.match(line)) and key[1] != b"row"})
    last, most = len(steps) - 1, min(len(steps), MAX_SHOTS)
    shown = {b"%d" % steps[round(i * last / max(most - 1, 1))] for i in range(most)} | {b"row"}
    out = []
    with path.open("rb") as file:
        for line in file:
            if (key := _KEY.match(line)) and key[1] in shown:
                with contextlib.suppress(ValueError):  # torn: about to be written again
                    out.append(parse_object(line))
    return out, len(steps)


def _summary(config: Row, rows: Sequence[Row]) -> Text:
    done = rows[-1]["step"] or 0 if rows else 0
    lines = [
        f"Step {done} of {config['steps']}. Model {config['model']['path']}, data {config['data']['source']}, "
        f"batches of {config['batch_size']}, seed {config['seed']}."
    ]
    if done < config["steps"]:
        lines.append("The run continues: reload the page for later steps.")
    if rows:
        last = rows[-1]
        lines += [f"Unusable rows so far: {last['bad_rows']}."] if last.get("bad_rows") else []
        lines += [f"Steps that changed nothing: {last['skipped_steps']}."] if last.get("skipped_steps") else []
        lines += [f"Guards out of their bounds: {last['alerts']}."] if last.get("alerts") else []
    return Text(lines)


def _results_table(results: Row) -> Table:
    names = list(results)
    text = lambda rate: "n/a" if rate is None else f"{rate:.3f}"  # noqa: E731
    body = [[title, *(text(results[n].get(key)) for n in names)] for key, title in _RESULTS.items()]
    note = f"{results[names[0]].get('questions')} questions of each kind, one sample each at temperature 1, unfiltered."
    return Table("Before and after", ["on the demo", *names], body, note=note)


# -- curves -----------------------------------------------------------------------------------------------------


def _curves(config: Row, rows: Sequence[Row], evals: Sequence[Row], roles: Sequence[str]) -> list[Charts]:
    """What one looks for first: whether it learns, whether it is healthy, how fast it is."""
    per_role = lambda key: [_line(rows, f"{name}/{key}", name, i) for i, name in enumerate(roles)]  # noqa: E731
    listed = lambda names: [_line(rows, key, name, i) for i, (key, name) in enumerate(names.items())]  # noqa: E731
    one = lambda key, name: [_line(rows, key, name, 0)]  # noqa: E731
    accuracy = dataclasses.replace(_line(rows, "accuracy", "training rollouts", 0), has_noise=True)
    learning = [
        Chart(
            "Accuracy",
            [accuracy],
            "share of rollouts",
            "Rises where the student learns; the band is two standard errors around the moving mean.",
        ),
        _without_peaks(
            Chart(
                "Loss by role",
                per_role("loss"),
                "nats per token",
                "How far the student is from each teacher. A role with few tokens in a step is noisy.",
            )
        ),
        Chart(
            "Format and leak",
            listed(_RATES),
            "share of rollouts",
            "Valid should stay near 1, cut off near 0. A description may hold the answer by right.",
        ),
        *_benchmarks(evals),
    ]
    clips = any(config["roles"][name]["clip"] for name in roles)
    healthy = [
        Chart(
            "Entropy",
            one("entropy", "student"),
            "nats per token",
            "Towards 0 the student says one thing only; a rise without end is a policy that falls apart.",
        ),
        Chart("Length", listed(_LENGTHS), "tokens", "Of whole completions, and of the parts of valid ones."),
        *([_clipped(per_role("clipped_fraction"))] if clips else []),
        _without_peaks(
            Chart("Gradient norm", one("grad_norm", "before the clip"), "norm", "Peaks are steps of unusual rollouts.")
        ),
        Chart(
            "Share of the gradient",
            per_role("grad_share"),
            "share",
            "Which role moves the student, by norms at the last hidden states.",
        ),
        _without_peaks(
            Chart(
                "Sampler gap",
                one("sampler_logp_gap", "sampler and scorer"),
                "nats per token",
                "Between the probabilities of who samples and who trains, for the same tokens: near 0.",
            )
        ),
        *_staleness(rows),
    ]
    phases = [line for line in listed(_PHASES) if any(y is not None for _, y in line.points)]
    quiet = [r for r in rows if not r.get("compilations")] or rows
    top = max((sum(r.get(k) or 0.0 for k in _PHASES) for r in quiet), default=None)
    # Without those that compile: they take many times as long.
    speed = _line(quiet, "tokens_per_second", "completion tokens", 0)
    fast = [
        Chart(
            "Step time", phases, "seconds", "What a step waits for.", "Steps that compile are cut off.", stacked=True,
            top=top or None,
        ),
        Chart("Speed", [speed], "tokens per second", "Without steps that compile."),
    ]  # fmt: skip
    marks, out = _marks(rows), []
    for title, charts in (("Is it learning?", learning), ("Is it healthy?", healthy), ("How fast is it?", fast)):
        drawn = [
            dataclasses.replace(chart, marks=marks) for chart in charts if any(line.points for line in chart.lines)
        ]
        if drawn:
            out.append(Charts(title, drawn, note="" if out else _how_to_read(rows, marks)))
    return out


def _clipped(lines: Sequence[Line]) -> Chart:
    reading = "Tokens at the clip teach nothing; near 1 nearly all of the signal is cut off."
    return Chart("Clipped", lines, "share of a role's tokens", reading)


def _staleness(rows: Sequence[Row]) -> list[Chart]:
    """How old the sampling weights were, where inference servers ran ahead."""
    if not any(row.get("rollout_staleness") for row in rows):
        return []
    line = _line(rows, "rollout_staleness", "rollouts", 0)
    return [Chart("Staleness", [line], "optimizer steps", "By how many steps the weights that sampled were behind.")]


def _how_to_read(rows: Sequence[Row], marks: Sequence[Mark]) -> str:
    pale = (
        "Pale: every step, or a few of a long run at a time. Strong: the mean of a twentieth of the run. "
        if len(rows) >= SMOOTH_FROM
        else ""
    )
    said = {mark.color: mark.text.split(":")[0] for mark in marks}
    names = {_SKIPPED: "red", _ALERT: "amber"}
    dashed = f"Dashed: {', '.join(f'{names[color]}, {text}' for color, text in sorted(said.items()))}. " if said else ""
    return f"{pale}{dashed}Point at a chart, or move through it with the arrow keys, for the numbers of a step."


def _without_peaks(chart: Chart) -> Chart:
    """Cuts off rare peaks, such as those of a role that scores a single invalid rollout in a step."""
    values = sorted(y for line in chart.lines for _, y in line.points if y is not None)
    top = 1.5 * values[int(0.97 * (len(values) - 1))] if values else 0.0
    if not top or values[-1] <= 2 * top:
        return chart
    return dataclasses.replace(chart, top=top, note=f"Cut off above; the largest is {number(values[-1])}.")


def _line(rows: Sequence[Row], key: str, name: str, color: int) -> Line:
    points = [(float(row["step"]), row.get(key)) for row in rows]
    is_there = any(y is not None for _, y in points)
    return Line(name, points if is_there else [], PALETTE[color % len(PALETTE)])


def _benchmarks(evals: Sequence[Row]) -> list[Chart]:
    """One chart of all tasks' averages, and Score and Prior of the demo's worlds."""
    keys = sorted({key for row in evals for key in row if key.endswith("/avg")})
    rates = {"score": "Score", "prior": "Prior"}
    demo = {f"{world}/{key}": f"{name}, {world}" for world in WORLDS for key, name in rates.items()}
    out = []
    for title, names in (
        ("Benchmarks", {key: key.removesuffix("/avg") for key in keys}),
        ("Demo", {key: name for key, name in demo.items() if any(key in row for row in evals)}),
    ):
        if names:
            lines = [_line(evals, key, name, i) for i, (key, name) in enumerate(names.items())]
            reading = "On held-out questions, as config.eval asks them."
            out.append(Chart(title, lines, "percent right", reading))
    return out


def _marks(rows: Sequence[Row]) -> list[Mark]:
    out, before = [], 0
    for row in rows:
        if row.get("skipped"):
            out.append(Mark(row["step"], _SKIPPED, f"a step that changed nothing: {row['step']}"))
        if (row.get("alerts") or 0) > before:
            out.append(Mark(row["step"], _ALERT, f"a guard out of its bounds: from step {row['step']}"))
        before = row.get("alerts") or 0
    return out


# -- snapshots --------------------------------------------------------------------------------------------------


def _browser(config: Row, records: Sequence[Row], snapshots: int, roles: Sequence[str]) -> list[Browser]:
    by_key = {record["key"]: record for record in records}
    asked = sorted((r for r in records if r["key"].startswith("row/")), key=lambda r: r["row"])
    steps = sorted({r["step"] for r in records if "step" in r})
    if not asked or not steps:
        return []
    probes = []
    for row in asked:
        shots = [_shot(by_key.get(f"{step}/{row['row']}"), roles) for step in steps]
        title = f"{row['id']} · reference {row['reference']!r}"
        if row["bad_reason"]:
            title = f"{row['id']} · a row that cannot be used: {row['bad_reason']}"
        probes.append(Probe(title, row["problem"], row["picture"], shots))
    is_demo = config["data"]["source"] in WORLDS
    what = "states what one expects, not what is shown" if is_demo else "contains the final answer"
    note = (
        f"{len(probes)} rows, sampled as in training, with the same random keys at every step. Underlined: scored, by "
        "the role of this color; the stronger the tint, the larger the divergence of the teacher from the student. "
        f"Hover for numbers. Leaky: the description {what}."
    )
    if snapshots > len(steps):
        note += f" {len(steps)} of {snapshots} snapshots; report.jsonl has all."
    colors = [(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(roles)]
    start = "start" if config["model"]["adapter"] else "base"
    first = f"step 0, {start}" if steps[0] == 0 else f"step {steps[0]}"
    return [Browser("What does it say?", note, colors, steps, probes, first)]


def _shot(record: Row | None, roles: Sequence[str]) -> Shot | None:
    if record is None or "tokens" not in record:
        return None
    tags = ["valid" if record["is_valid"] else "invalid", "right" if record["is_correct"] else "wrong"]
    tags += ["leaky"] if record["is_leaky"] else []
    kls = [kl for kl in record["kl"] if kl is not None]
    said = [] if record["is_valid"] else [str(record["invalid_reason"]).replace("_", " ")]
    said += [f"mean KL {sum(kls) / len(kls):.3g}"] if kls else []
    places = {name: i for i, name in enumerate(roles)}
    return Shot(
        tags=tags,
        note=", ".join(said),
        tokens=record["tokens"],
        roles=[places.get(name, -1) for name in record["role"]],
        strengths=[_strength(kl) for kl in record["kl"]],
        hovers=[_hover(*x) for x in zip(*(record[k] for k in ("kl", "student_logp", "teacher_logp")), strict=True)],
    )


def _strength(divergence: float | None) -> float:
    """Square root: most divergences are small, and still to be seen."""
    return 0.0 if divergence is None else round(0.7 * math.sqrt(min(max(divergence / _FULL_DIVERGENCE, 0.0), 1.0)), 3)


def _hover(divergence: float | None, student: float | None, teacher: float | None) -> str:
    if divergence is None:
        return ""
    chances = ["-" if p is None else f"{math.exp(p):.2g}" for p in (student, teacher)]
    return "divergence {:.3g}, probability {} by student, {} by teacher".format(divergence, *chances)
