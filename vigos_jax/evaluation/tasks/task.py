"""What a benchmark is to this program: rows of a source, the questions they ask, and how answers are summed up."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.data.cleaning import clean_problem
from vigos_jax.data.markers import MarkerMismatch, numbers_as_words
from vigos_jax.data.references import reference_of, with_options
from vigos_jax.errors import InputError
from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.options import LETTERS, first_number, parse_options
from vigos_jax.grading.rules import Verdict, grade

_NUMBERED_IMAGE = re.compile(r"image_?([0-9]+)")
MAX_PRECISION = 12  # decimals; no answer has more


@dataclasses.dataclass(frozen=True)
class Question:
    """One question as it is asked, and what is known of its answer.

    Attributes:
      id: unique inside its task.
      images: undecoded images, as `images.read_image` takes them.
      text: what the user asks, options written out; the prompt mode's format follows it.
      reference: the right answer; with options, a letter or a text.
      alternatives: further references, each as right as the first.
      is_index: whether the row gives its answer as a number that counts its options.
      options: texts of options A, B, ...
      precision: decimals of a number; None for exact.
      group: category, for the breakdown.
      part: its role in the row, where a row asks several questions: which image, which stage.
      row: number of the row it comes from.
      error: why it cannot be asked, None if it can.
    """

    id: str
    images: tuple[Any, ...]
    text: str
    reference: str
    options: tuple[str, ...] = ()
    precision: int | None = None
    group: str = ""
    part: str = ""
    row: int = 0
    error: str | None = None
    alternatives: tuple[str, ...] = ()
    is_index: bool = False

    @property
    def accepted(self) -> str:
        """All references, to be shown."""
        return " or ".join((self.reference, *self.alternatives))


@dataclasses.dataclass(frozen=True)
class Graded:
    """A sampled answer with its verdict; `is_correct` is None until the judge has decided."""

    question: Question
    sample: int
    is_correct: bool | None


def grade_by_rules(question: Question, answer: str | None, math: MathGrader | None) -> Verdict:
    """The router's verdict: right by any of the references, else the first one's."""
    verdicts = []
    for reference in (question.reference, *question.alternatives):
        verdicts.append(grade(answer, reference, options=question.options, precision=question.precision, math=math))
        if verdicts[-1].is_correct:
            return verdicts[-1]
    return verdicts[0]


def accuracy(graded: Sequence[Graded]) -> dict[str, float | None]:
    """Nothing beyond pass@k and avg@k, which every task has."""
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: as in `config.eval.tasks`.
      title: as in the paper's tables.
      source: hub data set, unless the config names another or a folder of parquet.
      split: the split of `source`.
      rows: the published number of rows; a mismatch is reported.
      columns: required columns; one of each group is enough.
      ask: (row, row number) -> its questions.
      summarise: all graded answers -> further metrics in percent, by name.
      grade: (question, extracted answer or None, math) -> verdict.
      samples: answers per question if the protocol fixes their number; None for the config's.
      judged: whether the official protocol asks a judge; a rule's verdict is then a lower bound.
    """

    name: str
    title: str
    source: str
    split: str
    rows: int | None
    columns: tuple[tuple[str, ...], ...]
    ask: Callable[[Mapping[str, Any], int], list[Question]]
    summarise: Callable[[Sequence[Graded]], dict[str, float | None]] = accuracy
    grade: Callable[[Question, str | None, MathGrader | None], Verdict] = grade_by_rules
    samples: int | None = None
    judged: bool = False

    def check_columns(self, columns: Sequence[str], *, where: str) -> None:
        """Raises InputError unless every group of `columns` has one; image columns may be numbered."""
        has = set(columns) | ({"image_1"} if any(_NUMBERED_IMAGE.fullmatch(c) for c in columns) else set())
        missing = [" or ".join(group) for group in self.columns if not has & set(group)]
        if missing:
            raise InputError(
                f"{where} is not a source for {self.name}: it lacks {', '.join(missing)}; "
                f"it has the columns {', '.join(columns)}"
            )


QUESTION, ANSWER, IMAGES = ("problem", "question"), ("answer",), ("images", "image", "image_1")


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these columns that holds something."""
    return next((row[n] for n in names if row.get(n) is not None), None)


def images_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """All images of a row: `images` (one or a list), `image`, or image_1 .. image_n in order.

    Empty numbered columns are skipped; an empty list entry stays, as an image that cannot be read.
    """
    found = first(row, ("images", "image"))
    if found is None:
        numbered = {int(m[1]): row[c] for c in row if (m := _NUMBERED_IMAGE.fullmatch(c))}
        return tuple(numbered[n] for n in sorted(numbered) if numbered[n] is not None)
    return tuple(found) if isinstance(found, list | tuple | np.ndarray) else (found,)


def _raw_options(row: Mapping[str, Any]) -> Any:
    return first(row, ("options", "choices"))


def options_of(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """A row's options, as `parse_options` reads them: () without any, None if they are not understood."""
    texts = parse_options(_raw_options(row))
    return None if texts is None else tuple(plain_text(text) for text in texts)


def plain_text(value: Any) -> str:
    """A text without image placeholders: `<image>` goes, `<image 2>` becomes "image 2"; "" for what is not text."""
    if not isinstance(value, str):
        return ""
    return numbers_as_words(value)


def precision_of(row: Mapping[str, Any]) -> int | None:
    """A row's number of decimals, where it is one that an answer can have."""
    value = row.get("precision")
    is_good = isinstance(value, int | float) and 0 <= value <= MAX_PRECISION  # not for NaN
    return int(value) if is_good else None


def fault(text: str, answer: str, images: Sequence[Any], options: Sequence[str] = ()) -> str | None:
    """Why a question with these parts cannot be asked, None if it can."""
    for kind, is_so in (
        ("empty_problem", not text),
        ("empty_answer", not answer),
        ("no_image", not images),
        ("too_many_options", len(options) > len(LETTERS)),
    ):
        if is_so:
            return kind
    return None


def ask_one(row: Mapping[str, Any], index: int) -> list[Question]:
    """The usual row: one question with its images, its options and its answer."""
    images, options = images_of(row), options_of(row)
    answer, mismatch = reference_of(row.get("answer"), options or (), first=first_number(_raw_options(row))), None
    try:
        text = clean_problem(first(row, QUESTION), images=len(images))
    except MarkerMismatch:
        text, mismatch = plain_text(first(row, QUESTION)), "image_markers"
    error = fault(text, answer.texts[0], images, options or ()) or mismatch
    return [
        Question(
            id=str(next(v for v in (row.get("id"), row.get("idx"), row.get("pid"), index) if v is not None)),
            images=images,
            text=with_options(text, options or ()),
            reference=answer.texts[0],
            alternatives=answer.texts[1:],
            is_index=answer.is_index,
            options=options or (),
            precision=precision_of(row),
            group=str(first(row, ("category", "type", "subject", "problem_version", "task", "question_type")) or ""),
            row=index,
            error=error or ("bad_options" if options is None else answer.error),
        )
    ]


def rate(answers: Sequence[Graded]) -> float | None:
    """Percent right of those with a verdict; None of none."""
    known = [g.is_correct for g in answers if g.is_correct is not None]
    return 100.0 * float(np.mean(known)) if known else None


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of numbers; None if there are none, or one of them is None."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
