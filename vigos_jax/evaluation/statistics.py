"""Metrics of graded answers: pass@k, avg@k with its interval, and format and length statistics. Pure functions."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.evaluation.tasks.task import Graded, Question, Task

BOOTSTRAPS = 2000
# What every task has; the rest of its numbers are its own.
COMMON = (
    *("questions", "samples", "unjudged", "pass", "avg", "avg_low", "avg_high", "avg_lenient", "format_valid"),
    *("truncated", "tokens", "errors", "groups"),
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A sampled answer and all that is known of it.

    Attributes:
      text: the completion, without prefill and end token.
      answer: the content of its last closed box, None without one.
      is_correct: None until a judge has decided.
      grader: which rule, or "judge".
      is_correct_leniently: the verdict if the answer may also be outside a box.
      tokens: length of the completion.
      is_valid: whether it has the requested format.
      is_truncated: whether it ends without an end token.
    """

    question: Question
    sample: int
    text: str
    answer: str | None
    is_correct: bool | None
    grader: str
    is_correct_leniently: bool | None
    tokens: int
    is_valid: bool
    is_truncated: bool


def interval(means: Sequence[float], *, seed: int) -> tuple[float, float] | tuple[None, None]:
    """95 % bootstrap interval, in percent, of the mean over questions; (None, None) without any."""
    values = np.asarray(means, np.float64)
    if len(values) < 2:
        return (100 * float(values.mean()), 100 * float(values.mean())) if len(values) else (None, None)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return 100 * float(low), 100 * float(high)


def per_question(answers: Sequence[Answer], *, leniently: bool = False) -> dict[str, list[bool]]:
    """The verdicts of each question's samples; questions and samples without one are left out."""
    out: dict[str, list[bool]] = defaultdict(list)
    for a in answers:
        verdict = a.is_correct_leniently if leniently else a.is_correct
        if verdict is not None:
            out[a.question.id].append(verdict)
    return out


def summarise(task: Task, answers: Sequence[Answer], *, seed: int) -> dict[str, Any]:
    """Percentages of one task.

    pass: questions with at least one correct sample; avg: mean over questions of the share of correct samples, with
    `avg_low` and `avg_high`; `avg_lenient`: avg if answers outside a box count; format_valid, truncated: shares of
    samples; tokens: mean length. `unjudged` counts samples without a verdict, which pass and avg exclude; a metric over
    nothing is None. The task's own metrics are added, and `groups` breaks avg down by category.
    """
    verdicts = per_question(answers)
    means = [float(np.mean(v)) for v in verdicts.values()]
    low, high = interval(means, seed=seed)
    lenient = [float(np.mean(v)) for v in per_question(answers, leniently=True).values()]
    groups: dict[str, list[float]] = defaultdict(list)
    names = {a.question.id: a.question.group for a in answers}
    for question, v in verdicts.items():
        groups[names[question]].append(float(np.mean(v)))
    out: dict[str, Any] = {
        "questions": len(verdicts),
        "samples": len(answers),
        "unjudged": sum(a.is_correct is None for a in answers),
        "pass": _percent([any(v) for v in verdicts.values()]),
        "avg": _percent(means),
        "avg_low": low,
        "avg_high": high,
        "avg_lenient": _percent(lenient),
        "format_valid": _percent([a.is_valid for a in answers]),
        "truncated": _percent([a.is_truncated for a in answers]),
        "tokens": float(np.mean([a.tokens for a in answers])) if answers else None,
    }
    out |= task.summarise([Graded(a.question, a.sample, a.is_correct) for a in answers])
    if len(groups) > 1:
        out["groups"] = {g: {"questions": len(m), "avg": _percent(m)} for g, m in sorted(groups.items())}
    return out


def _percent(values: Sequence[float]) -> float | None:
    return 100.0 * float(np.mean(values)) if values else None


def number_text(value: float | None, *, digits: int = 2) -> str:
    """A number of a table; "n/a" where it is over nothing."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def interval_text(numbers: Mapping[str, Any]) -> str:
    """The interval of avg as a table shows it."""
    low, high = numbers["avg_low"], numbers["avg_high"]
    return "n/a" if low is None else f"{low:.2f} - {high:.2f}"


def own_numbers(numbers: Mapping[str, Any]) -> dict[str, float | None]:
    """What the task adds to the numbers that all have."""
    return {k: v for k, v in numbers.items() if k not in COMMON and (v is None or isinstance(v, float))}


def why_nothing(numbers: Mapping[str, Any]) -> str | None:
    """Why a task has no average; None if it has one."""
    if numbers["avg"] is not None:
        return None
    return "n/a: no answer has a verdict yet" if numbers["samples"] else "n/a: no question was asked"
