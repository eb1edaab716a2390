"""Prompt templates and the two texts of a data row that go into them."""

import numbers
import re
from collections.abc import Collection

from vigos_jax.errors import InputError
from vigos_jax.graders import last_boxed

FIELDS = ("problem", "reference")  # what every row has; config.data.fields may name further columns
_WORD = re.compile(r"\{([A-Za-z_]\w*)\}")
# `\boxed{answer}` and `x_{max}` are mathematics; a name in braces that stands by itself asks to be filled in.
_LONE_WORD = re.compile(r"(?<![\w\\^}])" + _WORD.pattern)
_ANSWER_LABEL = re.compile(r"answer\s*[:：]", re.IGNORECASE)


def fields(template: str, names: Collection[str] = FIELDS) -> frozenset[str]:
    """Which of the named fields a template asks for."""
    return frozenset(_WORD.findall(template)) & frozenset(names)


def unknown_fields(template: str, names: Collection[str] = ()) -> list[str]:
    """Names in braces that look like fields and are none of FIELDS or `names`."""
    return [word for word in _LONE_WORD.findall(template) if word not in (*FIELDS, *names)]


def fill(template: str, /, *, problem: str, reference: str | None = None, **others: str) -> str:
    r"""The template with `{problem}`, `{reference}` and the names of `others` replaced, in a single pass.

    Every other brace is literal, so `\boxed{}` can stand in a template, and what is filled in is never
    searched for fields again. Raises InputError if the template asks for a reference and there is none.
    """
    if reference is None and "reference" in fields(template):
        raise InputError(
            f"prompt template {_shorten(template)!r} asks for {{reference}}, but none is shown here; "
            "the field it can use is {problem}"
        )
    values = {"problem": problem, "reference": reference} | others
    return _WORD.sub(lambda match: values.get(match[1], match[0]), template)


def clean_problem(text: object) -> str:
    """The question without stray `<image>` markers and outer white space; "" (none) if it is not a text."""
    return re.sub(" ?<image>", "", text).strip() if isinstance(text, str) else ""


def clean_reference(answer: object) -> str:
    r"""The reference answer of a data row as it is shown to a teacher; "" means that the row has none.

    A number keeps its value (0 is an answer; 2.0 is written "2"). Around a text, a code fence, `<answer>`
    tags, an "Answer:" label and quotes are removed; of a text with boxes the last closed one counts. None,
    NaN, an infinity and anything that is neither text nor number are no answer.
    """
    if isinstance(answer, numbers.Real):
        return _number_text(answer)
    if not isinstance(answer, str):
        return ""
    text = answer.strip()
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
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
