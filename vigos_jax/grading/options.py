"""The options of a multiple-choice question, and its reference, from whatever a column holds."""

import ast
import io
import itertools
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_CHARS = 100_000  # of a list as text; options are short
_MAX_LITERAL = 20_000  # as a Python literal: Python 3.12 reads long lines in quadratic time
_MARK = re.compile(
    r"(?:\*\*)?(?:(?:option|choice) )?"
    r"(?:[(（\[]?(?P<a>[A-Z])[)）\]][.:]?|(?P<b>[A-Z])(?:[.:、．：](?!\w\.)|(?=\*\*)| [-–—](?= [^\W\d_]{2})))"
    r"(?:\*\*)?[.:]? ?",
    re.IGNORECASE,
)
_ANY_MARK = re.compile(
    r"(?:^|(?<=[\s;,]))(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:、．：](?=\s|[^\s\w.]|[^\x00-\x7f])"
    r"|([A-Z])[.:](?=[^\s.](?!\.)))|（([A-Za-z])）"  # "A.red", but not "A.M."
)
_HEADING = re.compile(r"(?:[^\n]{1,80}[:：]|choices|options|answers|alternatives)?", re.IGNORECASE)
_KEY = re.compile(r"(?:(?:option|choice)[ _-]?)?[(\[]?([A-Za-z])[)\].:]?", re.IGNORECASE)
_NONE = ("", "none", "null", "nan", "n/a", "-")
_TEXT_KEYS, _LETTER_KEYS = ("text", "content", "value", "option", "answer"), ("label", "key", "letter", "id", "index")


def parse_options(value: Any) -> tuple[str, ...] | None:
    """Texts of options A, B, ... without their own letters; () without any, None where they are not understood.

    Understood are a list; a mapping of letters to texts; `{"label": [...], "text": [...]}`; a list of mappings with a
    text; each of these as JSON or as a Python literal; a text that marks its options "A. ... B. ..." or has a line for
    each. An empty option before the last keeps its letter, those at the end are padding.
    """
    if isinstance(value, str):
        value = parse_literal(value) if value.strip()[:1] in ("[", "(", "{") and not _marked(value) else _lines(value)
        if value is None:
            return None
    if value is None or _is_nan(value):
        return ()
    texts = _of_mapping(value) if isinstance(value, Mapping) else _of_list(value)
    if texts is None:
        return None
    while texts and not texts[-1]:
        texts.pop()
    return tuple(_without_letters(texts))


def first_number(value: Any) -> int:
    """The number of the first option for an answer that is a number: 1 if options are labelled 1, 2, ..., else 0."""
    if isinstance(value, str):
        value = parse_literal(value) if value.strip()[:1] in ("[", "(", "{") else None
    labels: list[Any] = []
    if isinstance(value, Mapping):
        column = next((value[k] for k in _LETTER_KEYS if isinstance(value.get(k), list | tuple | np.ndarray)), None)
        labels = list(value) if column is None else list(column)
    elif isinstance(value, list | tuple | np.ndarray) and all(isinstance(v, Mapping) for v in value):
        labels = [next((v[k] for k in _LETTER_KEYS if k in v), None) for v in value]
    return 1 if "1" in map(str, labels) and "0" not in map(str, labels) else 0


def parse_literal(text: str) -> Any:
    """A list or mapping written as JSON or as a Python literal; None for anything else."""
    if len(text) > _MAX_CHARS:
        return None
    for parse in (json.loads, ast.literal_eval):
        if parse is ast.literal_eval and len(text) > _MAX_LITERAL:
            return None
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if parse is ast.literal_eval and isinstance(value, list | tuple | dict) and _has_joined_texts(text):
            # Without commas, as numpy writes a list: Python reads ['red' 'blue'] as one text.
            return _listed_without_commas(text)
        return value if isinstance(value, list | tuple | dict) else None
    return None


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    kinds = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT)
    return [t for t in tokenize.generate_tokens(io.StringIO(text.strip()).readline) if t.type not in kinds]


def _has_joined_texts(text: str) -> bool:
    tokens = _tokens(text)
    return any(a.type == b.type == tokenize.STRING for a, b in itertools.pairwise(tokens))


def _listed_without_commas(text: str) -> list[str] | None:
    """The texts of "['red' 'blue']"; None if some are parted by commas and others are not."""
    opening, *items, closing = _tokens(text)
    if (opening.string, closing.string) != ("[", "]") or any(item.type != tokenize.STRING for item in items):
        return None
    return [ast.literal_eval(item.string) for item in items]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _text(value: Any) -> str | None:
    """An option's text; "" for an empty place, None for what has no text."""
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, str | bool | int | float | np.number):
        return str(value).strip()
    return None


