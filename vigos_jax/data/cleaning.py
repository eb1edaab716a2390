"""The two texts of a data row as prompts show them."""

import decimal
import math
import numbers
import re

from vigos_jax.data.markers import without_markers
from vigos_jax.grading.answer_text import last_boxed

_THOUGHT = re.compile(r"^<(think|thinking)>.*?</\1>", re.IGNORECASE | re.DOTALL)
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_LAST_LINE = re.compile(r"(?:^|\n)#### *([^\n]+)\s*$")
_ANSWER_LABEL = re.compile(r"\*{0,2}(?:answer|答案)\s*[:：]\*{0,2}", re.IGNORECASE)


def clean_problem(text: object, *, images: int = 1, videos: int = 0) -> str:
    """The question after its images, see `markers.without_markers`; "" (none) if it is not a text.

    Raises:
      MarkerMismatch: its markers do not go with so many images and videos.
    """
    return without_markers(text, images=images, videos=videos) if isinstance(text, str) else ""


def clean_reference(answer: object) -> str:
    r"""The reference answer of a data row as it is shown to a teacher; "" means that the row has none.

    A number keeps its value (0 is an answer; 2.0 is written "2"). A leading thought and a code fence are removed. The
    text in the last `<answer>` tags is used, else that after `####` on the last line, else all of it; within it, the
    last closed box if there is one. An "Answer:" label and quotes are removed. None, NaN, infinities and anything that
    is neither text nor number are not answers.
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
    if tagged := _TAGGED.findall(text):
        text = tagged[-1].strip()
    elif match := _LAST_LINE.search(text):  # as GSM8K writes it
        text = match[1].strip()
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
