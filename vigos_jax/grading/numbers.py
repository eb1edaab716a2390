r"""Numbers in an answer, exactly: decimals, fractions, mixed and scientific notation, number words, ordinals.

At most 30 digits and a two-digit exponent: large enough for any answer, small enough to be exact at once. Every class
is spelled [0-9], as \d and int() also take the digits of other scripts.
"""

import dataclasses
import re
from fractions import Fraction

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:(?:,|\{,\})[0-9]{3}){1,9}(?![0-9])|[0-9]{1,30}(?![0-9]))"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]{{0,30}})?|\.[0-9]{{1,30}})"
_SIGNED = rf"[+-]?{_DECIMAL}"
_POWER = r"10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,2}) ?\}|([+-]?[0-9]{1,2}))"
_PLAIN = re.compile(rf"([+-]? ?)({_DECIMAL}(?:[eE][+-]?[0-9]{{1,2}}(?![0-9]))?)")
_SCIENTIFIC = re.compile(rf"([+-]? ?)(?:({_DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?)?{_POWER}(?![0-9])")
_SLASH = re.compile(rf"([+-]? ?)({_DECIMAL}) ?/ ?({_SIGNED})(?! ?/)")
_FRAC = re.compile(rf"([+-]? ?)\\frac ?\{{ ?({_SIGNED}) ?\}} ?\{{ ?({_SIGNED}) ?\}}")
_MIXED = re.compile(
    r"([+-]? ?)([0-9]{1,30})"
    r"(?: ?\\frac ?\{ ?([0-9]{1,30}) ?\} ?\{ ?([0-9]{1,30}) ?\}| ([0-9]{1,30}) ?/ ?([0-9]{1,30})(?! ?/))"
)
_SHORT = re.compile(rf"([+-]? ?)([$€£¥]?)({_DECIMAL})(k|K|M|B|bn)")
_MINUS_WORD = re.compile(r"(?:minus|negative) (?=[0-9.\\])", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:the )?([0-9]{1,9})(?:st|nd|rd|th)(?![a-z])")
_AND_A_HALF = re.compile(r" and (?:a|one) half(?![a-z])")
_SCALE_WORD = re.compile(r" (hundred|thousand|million|billion|trillion)(?![a-z])")
_WORD = re.compile(r"[ -]?([a-z]+)(?![a-z'])")
_MAX_WORDS = 16

_SMALL = {
    word: n
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {w: 10 * n for n, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)}
_CARDINAL = _SMALL | _TENS
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ORDINALS = {
    word: n
    for n, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
        "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth".split(),
        start=1,
    )
} | {f"{word[:-1]}ieth": n for word, n in _TENS.items() if n > 20}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_PARTS |= {f"{word}s": n for word, n in _PARTS.items() if not word.endswith("s")}
NUMBER_WORDS = frozenset({*_CARDINAL, *_SCALES, *_ORDINALS, *_PARTS, "dozen", "none"})


@dataclasses.dataclass(frozen=True)
class Number:
    """A number at the head of a text that ends at `end`."""

    value: Fraction
    end: int
    is_ordinal: bool = False


def leading_number(text: str) -> Number | None:
    """The number that the text begins with, None if with none; a/0 is none."""
    if ordinal := _ORDINAL.match(text.casefold()):
        return Number(Fraction(int(ordinal[1])), ordinal.end(), is_ordinal=True)
    if minus := _MINUS_WORD.match(text):
        number = leading_number(text[minus.end() :])
        return number and Number(-number.value, minus.end() + number.end, number.is_ordinal)
    number = _in_digits(text)
    if number is None:
        return _in_words(text.casefold())
    if half := _AND_A_HALF.match(text.casefold(), number.end):
        return Number(number.value + Fraction(1, 2), half.end())
    if scale := _SCALE_WORD.match(text.casefold(), number.end):
        return Number(number.value * _SCALES[scale[1]], scale.end())
    return number


