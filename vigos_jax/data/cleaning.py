"""The two texts of a data row as prompts show them."""

import decimal
import math
import numbers
import re

from vigos_jax.data.markers import without_markers
from vigos_jax.grading.answer_text import last_boxed

_THOUGHT = re.compile(r"^<(think|thinking)>.*?</\1>", re.IGNORECASE | re.DOTALL)
_ANSWER_LABEL = re.compile(r"answer\s*[:：]", re.IGNORECASE)


def clean_problem(text: object, *, images: int = 1, videos: int = 0) -> str:
    """The question behind its images, see `markers.without_markers`; "" (none) if it is not a text.

    Raises:
      MarkerMismatch: its markers do not go with so many images and videos.
    """
    return without_markers(text, images=images, videos=videos) if isinstance(text, str) else ""


def clean_reference(answer: object) -> str:
    r"""The reference answer of a data row as it is shown to a teacher; "" means that the row has none.

    A number keeps its value (0 is an answer; 2.0 is written "2"). A thought in front, and around a text a code fence,
    `<answer>` tags, an "Answer:" label and quotes are removed; of a text with boxes the last closed one counts. None,
    NaN, an infinity and anything that is neither text nor number are not an answer.
    """
    if isinstance(answer, decimal.Decimal):
        answer = int(answer) if answer == answer.to_integral_value() else str(answer.normalize())
    if isinstance(answer, numbers.Real):
        return _number_text(answer)
    if not isinstance(answer, str):
        return ""
    text = _THOUGHT.sub("", answer.strip()).strip()
    if len(text) > 6 and text.startswith("```") and text.endswith("```"):
        language, newline, code = text[3:-3].partition("\n")
        text = (code if newline else language).strip()
    if text[:8].lower() == "<answer>" and text[-9:].lower() == "</answer>":
        text = text[8:-9].strip()
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    if match := _ANSWER_LABEL.match(text):
        text = text[match.end() :].strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _number_text(value: numbers.Real) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    number = float(value)
    if not math.isfinite(number):
        return ""
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
