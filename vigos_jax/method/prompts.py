"""Prompt templates and the two texts of a data row that go into them."""

import re
from collections.abc import Collection

from vigos_jax.errors import InputError

FIELDS = ("problem", "reference")  # what every row has; config.data.fields may name further columns
_WORD = re.compile(r"\{([A-Za-z_]\w*)\}")
# `\boxed{answer}` and `x_{max}` are mathematics; a name in braces that stands by itself asks to be filled in.
_LONE_WORD = re.compile(r"(?<![\w\\^}])" + _WORD.pattern)


def fields(template: str, names: Collection[str] = FIELDS) -> frozenset[str]:
    """Which of the named fields a template asks for."""
    return frozenset(_WORD.findall(template)) & frozenset(names)


def unknown_fields(template: str, names: Collection[str] = ()) -> list[str]:
    """Names in braces that look like fields and are none of FIELDS or `names`."""
    return [word for word in _LONE_WORD.findall(template) if word not in (*FIELDS, *names)]


def fill(template: str, /, *, problem: str, reference: str | None = None, **others: str) -> str:
    r"""The template with `{problem}`, `{reference}` and the names of `others` replaced, in a single pass.

    All other braces are literal, so a template may contain `\boxed{}`; inserted text is not searched for
    fields. Raises InputError if the template asks for a reference and there is none.
    """
    if reference is None and "reference" in fields(template):
        raise InputError(
            f"prompt template {_shorten(template)!r} asks for {{reference}}, but none is shown here; "
            "it must use {problem} alone"
        )
    values = {"problem": problem, "reference": reference or ""} | others
    return _WORD.sub(lambda match: values.get(match[1], match[0]), template)


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