def _of_list(value: Any) -> list[str] | None:
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if len(value) and all(isinstance(v, Mapping) for v in value):
        return _of_pairs([v for v in value if isinstance(v, Mapping)])
    texts = [_text(v) for v in value]
    return None if any(t is None for t in texts) else [t or "" for t in texts]


def _of_pairs(entries: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """`[{"label": "A", "text": "red"}, ...]`, or `[{"A": "red"}, {"B": "blue"}]`."""
    if all(len(entry) == 1 and _KEY.fullmatch(str(next(iter(entry))).strip()) for entry in entries):
        merged = {k: v for entry in entries for k, v in entry.items()}
        return _of_mapping(merged) if len(merged) == len(entries) else None
    labelled = {}
    for i, entry in enumerate(entries):
        text = next((entry[k] for k in _TEXT_KEYS if k in entry), None)
        label = next((entry[k] for k in _LETTER_KEYS if k in entry), i)
        if text is None or not isinstance(label, str | int) or label in labelled:
            return None
        labelled[label] = text
    return _of_mapping(labelled)


def _of_mapping(value: Mapping[Any, Any]) -> list[str] | None:
    """`{"A": "red", "B": "blue"}` (or 0, 1, ... or 1, 2, ... for letters), or `{"label": [...], "text": [...]}`."""
    columns = {k: list(v) for k, v in value.items() if isinstance(v, list | tuple | np.ndarray)}
    if columns:
        texts, labels = (next((columns[k] for k in keys if k in columns), None) for keys in (_TEXT_KEYS, _LETTER_KEYS))
        if texts is None or (labels is not None and (len(labels) != len(texts) or len(set(labels)) != len(labels))):
            return None
        value = dict(zip(labels if labels is not None else range(len(texts)), texts, strict=True))
    places = {}
    for key, text in value.items():
        letter = _KEY.fullmatch(key.strip()) if isinstance(key, str) else None
        number = (
            int(key) if isinstance(key, int) or (isinstance(key, str) and re.fullmatch("[0-9]{1,2}", key)) else None
        )
        place = ord(letter[1].upper()) - ord("A") if letter else number
        if place is None or place in places:
            return None
        places[place] = _text(text)
    first = min(places, default=0)
    is_whole = sorted(places) == list(range(first, first + len(places)))
    # Letters begin with A; numbers with 0 or 1.
    from_one = first == 1 and not any(_KEY.fullmatch(str(key).strip()) for key in value)
    if not is_whole or not (first == 0 or from_one) or None in places.values():
        return None
    return [places[place] or "" for place in sorted(places)]


def _marked(text: str) -> list[str] | None:
    """The options of "A. red B. blue" or "(A) red (B) blue"; None unless it begins with A and continues in order.

    A heading before them ("Choices:") is none.
    """
    texts, start, expected = [], 0, 0
    for mark in _ANY_MARK.finditer(text):
        letter = next(letter for letter in mark.groups() if letter).upper()
        if expected >= len(LETTERS) or letter != LETTERS[expected]:
            continue
        if expected == 0 and not _HEADING.fullmatch(text[: mark.start()].strip()):
            return None
        if expected:
            texts.append(text[start : mark.start()])
        start, expected = mark.end(), expected + 1
    return [t.strip().rstrip(";,").strip() for t in (*texts, text[start:])] if expected > 1 else None


def _lines(text: str) -> list[str] | None:
    """The options of a plain text: marked with letters, or a line each; [] of one that says none, None of any other."""
    if text.strip().casefold() in _NONE:
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _marked(text) or (lines if len(lines) > 1 else None)


def _without_letters(texts: Sequence[str]) -> list[str]:
    """Without the letters that the options carry themselves, if all carry their own: "A. red" -> "red".

    Letters that skip some ("A.", "B.", "E.") leave those places empty.
    """
    if not 1 < len(texts) <= len(LETTERS):
        return list(texts)
    matches = [_MARK.match(t) for t in texts]
    if not all(m is not None and t[m.end() :].strip() for m, t in zip(matches, texts, strict=True) if t):
        return list(texts)
    places = [LETTERS.index((m["a"] or m["b"]).upper()) if m else i for i, m in enumerate(matches)]
    if places[:2] != [0, 1] or places != sorted(set(places)):
        return list(texts)
    named = {i: t[m.end() :].strip() for i, m, t in zip(places, matches, texts, strict=True) if m}
    return [named.get(i, "") for i in range(places[-1] + 1)]


def parse_references(value: Any) -> list[Any]:
    """The accepted references of an answer column: of a list, or of a text that is a literal list of texts, its items.

    Anything else is the one reference; "[2, 5]" is an interval and not a list of two answers.
    """
    if isinstance(value, str):
        items = parse_literal(value) if value.strip()[:1] in ("[", "(") else None
        is_list = isinstance(items, list | tuple) and len(items) > 0 and all(isinstance(item, str) for item in items)
        return list(items) if is_list and items is not None else [value]
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
