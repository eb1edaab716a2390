"""The demo's evaluation: does the model look, or does it answer what one expects?"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vigos_jax.demo import world as worlds
from vigos_jax.demo.scenes import is_description_correct
from vigos_jax.evaluation.statistics import number_text
from vigos_jax.grading.answer_text import last_boxed
from vigos_jax.grading.rules import grade
from vigos_jax.method.rows import Row, make_row
from vigos_jax.method.spans import Spans, find_spans
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import Engine, EngineFactory, EngineFailed, NativeEngine
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime.progress import bar
from vigos_jax.session import Session

# What `summarise` gives, in the order of the printed table.
COLUMNS = {
    "score": "Score: accuracy on conflict images",
    "prior": "Prior: accuracy on images that agree",
    "valid": "valid format",
    "accuracy_given_valid": "accuracy given valid (conflict)",
    "description_accuracy": "descriptions all correct (conflict)",
    "leak": "leak: descriptions stating the prior (conflict)",
    "reasoning": "accuracy given what was asked is described right",
    "boxed_in_invalid": "invalid, yet with a box",
}
LEGEND = """\
base: the model before the run; trained: after it. {questions} questions of each kind, one sample each.
At temperature 1 nothing is filtered; training samples by config.sampling. Conflict images contradict what one expects,
the others agree with it. Up is better, for the leak down."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question with one sampled completion (text after the prefill)."""

    item: worlds.Item
    text: str
    description: str
    spans: Spans

    @property
    def is_correct(self) -> bool:
        """Whether its last box holds the answer."""
        return grade(last_boxed(self.text), self.item.answer).is_correct


def _rows(session: Session, items: list[worlds.Item], student: dict[str, str]) -> list[Row]:
    return [
        make_row(
            (session.processor.encode_image(item.pil_image),),
            problem=item.question,
            student=student,
            processor=session.processor,
        )
        for item in items
    ]


def answer_items(
    engine: Engine, session: Session, items: list[worlds.Item], rows: list[Row], options, *, title: str
) -> list[Answered]:
    """Samples one completion per item with the engine's student.

    Args:
      rows: the items as the student reads them.
      options: `config.demo_eval`.
    """
    size = session.whole_batch(options.batch_size)
    out = []
    for first in bar(range(0, len(items), size), title=title):
        keys = row_keys(options.seed, first, size)
        sampled = sample_rows(engine, session, rows[first : first + size], keys)
        if reason := next(filter(None, sampled.failed), None):  # an empty answer would count as a wrong one
            raise EngineFailed(f"an answer could not be sampled: {reason}")
        for ids, item in zip(sampled.ids, items[first : first + size], strict=True):
            spans = find_spans(session.processor.token_bytes(ids), rule=session.span_rule)
            text = session.processor.decode([i for i in ids if i not in session.processor.eos_ids])
            out.append(Answered(item, text, session.processor.decode(ids[slice(*spans.description)]), spans))
    return out


def summarise(conflict: list[Answered], prior: list[Answered]) -> dict[str, float | None]:
    """Rates in 0..1 as in COLUMNS; None over no answers. The answer is the last closed box; without one it is wrong."""
    valid = [a for a in conflict if a.spans.is_valid]
    invalid = [a for a in conflict + prior if not a.spans.is_valid]

    def rate(of: list[bool]) -> float | None:
        return float(np.mean(of)) if of else None

    return {
        "score": rate([a.is_correct for a in conflict]),
        "prior": rate([a.is_correct for a in prior]),
        "valid": rate([a.spans.is_valid for a in conflict + prior]),
        "accuracy_given_valid": rate([a.is_correct for a in valid]),
        "description_accuracy": rate([is_description_correct(a.description, a.item.scene) for a in valid]),
        "leak": rate([worlds.description_states_prior(a.description, a.item) for a in valid]),
        "reasoning": rate([a.is_correct for a in valid if worlds.description_states_truth(a.description, a.item)]),
        "boxed_in_invalid": rate([last_boxed(a.text) is not None for a in invalid]),
    }


def evaluate_demo(
    session: Session,
    students: Mapping[str, Variables],
    config,
    *,
    sampling: Sampling,
    open_engine: EngineFactory = NativeEngine,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Answered]]]:
    """Evaluates each student on the same held-out items, unfiltered at temperature 1 and with the run's own sampling.

    Args:
      students: trained weights by name; `{}` is the base.

    Returns:
      Per student: `summarise` of the unfiltered samples, with the other one under "training_sampling"; and the
      unfiltered answers to the conflict items.
    """
    n, seed = config.demo_eval.questions, config.demo_eval.seed
    # Training data is the setting "train": the settings' items are disjoint streams.
    settings, world = ("conflict", "prior"), config.data.source
    items = [worlds.item(seed, i, setting=setting, world=world) for setting in settings for i in range(n)]
    rows = _rows(session, items, config.prompts.student.to_dict())
    samplings = {
        "unfiltered": Sampling(max_tokens=sampling.max_tokens, temperature=1.0),
        "training_sampling": sampling,
    }
    summaries: dict[str, dict[str, Any]] = {name: {"questions": n} for name in students}
    conflict: dict[str, list[Answered]] = {}
    for kind, how in samplings.items():
        with contextlib.closing(open_engine(session, how)) as engine:  # compiled once for all students
            for name, trained in students.items():
                engine.sync(trained)
                title = f"evaluate {name}, {kind.replace('_', ' ')}"
                answers = answer_items(engine, session, items, rows, config.demo_eval, title=title)
                rates = summarise(answers[:n], answers[n:])
                if kind == "unfiltered":
                    summaries[name] |= rates
                    conflict[name] = answers[:n]
                else:
                    summaries[name][kind] = rates
    return summaries, conflict


def table_text(results: dict[str, dict[str, Any]]) -> str:
    """The table base vs trained, a line per rate."""
    base, trained = results["base"], results["trained"]
    head = f"{'':50}{'at temperature 1':>24}{'sampled as in training':>26}"
    lines = [head, f"{'':50}{'base':>12}{'trained':>12}{'base':>14}{'trained':>12}"]
    for key, title in COLUMNS.items():
        rates = (base[key], trained[key], base["training_sampling"][key], trained["training_sampling"][key])
        texts = [number_text(rate, digits=3) for rate in rates]
        lines.append(title.ljust(50) + "".join(f"{t:>{w}}" for t, w in zip(texts, (12, 12, 14, 12), strict=True)))
    lines.append(LEGEND.format(questions=base["questions"]))
    return "\n".join(lines)


def samples_text(base: list[Answered], trained: list[Answered], *, count: int = 3) -> str:
    """The same questions answered by base and trained: first those that the two answer differently."""
    pairs = sorted(zip(base, trained, strict=True), key=lambda p: p[0].is_correct == p[1].is_correct)
    lines = []
    for old, new in pairs[:count]:
        lines.append(f"Q  {old.item.question}   (shown: {old.item.answer}, expected: {old.item.prior_value})")
        for name, answered in (("base", old), ("trained", new)):
            mark = "right" if answered.is_correct else "wrong"
            lines.append(f"   {name:8}{mark:7}{' '.join(answered.text.split())}")
    return "\n".join(lines)
