r"""Mathematics beyond a single number: solution sets, tuples, intervals, inequalities, and algebra for what is left.

Algebra is asked only about two texts of one shape, as it makes values of what is none: "3-5" is a range and not -2,
"9:30" a time and not 0.3, "x \ge 5" an inequality and not 5.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.braces import is_balanced
from vigos_jax.grading.reading import Reading, agree, may_be_one_name, read
from vigos_jax.grading.units import same_unit, unit_of

_MAX_ITEMS = 6
_MAX_DEPTH = 2  # a union of intervals of values
_NUMBER = r"[0-9]{1,30}(?:[.,][0-9]{1,30})?"
_PART = rf"{_NUMBER}(?: ?/ ?{_NUMBER})?"
_RANGE = re.compile(rf"[+-]? ?{_PART} ?(?:-+ ?{_PART} ?)+|{_NUMBER}(?: ?/ ?{_NUMBER}){{2,}}")  # a score, a date
_ADJACENT = re.compile(r"[0-9)] [0-9]")
# What algebra would cut off or take for something else: 45°30', 20° W, 5 a.m., 5...7, != 5, 5_6.
_NO_VALUE = re.compile(r"°(?! ?(?:[-+*/^=)}]|$))|[0-9]'|[0-9] ?[ap]\.? ?m\.?$|\.\.|^!|!=|[0-9]_", re.IGNORECASE)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_SYMBOL = re.compile(r"[A-Za-z]|\\[A-Za-z]{2,10}")
_MEMBER = re.compile(r"[A-Za-z](?:_\w)? ?\\in (.+)")
_SPLIT = re.compile(r" or | and |[,;]|\\(?:lor|vee)(?![A-Za-z])|[(\[{]|[)\]}]")
_UNION = re.compile(r"\\cup(?![A-Za-z]) ?")
_PLUS_MINUS = re.compile(r"(.*?) ?\\pm(?![A-Za-z]) ?(.+)")
_MACROS = frozenset(
    "frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp infty circ "
    "alpha beta gamma delta epsilon theta lambda mu phi psi omega rho sigma tau binom begin end vec overline bar hat "
    "angle triangle Delta Gamma Omega Sigma sum prod int lim emptyset cup cap pm left right".split()
)
_FUNCTIONS = frozenset("sin cos tan cot sec csc log ln exp sqrt pi arcsin arccos arctan matrix pmatrix bmatrix".split())
_ENGLISH = frozenset("a an as at be by do he if in is it me my no of on or so to up us vs we".split())
_ATTACHED = re.compile(r"(.*\})([A-Za-z]{2}[A-Za-z0-9^{}]*)")  # a unit: "\sqrt{3}cm^2"
_WORD = re.compile(r"\\?[^\W\d_]+")
_ALLOWED = re.compile(r"[\w\s\\+\-*/^=(){}\[\]|!.,'&°%]*")


@dataclasses.dataclass(frozen=True)
class _Form:
    """The shape of a mathematical text: "value", "set", "union", "(,)" and other brackets, or "relation"."""

    shape: str
    items: tuple[str, ...]


def same_expression(prediction: Reading, reference: Reading, math: MathGrader | None, *, depth: int = 0) -> bool | None:
    """Whether two readings are the same mathematics; None if that is not for mathematics to say.

    Items of sets and tuples are compared alike, down to `depth` _MAX_DEPTH.
    """
    if not may_be_one_name(prediction, reference):
        return False
    ours, theirs = _form(prediction), _form(reference)
    if ours is None or theirs is None or depth > _MAX_DEPTH:
        return None
    if ours.shape == theirs.shape == "value":
        return _same_value(prediction, reference, math)
    if ours.shape == theirs.shape == "relation":
        return None if math is None else math.is_equal(prediction.body, reference.body)
    if ours.shape != theirs.shape or len(ours.items) != len(theirs.items):
        return False

    def same_item(a: str, b: str) -> bool | None:
        one, other = read(a), read(b)
        return True if agree(one, other) else same_expression(one, other, math, depth=depth + 1)

    if ours.shape in ("set", "union"):
        return _same_sets(ours.items, theirs.items, same_item)
    return next((v for a, b in zip(ours.items, theirs.items, strict=True) if not (v := same_item(a, b))), True)


def is_mathematics(reading: Reading) -> bool:
    """Whether the text has a mathematical shape and more in it than a word."""
    return _form(reading) is not None and re.search(r"[\\^=+*/()\[\]{}|<>0-9]|-", reading.body) is not None


def _same_sets(ours: Sequence[str], theirs: Sequence[str], same_item: Callable[[str, str], bool | None]) -> bool | None:
    """Whether the items, as many on both sides, match one to one; None if algebra cannot decide."""
    left = list(theirs)
    for item in ours:
        place = next((i for i, other in enumerate(left) if agree(read(item), read(other))), None)
        verdict: bool | None = place is not None
        if place is None:
            for place, other in enumerate(left):  # noqa: B007
                if (verdict := same_item(item, other)) is not False:
                    break
        if not verdict or place is None:
            return verdict  # None too: after one undecided item, no further ones are compared
        left.pop(place)
    return True


def _same_value(a: Reading, b: Reading, math: MathGrader | None) -> bool | None:
    if a.value is not None and b.value is not None and a.is_quantity != b.is_quantity:
        return False  # "1990s", which may be a number of seconds, beside a plain number
    (ours, unit), (theirs, other_unit) = _value_and_unit(a), _value_and_unit(b)
    if unit and other_unit and not same_unit(unit, other_unit):
        return False
    if ours == theirs:
        return True
    return None if math is None else math.is_equal(ours, theirs)


def _value_and_unit(reading: Reading) -> tuple[str, str]:
    """An expression and the unit after it, "" without one."""
    words = reading.body.split(" ")
    for count in (3, 2, 1):
        if len(words) > count and (unit := unit_of(" ".join(words[-count:]))) is not None:
            return " ".join(words[:-count]), unit
    if (attached := _ATTACHED.fullmatch(reading.body)) and (unit := unit_of(attached[2])) is not None:
        return attached[1], unit
    for mark in ("°", "%"):
        if reading.body.endswith(mark):
            return reading.body.removesuffix(mark).rstrip(), mark
    return reading.body, ""


def _form(reading: Reading) -> _Form | None:
    text = reading.body
    if not text or not is_balanced(text):
        return None
    if member := _MEMBER.fullmatch(text):
        text = member[1]
    union = _UNION.split(text)
    if len(union) > 1:
        return _Form("union", tuple(union)) if len(union) <= _MAX_ITEMS else None
    if listed := _bracketed(text):
        return listed
    items = _items(text)
    if items is None:
        return None
    if len(items) > 1:
        return _Form("set", items) if all(_is_value(i) or _RELATION.search(i) for i in items) else None
    if _RELATION.search(text):
        return _relation(text)
    if match := _PLUS_MINUS.fullmatch(text):
        return _Form("set", (f"{match[1]}+{match[2]}".removeprefix("+"), f"{match[1]}-{match[2]}"))
    value, _ = _value_and_unit(reading)
    return _Form("value", (value,)) if _is_value(value) else None


def _bracketed(text: str) -> _Form | None:
    """A set in braces, a tuple or an interval; None for anything else."""
    if text.startswith("\\{") and text.endswith("\\}"):
        items = _items(text[2:-2])
        return _Form("set", items) if items else None
    if text[:1] in ("(", "[") and text[-1] in ")]":
        items = _items(text[1:-1])
        return _Form(f"{text[0]},{text[-1]}", items) if items and len(items) > 1 else None
    return None


def _relation(text: str) -> _Form | None:
    """An inequality as the interval of its symbol, where it bounds one; None if it is not mathematics."""
    parts, signs = [p.strip() for p in _RELATION.split(text)], [s.removeprefix("\\") for s in _RELATION.findall(text)]
    if not all(parts) or not all(_is_value(part) for part in parts):
        return None
    down, up = {"<": "()", "le": "[]"}, {">": "()", "ge": "[]"}
    if all(sign in up for sign in signs):  # read from its other end
        parts, signs = parts[::-1], [{">": "<", "ge": "le"}[sign] for sign in signs[::-1]]
    is_symbol = [_SYMBOL.fullmatch(part) is not None for part in parts]
    if not all(sign in down for sign in signs) or is_symbol.count(True) != 1:
        return _Form("relation", (text,))
    if is_symbol == [True, False]:
        return _Form(f"(,{down[signs[0]][1]}", ("-\\infty", parts[1]))
    if is_symbol == [False, True]:
        return _Form(f"{down[signs[0]][0]},)", (parts[0], "\\infty"))
    if is_symbol == [False, True, False]:
        return _Form(f"{down[signs[0]][0]},{down[signs[1]][1]}", (parts[0], parts[2]))
    return _Form("relation", (text,))


def _items(text: str) -> tuple[str, ...] | None:
    """What commas, semicolons, "or" and "and" separate outside of brackets; None if brackets do not match."""
    items, depth, start = [], 0, 0
    for mark in _SPLIT.finditer(text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0:
            if not (
                mark[0] == "," and re.fullmatch(r"[0-9],[0-9]{3}", text[max(0, mark.start() - 1) : mark.end() + 3])
            ):
                items.append(text[start : mark.start()].strip())
                start = mark.end()
    items = [item for item in (*items, text[start:].strip()) if item]
    return tuple(items) if depth == 0 and 0 < len(items) <= _MAX_ITEMS else None


def _is_value(text: str) -> bool:
    """Whether the text is one expression, and neither prose nor a range, a date, a time or two numbers side by side."""
    if (
        not _ALLOWED.fullmatch(text)
        or text[-1:] in ("", "+", "-", "*", "/", "^", "=")
        or _RANGE.fullmatch(text)
        or _ADJACENT.search(text)
        or _NO_VALUE.search(text)
    ):
        return False
    for word in _WORD.findall(text):
        if word.startswith("\\"):
            if word[1:] not in _MACROS:
                return False
        elif word not in _FUNCTIONS and (len(word) > 2 or word.casefold() in _ENGLISH - {"a"}):
            return False
    return True
