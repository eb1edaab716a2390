"""report.md and report.html of an evaluation: our numbers beside the published ones, and answers to look through."""

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.data.images import BadImage, read_image
from vigos_jax.evaluation.benchmark import Evaluation, TaskResult, output_of, table_text
from vigos_jax.evaluation.statistics import Answer, interval_text, number_text, own_numbers, why_nothing
from vigos_jax.evaluation.tasks.task import mean
from vigos_jax.grading.braces import closing_brace
from vigos_jax.models.variables import Variables
from vigos_jax.report.page import PALETTE, Rollout, Table, Text, Token, image_uri, write_page
from vigos_jax.rollouts.engine import EngineFactory, NativeEngine
from vigos_jax.runtime.files import write_json
from vigos_jax.session import Session

SHOWN_PER_TASK = 24
_LEGEND = "Description blue, reasoning orange, box green."
EIGHT = (
    *("mm_vet", "mmmu", "mmmu_pro", "mmmu_pro_vision"),
    *("mathverse", "mathvista", "mmsi", "realworldqa"),
)
# As the paper reports them. Columns: mean Pass@5 and Avg@5 of EIGHT, then Score and Prior of ViLP-F and ViLP-P.
PUBLISHED = {
    "3B base": (60.86, 27.91, 59.50, 93.33, 55.67, 80.67),
    "3B OPSD": (72.08, 41.13, 67.17, 97.33, 66.83, 92.00),
    "3B ViGOS": (71.97, 41.35, 70.17, 97.67, 69.50, 90.00),
    "7B base": (68.13, 45.38, 42.00, 73.33, 37.00, 58.67),
    "7B OPSD": (74.11, 51.12, 58.00, 97.67, 57.00, 91.67),
    "7B ViGOS": (75.60, 50.99, 62.67, 97.00, 61.67, 91.67),
}
_PARTS = (  # in the order of a response: what ends a part, and its color
    ("</description>", PALETTE[0]),
    ("</think>", PALETTE[1]),
)
_ANSWER_COLOR = PALETTE[2]
_BOX = "\\boxed{"


def evaluate(
    session: Session,
    trained: Variables,
    config,
    *,
    workdir: pathlib.Path | None,
    step: int,
    open_engine: EngineFactory = NativeEngine,
) -> tuple[str, bool]:
    """Evaluates a student on `config.eval.tasks` and writes results.json and the report.

    Args:
      workdir, step: the run and the checkpoint that `trained` comes from; None and 0 for the config's own model.

    Returns:
      (the table for a terminal, whether every question was asked and every answer judged).

    Raises:
      InputError: as `Evaluation`, or nowhere to write.
    """
    output = output_of(config, workdir)
    with contextlib.closing(Evaluation(session, config, open_engine=open_engine)) as evaluation:
        results = evaluation.run(trained, output=output)
    write_json(
        output / "results.json", {r.task.name: r.numbers | {"source": r.source, "notes": r.notes} for r in results}
    )
    name = session.name if workdir is None else f"{workdir} (step {step}, from {session.name})"
    write_report(results, output=output, name=name, protocol=protocol_text(config.eval))
    is_complete = not any(r.errors or r.numbers["unjudged"] for r in results)
    return f"{table_text(results)}\n{output / 'report.html'}", is_complete


def coloured(text: str) -> list[Token]:
    """A response in pieces: description, reasoning and box coloured, as far as they are there."""
    tokens, rest = [], text
    for tag, color in _PARTS:
        before, found, after = rest.partition(tag)
        if found:
            tokens.append(Token(before + found, color, 0.25))
            rest = after
    start = rest.rfind(_BOX)
    if start < 0:
        return [*tokens, Token(rest)]
    close = closing_brace(rest, start + len(_BOX))
    end = len(rest) if close is None else close + 1
    return [*tokens, Token(rest[:start]), Token(rest[start:end], _ANSWER_COLOR, 0.35), Token(rest[end:])]


def published_table(results: Sequence[TaskResult], *, name: str) -> Table | None:
    """The paper's rows, and ours; None if none of its tasks was run."""
    numbers = {r.task.name: r.numbers for r in results}

    is_whole = all(t in numbers for t in EIGHT)
    ours = [mean([numbers[t][key] for t in EIGHT]) if is_whole else None for key in ("pass", "avg")]
    for task in ("vilp_f", "vilp_p"):
        ours += [numbers.get(task, {}).get(key) for key in ("score", "prior")]
    if all(value is None for value in ours):
        return None
    rows = [[f"published, {label}", *map(number_text, row)] for label, row in PUBLISHED.items()]
    head = ["", "8 tasks, pass@k", "8 tasks, avg@k", "ViLP-F Score", "ViLP-F Prior", "ViLP-P Score", "ViLP-P Prior"]
    note = "Published: the paper's own numbers, with k = 5. The mean over eight tasks is given when all eight were run."
    return Table("Beside the paper", head, [*rows, [name, *map(number_text, ours)]], note)


