"""Grades an answer with the rule that applies: options, yes or no, numbers, words, text, then algebra.

Both texts are read once (`reading`); an answer with two meanings is wrong. Every verdict names its rule, so that a
results table can be checked answer by answer.
"""

import dataclasses
from collections.abc import Sequence

from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.choice import letter_set, named_option, same_letters
from vigos_jax.grading.expressions import is_mathematics, same_expression
from vigos_jax.grading.reading import Reading, agree, read, same_measure
from vigos_jax.grading.spelling import MAX_ANSWER_CHARS

GRADERS = ("no_answer", "option", "yes_no", "number", "word", "text", "math")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`grader` is one of GRADERS, the rule that decided."""

    is_correct: bool
    grader: str


def grade(
    prediction: str | None,
    reference: str,
    *,
    options: Sequence[str] = (),
    precision: int | None = None,
    math: MathGrader | None = None,
) -> Verdict:
    """Whether an extracted answer means the reference.

    Args:
      prediction: what the box holds; None without one.
      reference: the right answer; with options, its letter or its text.
      options: texts of options A, B, ... of a multiple-choice question.
      precision: decimals that numbers are rounded to before they are compared; None compares them exactly.
      math: decides about expressions, where nothing else does; None leaves them unequal.
    """
    ours = read(prediction or "")
    if not ours.text:
        return Verdict(False, "no_answer")
    theirs = read(reference)
    if options:
        return Verdict(_is_option(ours, theirs, options, math), "option")
    if theirs.kind == "letter":
        return Verdict(agree(ours, theirs), "option")
    if same_letters(ours, theirs):
        return Verdict(True, "option")
    if theirs.kind == "yes_no":
        return Verdict(agree(ours, theirs), "yes_no")
    is_number = theirs.kind == "number"
    if agree(ours, theirs):
        grader = "number" if is_number else "text" if ours.text == theirs.text else "word"
        return Verdict(True, grader)
    if is_number and ours.is_quantity:
        return Verdict(_same_rounded(ours, theirs, precision), "number")
    if (equal := _by_algebra(ours, theirs, math)) is not None:
        return Verdict(equal, "math")
    return Verdict(False, "number" if is_number else "text" if " " in reference.strip() else "word")


def _same_rounded(ours: Reading, theirs: Reading, precision: int | None) -> bool:
    if precision is None or ours.value is None or theirs.value is None:
        return False
    return same_measure(ours, theirs) and round(ours.value, precision) == round(theirs.value, precision)


def _by_algebra(ours: Reading, theirs: Reading, math: MathGrader | None) -> bool | None:
    if max(len(ours.body), len(theirs.body)) > MAX_ANSWER_CHARS or not is_mathematics(theirs):
        return None
    return same_expression(ours, theirs, math)


def _is_option(ours: Reading, theirs: Reading, options: Sequence[str], math: MathGrader | None) -> bool:
    texts = [read(option) for option in options]
    right = named_option(theirs, texts)
    if right is None:  # the reference names several options together, or is not an option
        letters = letter_set(theirs, texts)
        return agree(ours, theirs) or (letters is not None and letter_set(ours, texts) == letters)
    named = named_option(ours, texts)
    if named is not None:
        return named == right
    # The text of an option that stands there twice, or an expression in another form.
    if ours.text == texts[right].text:
        return True
    return not ours.letter and not ours.is_quantity and _by_algebra(ours, texts[right], math) is True
