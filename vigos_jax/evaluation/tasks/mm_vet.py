"""MM-Vet: open answers, in which `<OR>` separates alternatives and `<AND>` what all must be said."""

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Question, Task, ask_one
from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.answer_text import mentions
from vigos_jax.grading.rules import Verdict, grade


def grade_open(question: Question, answer: str | None, math: MathGrader | None) -> Verdict:
    """Right if the answer is one of the alternatives, or mentions every part of one. A judge is more accurate."""
    verdicts = []
    for alternative in question.reference.split("<OR>"):
        parts = [part.strip() for part in alternative.split("<AND>") if part.strip()]
        if len(parts) == 1:
            verdicts.append(grade(answer, parts[0], math=math))
        if parts and answer is not None and all(mentions(answer, part) for part in parts):
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