def written_short(text: str) -> Fraction | None:
    """The value of "20k", "$3.5M" or "1.5B"; None for anything else. "3M" may be a name, and "3.5m" a length."""
    match = _SHORT.fullmatch(text)
    if match is None or not (match[2] or "." in match[3] or match[4] in "kK"):
        return None
    scale = {"k": 10**3, "K": 10**3, "M": 10**6}.get(match[4], 10**9)
    return _signed(match[1], _fraction(match[3])) * scale


def _in_digits(text: str) -> Number | None:
    if match := _MIXED.match(text):
        sign, whole, *fraction = match.groups()
        top, bottom = (int(part) for part in fraction if part)
        if 0 < top < bottom:
            return Number(_signed(sign, int(whole) + Fraction(top, bottom)), match.end())
    if match := _SCIENTIFIC.match(text):
        sign, factor, *power = match.groups()
        exponent = int(next(p for p in power if p))
        return Number(_signed(sign, _fraction(factor or "1") * Fraction(10) ** exponent), match.end())
    if match := _FRAC.match(text) or _SLASH.match(text):
        sign, top, bottom = match.groups()
        if _fraction(bottom) == 0:
            return None
        return Number(_signed(sign, _fraction(top) / _fraction(bottom)), match.end())
    if match := _PLAIN.match(text):
        return Number(_signed(match[1], _fraction(match[2])), match.end())
    return None


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace("{,}", "").replace(",", ""))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign.strip() == "-" else value


def _in_words(text: str) -> Number | None:
    """A number in English words, folded to lower case: "minus one hundred and five", "two thirds", "a dozen"."""
    words: list[tuple[str, int]] = []
    place = 0
    while len(words) < _MAX_WORDS and (match := _WORD.match(text, place)):
        place = match.end()
        words.append((match[1], place))
    names = [word for word, _ in words]
    if names == ["none"]:
        return Number(Fraction(0), place)
    first = names[0] if names and names[0] in ("minus", "negative", "the") else ""
    start = 1 if first else 0
    found = _fraction_words(names[start:]) or _cardinal_words(names[start:])
    if found is None or (first == "the" and not found[2]):  # "the third", but not "the three"
        return None
    value, used, is_ordinal = found
    end = words[start + used - 1][1]
    if not is_ordinal and (half := _AND_A_HALF.match(text, end)):
        value, end = value + Fraction(1, 2), half.end()
    return Number(-value if first in ("minus", "negative") else value, end, is_ordinal)


def _fraction_words(words: list[str]) -> tuple[Fraction, int, bool] | None:
    """As of `_cardinal_words`, for "half", "a third", "two thirds", "three quarters"; "one second" is a time."""
    if words[:1] == ["half"]:
        return Fraction(1, 2), 1, False
    if len(words) > 1 and words[0] in ("a", *_SMALL) and words[1] in _PARTS:
        return Fraction(_SMALL.get(words[0], 1), _PARTS[words[1]]), 2, False
    return None


def _cardinal_words(words: list[str]) -> tuple[Fraction, int, bool] | None:
    """(value, words used, whether it is an ordinal) of "one hundred and five", "twenty-first", "a dozen"."""
    total, group, used, previous = 0, 0, 0, ""
    for i, word in enumerate(words):
        follows = words[i + 1] if i + 1 < len(words) else ""
        if word in ("a", "an") and i == 0 and (follows in _SCALES or follows == "dozen"):
            group = 1
        elif word == "and" and previous in _SCALES and (follows in _CARDINAL):
            pass
        elif word == "dozen" and previous in ("", "a", *_SMALL):
            return Fraction(12 * (group or 1)), i + 1, False
        elif word in _SMALL and (previous in ("", "and", *_SCALES) or (previous in _TENS and 0 < _SMALL[word] < 10)):
            group += _SMALL[word]
        elif word in _TENS and previous in ("", "and", *_SCALES):
            group += _TENS[word]
        elif word in _SCALES and i and previous != "and":
            group *= _SCALES[word]
            if word != "hundred":
                total, group = total + group, 0
        elif word in _ORDINALS and (previous in ("", "and", *_SCALES) or (previous in _TENS and _ORDINALS[word] < 10)):
            return Fraction(total + group + _ORDINALS[word]), i + 1, True
        else:
            break
        used, previous = i + 1, word
    return (Fraction(total + group), used, False) if used else None
