"""The options and the reference of a row, whatever its columns hold: what is asked, shown to teachers and graded."""

import dataclasses
import numbers
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vigos_jax.data.cleaning import clean_reference
from vigos_jax.grading.choice import letter_set, option_index
from vigos_jax.grading.options import LETTERS, parse_references
from vigos_jax.grading.reading import agree, read


@dataclasses.dataclass(frozen=True)
class Reference:
    """A row's references, all equally right; `error` is the reason if they cannot be used."""

    texts: tuple[str, ...]
    is_index: bool = False
    error: str | None = None


def reference_of(answer: Any, options: Sequence[str], *, first: int = 0) -> Reference:
    """The references in the value of a row's answer column.

    With options, an answer is read as a letter or an option's text, then as an index counted from `first`. It is an
    error if an answer names no option, if the items of a list name different options, or if a number is the text of
    one option and the index of another. Without options, every text of a list is accepted; a list of numbers is one
    answer.
    """
    if isinstance(answer, list | tuple | np.ndarray) and len(answer) and not any(isinstance(v, str) for v in answer):
        answer = _list_text(answer)
    texts = tuple(clean_reference(v) for v in parse_references(answer) if v is not None)
    if not texts or not all(texts):
        return Reference(("",), error="empty_answer")
    if not options:
        return Reference(texts)
    if isinstance(answer, int) and not isinstance(answer, bool) and first <= answer < first + len(options):
        if option_index(str(answer), options) not in (None, answer - first):
            return Reference(texts, is_index=True, error="unclear_answer_index")
    found = [_option_reference(text, options, first) for text in texts]
    if error := next((f.error for f in found if f.error), None):
        return Reference(texts, any(f.is_index for f in found), error)
    named = {option_index(f.texts[0], options) for f in found}
    if len(named) > 1:
        return Reference(texts, error="several_options_right")
    return found[0]


def _list_text(values: Any) -> Any:
    """A box or a point as one text, "[1, 2.5]"; what is not a list of numbers as it was."""
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values):
        return values
    return "[" + ", ".join(map(clean_reference, values)) + "]"


def _option_reference(text: str, options: Sequence[str], first: int) -> Reference:
    readings, reading = [read(option) for option in options], read(text)
    if option_index(text, options) is not None or letter_set(reading, readings) is not None:
        return Reference((text,))
    if any(agree(reading, option) for option in readings):  # a text that stands there twice
        return Reference((text,))
    if re.fullmatch("[0-9]{1,2}", text):
        if 0 <= int(text) - first < min(len(options), len(LETTERS)):
            return Reference((LETTERS[int(text) - first],), is_index=True)
        return Reference((text,), is_index=True, error="answer_not_an_option")
    return Reference((text,), error="answer_not_an_option")


def with_options(text: str, options: Sequence[str], *, template: str = "{letter}. {option}") -> str:
    """The question with its options under it, a line for each, unless it shows them already after their letters."""
    labelled = list(zip(LETTERS, options, strict=False))
    if all(re.search(rf"(?<!\w)\(?{letter}[).:] *{re.escape(o)}", text) for letter, o in labelled):
        return text
    lines = (template.replace("{letter}", letter).replace("{option}", o) for letter, o in labelled)
    return "\n".join([text, *lines])
