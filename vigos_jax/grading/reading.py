"""Parses an answer into a `Reading` (a letter, yes or no, a number with its unit, words) and compares two of them.

Every grading rule compares readings, not the model's text.
"""

import dataclasses
import functools
import re
from fractions import Fraction

from vigos_jax.grading.dates import date_or_time
from vigos_jax.grading.letters import lettered
from vigos_jax.grading.numbers import NUMBER_WORDS, leading_number, written_short
from vigos_jax.grading.phrases import name_and_body, without_leads
from vigos_jax.grading.spelling import MAX_ANSWER_CHARS, spell
from vigos_jax.grading.units import CURRENCY, same_unit, several_units, unit_of
from vigos_jax.grading.words import word_form

ORDINAL = "th"  # what stands in the unit's place after an ordinal number
_YES_NO = {"yes": True, "true": True, "correct": True, "no": False, "false": False, "incorrect": False}
_YES_NO_FIRST = re.compile(
    rf"({'|'.join(_YES_NO)})"
    r"(?:[,.;:!] ?| - | (?=(?:it|there|he|she|they|this|that|these|the|i|we|you) ))(.*)"
)
# "no" that is a verdict, not "no cat".
_YES_NO_WORD = re.compile(rf"(?<![\w'-])({'|'.join(_YES_NO)})(?![\w'-])(?! [a-z])")
_PARENTHESIS = re.compile(r"(.*\S) ?\(([^()]{1,60})\)")
_ROOT = r"\\sqrt\{[^{}]{1,40}\}"
_FRACTION = re.compile(
    rf"\\frac ?\{{((?:[^{{}}+-]|{_ROOT}){{1,60}})\}} ?\{{([0-9a-z.]{{1,30}}|{_ROOT}|\\[a-z]{{2,10}})\}}"
)
_INDEX = re.compile(r"(?<=[^\W\d_])_(?:\{([0-9]{1,9})\}|([0-9]))")
_SPACE = re.compile(r" ?([^\w ]) ?")

_COUNTED = re.compile(r" (?:different |of the |total )?([^\W\d_]{3,}(?:[ '-][^\W\d_]{2,}){0,2})")
_TAIL = re.compile(
    r" (?:ones?|or so|of them|in total|total|altogether|in all|old|tall|long|wide|high|deep|thick|away|apart|each|"
    r"(?:shown |visible |seen )?(?:in|on) (?:the|this) "
    r"(?:image|picture|photo|photograph|figure|diagram|chart|graph|table))$"
)
_NOT_COUNTED = NUMBER_WORDS | frozenset(
    "and or to than of out off less more fewer minus plus times over under not no but maybe either nor versus through "
    "from between up down at least most past with without per by if perhaps possibly".split()
)


@dataclasses.dataclass(frozen=True)
class Reading:
    r"""What an answer says.

    Attributes:
      text: its normal form, in lower case; "" if it says nothing.
      body: its spelling without phrases like "the answer is" and without its name; case is kept.
      name: the symbol or subject that it speaks of: x of "x = 5".
      letter, rest: the option letter that it names, and the text beside it.
      yes: True for yes, False for no, None for anything else.
      value, unit, noun: a number, its unit and what is counted; value is None for anything else.
      is_quantity: whether it is a number without doubt; "5m" may be algebra.
      words: its words without article, plural and choice of synonym.
    """

    text: str
    body: str = ""
    name: str = ""
    letter: str = ""
    rest: str = ""
    yes: bool | None = None
    value: Fraction | None = None
    unit: str = ""
    noun: str = ""
    is_quantity: bool = False
    words: str = ""

    @property
    def kind(self) -> str:
        """One of "letter", "yes_no", "number" and "text"; "" if it says nothing."""
        if not self.text:
            return ""
        if self.letter and not self.rest:
            return "letter"
        if self.yes is not None:
            return "yes_no"
        return "number" if self.is_quantity else "text"


@functools.lru_cache(maxsize=4096)  # references and options come again and again
def read(text: str) -> Reading:
    """What the text says; one of more than MAX_ANSWER_CHARS is taken as it stands."""
    if len(text) > MAX_ANSWER_CHARS:
        plain = " ".join(text.casefold().split())
        return Reading(plain, plain)
    core = without_leads(spell(text))
    reading = _read_core(core)
    if reading.value is None and (match := _PARENTHESIS.fullmatch(core)):  # "5 (five)"
        outer = _read_core(match[1])
        if outer.kind in ("number", "text") and not outer.letter and agree(outer, _read_core(match[2])):
            return outer
    return reading


def agree(a: Reading, b: Reading) -> bool:
    """Whether two readings say the same, without algebra; in both directions alike.

    Forgiven where only one has it: a text beside the option letter, a unit, what is counted, a name.
    """
    if not a.text or not b.text:
        return False
    if a.text == b.text:
        return True
    if max(len(a.text), len(b.text)) > MAX_ANSWER_CHARS:
        return False
    if a.letter or b.letter:
        return _agree_on_letters(a, b)
    if a.yes is not None or b.yes is not None:
        return a.yes == b.yes
    if not may_be_one_name(a, b):
        return False
    if a.value is not None and b.value is not None and same_measure(a, b):
        return a.value == b.value or _as_share(a, b) or _as_share(b, a)
    if a.is_quantity or b.is_quantity:
        return _is_short_for(a, b) or _is_short_for(b, a)
    return (a.words != "" and a.words == b.words) or _compact(a.body) == _compact(b.body)