def task_table(results: Sequence[TaskResult]) -> Table:
    """A row per task."""
    head = ["task", "questions", "pass@k", "avg@k", "95 % interval", "lenient", "valid", "truncated", "tokens"]
    rows = []
    for r in results:
        n = r.numbers
        cells = [number_text(n[k]) for k in ("avg_lenient", "format_valid", "truncated")]
        first = [r.task.title, str(n["questions"]), number_text(n["pass"]), number_text(n["avg"]), interval_text(n)]
        rows.append([*first, *cells, number_text(n["tokens"], digits=0)])
    note = "Percent. An answer is the last closed box, leniently also one outside a box. Bootstrap over questions."
    return Table("Tasks", head, rows, note)


def detail_tables(results: Sequence[TaskResult]) -> list[Table]:
    """What a task has beyond the common numbers, and its categories."""
    tables = []
    for r in results:
        own = own_numbers(r.numbers)
        if own:
            tables.append(Table(r.task.title, list(own), [[number_text(v) for v in own.values()]]))
        groups = r.numbers.get("groups", {})
        if groups:
            rows = [[name or "none", str(g["questions"]), number_text(g["avg"])] for name, g in groups.items()]
            tables.append(Table(f"{r.task.title} by category", ["category", "questions", "avg@k"], rows))
    return tables


def _remarks(results: Sequence[TaskResult]) -> list[str]:
    lines = []
    for r in results:
        lines += [f"{r.task.title}: {note}" for note in r.notes]
        lines += [f"{r.task.title}: {reason}"] if (reason := why_nothing(r.numbers)) else []
        if r.errors:
            kinds = sorted({reason for _, reason in r.errors})
            lines.append(f"{r.task.title}: {len(r.errors)} question(s) could not be asked ({', '.join(kinds)})")
        if r.numbers["unjudged"]:
            lines.append(f"{r.task.title}: {r.numbers['unjudged']} answer(s) are still to be judged, and in no number")
        if r.task.judged and not any(a.grader == "judge" for a in r.answers):
            lines.append(f"{r.task.title}: the official protocol asks a judge; graded by rules, this is a lower bound")
    return lines


def markdown(tables: Sequence[Table], remarks: Sequence[str], *, name: str) -> str:
    """The same tables as text; a pipe or a line break in a cell cannot break them."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    lines = [f"# Evaluation of {cell(name)}", ""]
    for table in tables:
        lines += [f"## {cell(table.title)}", "", "| " + " | ".join(map(cell, table.head)) + " |"]
        lines += ["|" + "---|" * len(table.head)]
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows] + [""]
        lines += [cell(table.note), ""] if table.note else []
    return "\n".join(lines + [f"- {cell(remark)}" for remark in remarks]) + "\n"


def _shown(answers: Sequence[Answer]) -> list[Answer]:
    """First samples only, wrong ones and then right ones, as many as are shown of a task."""
    firsts = [a for a in answers if a.sample == 0]
    wrong, right = [a for a in firsts if not a.is_correct], [a for a in firsts if a.is_correct]
    half = SHOWN_PER_TASK // 2
    take = max(half, SHOWN_PER_TASK - len(right))
    return [*wrong[:take], *right[: SHOWN_PER_TASK - len(wrong[:take])]]


def _answers(result: TaskResult) -> list[Text | Rollout]:
    """What is shown of a task's answers, under a heading."""
    shown = _shown(result.answers)
    legend = f"{len(shown)} of {len(result.answers)} answers: first samples, wrong ones first. "
    out: list[Text | Rollout] = [Text([legend + _LEGEND], f"{result.task.title}: answers")]
    for a in shown:
        mark = {True: "right", False: "wrong", None: ""}[a.is_correct]
        said = f"by {a.grader}" if a.is_correct is not None else "still to be judged"
        place = a.question.id if a.question.part in a.question.id else f"{a.question.id} ({a.question.part})"
        answer = "no box" if a.answer is None else f"box {a.answer!r}"
        title = f"{said}; {answer}, reference {a.question.accepted!r}; question {place}"
        images = []
        for item in a.question.images:
            with contextlib.suppress(BadImage):
                images.append(image_uri(read_image(item, image_roots=result.image_roots)))
        out.append(Rollout(title, a.question.text, coloured(a.text), images, mark))
    return out


def protocol_text(settings: Mapping[str, Any]) -> str:
    """How answers were sampled, in words."""
    greedy = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, top-k {settings['top_k']}"
    greedy = greedy if settings["temperature"] else "greedy"
    samples = f"{settings['samples'] if settings['temperature'] else 1} sample(s) a question, one for ViLP and VLind"
    rows = f"{settings['limit']} rows a task" if settings["limit"] else "all rows"
    limits = f"at most {settings['max_tokens']} tokens, seed {settings['seed']}, {settings['prompt']} prompt, {rows}"
    return f"Protocol: {samples}; {greedy}, {limits}."


def write_report(results: Sequence[TaskResult], *, output: pathlib.Path, name: str, protocol: str) -> None:
    """Writes report.md and report.html into `output`.

    Args:
      name: of what was evaluated.
      protocol: how, a line for the head.
    """
    published = published_table(results, name=name)
    tables = [*([published] if published else []), task_table(results), *detail_tables(results)]
    remarks = _remarks(results)
    text = markdown(tables, [protocol, *remarks], name=name)
    (output / "report.md").write_text(text, encoding="utf-8", errors="replace")
    answers = [section for result in results for section in _answers(result)]
    write_page(output / "report.html", f"Evaluation of {name}", [Text([protocol, *remarks]), *tables, *answers])
