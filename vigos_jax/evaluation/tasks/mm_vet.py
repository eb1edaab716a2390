"""MM-Vet: open answers; `<OR>` separates alternatives, `<AND>` parts that an answer must all contain."""

import re
from collections.abc import Sequence

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Question, Task, ask_one
from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.answer_text import mentions
from vigos_jax.grading.reading import read
from vigos_jax.grading.rules import Verdict, grade

_DIGITS = re.compile(r"[0-9]+(?:[.,][0-9]+)*")


def says_all(answer: str, parts: Sequence[str]) -> bool:
    """Whether the answer asserts every part: not as one of several alternatives, not negated, and no other number.

    False if a part is a yes or no, which the rules grade.
    """
    said = " ".join(answer.casefold().split())
    for part in parts:
        words = re.escape(" ".join(part.casefold().split()))
        is_doubted = re.search(rf"\b(?:or|not|either) (?:the |a |an )?{words}|{words}\W{{0,2}} or\b", said)
        if not mentions(answer, part) or is_doubted or read(part).kind == "yes_no":
            return False
    is_number = any(read(part).kind == "number" for part in parts)
    return not is_number or set(_DIGITS.findall(said)) <= set(_DIGITS.findall(" ".join(parts)))


def grade_open(question: Question, answer: str | None, math: MathGrader | None) -> Verdict:
    """Right if the answer is one of the alternatives, or mentions every part of one. A judge is more accurate."""
    verdicts = []
    for alternative in question.reference.split("<OR>"):
        parts = [part.strip() for part in alternative.split("<AND>") if part.strip()]
        if len(parts) == 1:
            verdicts.append(grade(answer, parts[0], math=math))
        if parts and answer is not None and says_all(answer, parts):
            verdicts.append(Verdict(True, "text"))
    right = [v for v in verdicts if v.is_correct]
    return right[0] if right else verdicts[0] if verdicts else Verdict(False, "text" if answer else "no_answer")


TASK = Task(
    "mm_vet",
    "MM-Vet",
    "zli12321/mm-vet",
    "test",
    218,
    (QUESTION, ANSWER, IMAGES),
    ask_one,
    grade=grade_open,
    judged=True,
)