def same_measure(a: Reading, b: Reading) -> bool:
    """Whether the units and counted things of two numbers can be the same; what only one says is forgiven."""
    if not (a.is_quantity and b.is_quantity):  # "5m" is 5 m only beside 5 m
        return bool(a.unit and b.unit) and same_unit(a.unit, b.unit)
    if a.unit and b.unit and not same_unit(a.unit, b.unit):
        return False
    if a.noun and b.noun and a.noun != b.noun:
        return False
    return not ((a.unit and b.noun and not b.unit) or (b.unit and a.noun and not a.unit))


def _agree_on_letters(a: Reading, b: Reading) -> bool:
    if a.letter and b.letter:
        if a.letter != b.letter or not a.rest or not b.rest:
            return a.letter == b.letter
        return agree(_read_core(a.rest, letters=False), _read_core(b.rest, letters=False))
    lettered_one, other = (a, b) if a.letter else (b, a)
    return bool(lettered_one.rest) and agree(_read_core(lettered_one.rest, letters=False), other)


def may_be_one_name(a: Reading, b: Reading) -> bool:
    """Whether the two can refer to the same thing; a name that only one of them has is ignored."""
    if not a.name or not b.name or a.name == b.name:
        return True
    is_symbol = [len(name) <= 3 or "\\" in name for name in (a.name, b.name)]
    # Subjects in words matter to words: "the sky is blue"; a number's subject may be told in many ways.
    return is_symbol[0] != is_symbol[1] or (not any(is_symbol) and a.is_quantity and b.is_quantity)


def _as_share(percent: Reading, plain: Reading) -> bool:
    if percent.unit != "%" or plain.unit or percent.value is None:
        return False
    return percent.value / 100 == plain.value


def _is_short_for(short: Reading, full: Reading) -> bool:
    """Whether one is "$20k" and the other 20,000 or $20,000."""
    is_same_unit = not full.unit or (CURRENCY.match(full.unit) is not None and full.unit in short.body)
    return full.is_quantity and not full.noun and is_same_unit and written_short(short.body) == full.value


def _read_core(core: str, *, letters: bool = True) -> Reading:
    choice = lettered(core) if letters else None
    if choice is not None and not choice.rest:
        return Reading(choice.letter, core, letter=choice.letter)
    name, body = name_and_body(core)
    letter, rest = (choice.letter, choice.rest) if choice else ("", "")
    fields = {"body": body, "name": name, "letter": letter, "rest": rest, "yes": _yes_no(body.casefold())}
    normal = _normal(core)
    found = None if choice or date_or_time(body.casefold()) else _quantity(body)
    if found is None:
        return Reading(normal, words=word_form(_normal(body)), **fields)
    value, unit, noun, is_sure = found
    spelled = f"{value} {' '.join(filter(None, (unit, noun)))}".strip()
    return Reading(
        spelled if is_sure and not name else normal,
        **fields, value=value, unit=unit, noun=noun, is_quantity=is_sure, words=word_form(normal),
    )  # fmt: skip


def _normal(text: str) -> str:
    text = _FRACTION.sub(r"\1/\2", text).casefold()
    return date_or_time(text) or several_units(text) or text


def _compact(text: str) -> str:
    """For expressions: without the spaces that mean nothing, and "CO_2" as "CO2"."""
    return _SPACE.sub(r"\1", _INDEX.sub(r"\1\2", _normal(text)))


def _yes_no(text: str) -> bool | None:
    if text in _YES_NO:
        return _YES_NO[text]
    match = _YES_NO_FIRST.fullmatch(text)
    if match is None:
        return None
    says = _YES_NO[match[1]]
    return says if all(_YES_NO[word] == says for word in _YES_NO_WORD.findall(match[2])) else None


def _quantity(body: str) -> tuple[Fraction, str, str, bool] | None:
    """(value, unit, what is counted, whether that is beyond doubt) of a body that is a number and nothing else."""
    text, sign, currency = body, 1, ""
    if body[:1] == "-" and CURRENCY.match(body, 1):
        text, sign = body[1:], -1
    if match := CURRENCY.match(text):
        currency, text = match[1], text[match.end() :]
    number = leading_number(text)
    if number is None:
        return None
    measure = _measure(text[number.end :], currency=currency, is_ordinal=number.is_ordinal)
    if measure is None:
        return None
    return sign * number.value, *measure


def _measure(rest: str, *, currency: str, is_ordinal: bool) -> tuple[str, str, bool] | None:
    """(unit, what is counted, whether that is beyond doubt) of what follows a number; None if it is neither."""
    fixed = currency or (ORDINAL if is_ordinal else "")
    rest = _TAIL.sub("", _TAIL.sub("", rest))
    if not rest.strip():
        return fixed, "", True
    unit = unit_of(rest)
    if unit is not None and not fixed:
        is_attached_letter = not rest[0].isspace() and len(rest) == 1 and rest.isascii() and rest.isalpha()
        return unit, "", not is_attached_letter
    if unit is not None and not is_ordinal and same_unit(unit, unit_of(fixed) or ""):  # "$5 USD"
        return unit, "", True
    counted = _COUNTED.fullmatch(rest.casefold())
    if counted is None or set(re.split("[ '-]", counted[1])) & _NOT_COUNTED:
        return None
    return fixed, word_form(counted[1]), True
