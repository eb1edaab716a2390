r"""The answer in a model's text: the last box, its normal form and kind, and whether a text tells it.

Everything here takes text that a model wrote, so nothing is evaluated, no number is parsed without a bound on
its digits, and every pattern is linear: a hostile answer costs as little as an honest one.
"""

import re

from vigos_jax.grading.braces import closing_brace
from vigos_jax.grading.reading import ORDINAL, read

_BOX_OPEN = "\\boxed{"
_NUMBER_BEFORE = re.compile(r"(?:[0-9][.,/]|(?<!\w)[-−])$")  # what makes the digits after it part of a number
_NUMBER_AFTER = re.compile(r"[.,/][0-9]")


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last `\boxed{...}` of `text` that is closed; None without one.

    Plain brace counting, as in training. Of nested boxes the inner one, which opens last, is taken.
    """
    # A box that closes does so before the next one opens, unless that one closes too and is the later box.
    for piece in reversed(text.split(_BOX_OPEN)[1:]):
        end = closing_brace(piece, 0)
        if end is not None:
            return piece[:end].strip()
    return None


def normalize_answer(text: str) -> str:
    r"""Equal answers in one spelling: "(B)", "B." -> "b"; "$1,200.0$" -> "1200"; "\frac12", "½" -> "1/2".

    A number is an exact reduced fraction with its unit. The empty string means that nothing was said.
    """
    return read(text).text


def answer_kind(answer: str) -> str:
    """How an answer looks: "letter", "yes_no", "integer", "number" or "text"; "" if it says nothing.

    A number in words, or one with what it counts, is a text.
    """
    reading = read(answer)
    if reading.kind in ("", "letter"):
        return reading.kind
    if reading.text in ("yes", "no", "true", "false"):
        return "yes_no"
    is_number = reading.is_quantity and not (reading.name or reading.noun or reading.unit == ORDINAL)
    if not is_number or reading.value is None or not any(c.isdigit() for c in reading.body):
        return "text"
    return "integer" if reading.value.denominator == 1 else "number"


def mentions(text: str, answer: str) -> bool | None:
    """Whether `text` contains the answer's words, whole and in order; None for a lone letter, which proves nothing.

    A number inside another ("12" in "12.5", "-12", "1/12" or "1,200") is not mentioned.
    """
    words, text = " ".join(answer.casefold().split()), " ".join(text.casefold().split())
    if not words or answer_kind(answer) == "letter":
        return None
    start = text.find(words)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(words) : start + len(words) + 1]
        inside_word = (before.isalnum() and words[0].isalnum()) or (after.isalnum() and words[-1].isalnum())
        end = start + len(words)
        inside_number = (words[0].isdigit() and _NUMBER_BEFORE.search(text[max(0, start - 2) : start])) or (
            words[-1].isdigit() and _NUMBER_AFTER.match(text[end : end + 2])
        )
        if not inside_word and not inside_number:
            return True
        start = text.find(words, start + 1)
    return False
