"""Plausible wrong answers for a question: given ones, the other options of a choice, or other rows' answers.

PALR (equations 7-10 of the paper) asks how much of a teacher's correction hangs on the answer it was shown, by
showing it wrong ones. They should be wrong in content, not in form: of the same kind as the right one.
"""

import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.data.cleaning import clean_reference
from vigos_jax.errors import InputError
from vigos_jax.grading.answer_text import answer_kind, normalize_answer
from vigos_jax.grading.options import parse_options
from vigos_jax.grading.rules import grade
from vigos_jax.runtime.jsonl import lines_of, parse_object

# "(A) red", "A. red", "A) red" at the start of a line, of the text, or after white space.
_LETTER_OPTION = re.compile(r"(?:^|\s)(?:\(([A-J])\)|([A-J])[.):])(?=\s)")


def read_file(path: str) -> dict[str, list[str]]:
    """Row id -> wrong answers, from a .jsonl of `{"id", "wrong_answers": [...]}`; InputError for anything else."""
    out: dict[str, list[str]] = {}
    try:
        lines = list(lines_of(pathlib.Path(path).expanduser()))
    except OSError as e:
        raise InputError(
            f"cannot read config.diagnose.wrong_answers_file={path!r}: {e.strerror}; it must be a .jsonl"
        ) from e
    for number, line in lines:
        try:
            row = parse_object(line)
            out[str(row["id"])] = _texts(row["wrong_answers"])
        except UnicodeDecodeError as e:
            raise InputError(f"{path}:{number} must be UTF-8: {e.reason} at byte {e.start} of the line") from e
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f'{path}:{number} must be {{"id": ..., "wrong_answers": [...]}}: {e!r}') from e
    return out


def choices_of(raw: Mapping[str, Any], problem: str) -> list[str]:
    """The options of a multiple-choice row: its `options`, else the letters that head options in the question."""
    if options := parse_options(raw.get("options")):
        return _texts(options)
    letters = [a or b for a, b in _LETTER_OPTION.findall(problem)]
    return letters if len(letters) > 1 and letters == sorted(set(letters)) and letters[0] == "A" else []


def choose(
    *,
    reference: str,
    count: int,
    seed: str,
    given: Sequence[str] = (),
    options: Sequence[str] = (),
    others: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, list[str]]:
    """Up to `count` different wrong answers and where they come from: "given", "options" or "rows".

    Args:
      seed: with the same one, the same choice.
      given: used if there are any; else `options`; else `others`.
      options: texts or letters; if the reference is a letter and the options are texts, their letters are meant.
      others: answers of other rows by `answer_kind`; those of the reference's kind are drawn from.
    """
    if options and answer_kind(reference) == "letter" and not any(answer_kind(o) == "letter" for o in options):
        options = [chr(ord("A") + i) for i in range(min(len(options), 26))]
    kind_pool = (others or {}).get(answer_kind(reference), ())
    for source, pool in (("given", given), ("options", options), ("rows", kind_pool)):
        wrong: dict[str, str] = {}
        for answer in random.Random(seed).sample(list(pool), len(pool)):
            if len(wrong) < count and normalize_answer(answer) and not grade(answer, reference).is_correct:
                wrong.setdefault(normalize_answer(answer), answer)
        if wrong:
            return source, list(wrong.values())
    return "none", []


def _texts(values: Sequence[Any]) -> list[str]:
    if isinstance(values, str):
        raise TypeError("a list is needed")
    return [text for text in map(clean_reference, values) if text]
