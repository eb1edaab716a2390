r"""Does a predicted answer say the same as the reference? Option letters, words and numbers; no algebra.

Everything here takes text that a model wrote, so nothing is evaluated, no number is parsed without a bound on
its digits, and every pattern is linear: a hostile answer costs as little as an honest one.
"""

import re
from fractions import Fraction

from vigos_jax.grading.braces import closing_brace

MAX_ANSWER_CHARS = 1000  # a longer answer is compared as plain text, without any rewriting

_BOX_OPEN = "\\boxed{"
_QUOTE_PAIRS = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’"}
_REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        ("−", "-"),
        (r"\\([$% ])", r"\1"),
        (r"\\[,;:!]", ""),  # LaTeX's thin spaces
        (r"\^?\{?\\circ\b\}?", "°"),
        *((r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1"),) * 2,  # may be nested
    )
)
_LETTER = re.compile(r"\(?([a-z])[).:]?|\[([a-z])\]")
_LETTER_AND_TEXT = re.compile(r"(?:\(([a-z])\)|([a-z])[).:]) .*")

# At most 30 digits and a two-digit exponent: large enough for any answer, small enough to be exact at once.
# Every class is spelled [0-9]: \d and int() also take the digits of other scripts.
_INTEGER = r"(?:[0-9]{1,30}|[1-9][0-9]{0,2}(?:(?:,|\{,\})[0-9]{3}){1,9})"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]{{0,30}})?|\.[0-9]{{1,30}})"
_SCIENTIFIC = re.compile(rf"[+-]?{_DECIMAL}(?:e[+-]?[0-9]{{1,2}})?")
_SLASH = re.compile(rf"([+-]?{_DECIMAL}) ?/ ?([+-]?{_DECIMAL})")
_FRAC = re.compile(rf"([+-]?)\\[dt]?frac ?\{{ ?([+-]?{_DECIMAL}) ?\}} ?\{{ ?([+-]?{_DECIMAL}) ?\}}")
_FRAC_DIGITS = re.compile(r"([+-]?)\\[dt]?frac ?([0-9]) ?([0-9])")
_NUMBER_BEFORE = re.compile(r"(?:[0-9][.,/]|(?<!\w)[-−])$")  # what makes the digits behind it part of a number
_NUMBER_AFTER = re.compile(r"[.,/][0-9]")
_UNIT = re.compile(  # a single letter stands apart: "5m" may be algebra, "1990s" is a decade
    r"(?: ?(?:mm|cm|km|inch|inches|in|ft|feet|mg|kg|%|°)"
    r"| (?:m|g|s|meters?|seconds?|minutes?|hours?|degrees?))$"
)


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last `\boxed{...}` of `text` that is closed; None without one.

    Plain brace counting, as in training. Of nested boxes the inner one, which opens last, is taken.
    """
    # A box that closes does so before the next one opens, unless that one closes too and is the later box.
    for piece in reversed(text.split(_BOX_OPEN)[1:]):
        end = closing_brace(piece, 0)
        if end is not None:
            return piece[:end].strip()
    return None


def normalize_answer(text: str) -> str:
    r"""Equal answers in one spelling: "(B)", "B." -> "b"; "$1,200.0$" -> "1200"; "\frac12", ".5" -> "1/2".

    Folds case and white space; removes `$`, surrounding quotes, closing punctuation and `\text{}` wrappers;
    writes a number as an exact reduced fraction. The empty string means that nothing was said.
    """
    text = " ".join(text.casefold().split())
    if len(text) > MAX_ANSWER_CHARS:
        return text
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _strip_surroundings(" ".join(text.split()))
    if letter := _LETTER.fullmatch(text):
        return letter[1] or letter[2]
    unit = _UNIT.search(text)
    number = _number(text[: unit.start()] if unit else text)
    if number is None:
        return text
    return f"{number} {unit[0].strip()}" if unit else str(number)


def is_correct(prediction: str | None, reference: str) -> bool:
    """Whether the prediction means the reference. None (no box) and an answer that says nothing are wrong.

    Beyond equal normal forms, two differences are forgiven when only one side has them: the text behind an
    option letter ("B. red" for "B"), and a unit behind a number ("12 cm" for "12").
    """
    if prediction is None:
        return False
    ours, theirs = normalize_answer(prediction), normalize_answer(reference)
    if not ours or not theirs:
        return False
    return ours == theirs or _bare(ours) == theirs or ours == _bare(theirs)


def answer_kind(answer: str) -> str:
    """What sort of thing an answer is: "letter", "yes_no", "integer", "number" or "text"; "" if it says nothing."""
    text = normalize_answer(answer)
    if not text:
        return ""
    if len(text) == 1 and "a" <= text <= "z":
        return "letter"
    if text in ("yes", "no", "true", "false"):
        return "yes_no"
    bare = _bare(text)
    number = text if bare is None else bare
    if re.fullmatch(r"-?[0-9]+(/[0-9]+)?", number):
        return "number" if "/" in number else "integer"
    return "text"


def number_and_unit(answer: str) -> tuple[Fraction, str] | None:
    """The exact value of an answer that is a number, and its unit or ""; None for any other answer."""
    normal = normalize_answer(answer)
    bare = _bare(normal)
    value = _number(normal if bare is None else bare)
    return None if value is None else (value, normal.partition(" ")[2] if bare is not None else "")


def mentions(text: str, answer: str) -> bool | None:
    """Whether `text` contains the answer's words, whole and in order; None for a lone letter, which proves nothing.

    A number inside another ("12" in "12.5", "-12", "1/12" or "1,200") is not mentioned.
    """
    words, text = " ".join(answer.casefold().split()), " ".join(text.casefold().split())
    if not words or answer_kind(answer) == "letter":
        return None
    start = text.find(words)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(words) : start + len(words) + 1]
        inside_word = (before.isalnum() and words[0].isalnum()) or (after.isalnum() and words[-1].isalnum())
        end = start + len(words)
        inside_number = (words[0].isdigit() and _NUMBER_BEFORE.search(text[max(0, start - 2) : start])) or (
            words[-1].isdigit() and _NUMBER_AFTER.match(text[end : end + 2])
        )
        if not inside_word and not inside_number:
            return True
        start = text.find(words, start + 1)
    return False


def _strip_surroundings(text: str) -> str:
    before = None
    while text != before:  # each round takes at least one character off
        before = text
        text = text.strip("$ ").rstrip(".,;:? ")
        text = re.sub(r"(?<=[^\W\d]{2})!+$", "", text)  # "yes!", but not the factorials "5!" and "n!"
        if len(text) > 1 and _QUOTE_PAIRS.get(text[0]) == text[-1]:
            text = text[1:-1]
        elif text.startswith("**") and text.endswith("**"):  # Markdown bold
            text = text[2:-2]
        elif text.startswith(("\\(", "\\[")) and text.endswith(("\\)", "\\]")):
            text = text[2:-2]
    return text


def _number(text: str) -> Fraction | None:
    r"""The exact value of a decimal, a fraction a/b or a LaTeX \frac; None for anything else and for a/0."""
    sign, top, bottom = "", text, "1"
    if match := _SLASH.fullmatch(text):
        top, bottom = match.groups()
    elif match := _FRAC.fullmatch(text) or _FRAC_DIGITS.fullmatch(text):
        sign, top, bottom = match.groups()
    elif not _SCIENTIFIC.fullmatch(text):
        return None
    top, bottom = (Fraction(part.replace("{,}", "").replace(",", "")) for part in (top, bottom))
    if bottom == 0:
        return None
    return -top / bottom if sign == "-" else top / bottom


def _bare(normalized: str) -> str | None:
    """A normal form less the text behind its option letter, or the unit behind its number; else None."""
    if option := _LETTER_AND_TEXT.fullmatch(normalized):
        return option[1] or option[2]
    number, space, unit = normalized.partition(" ")
    is_unit = _UNIT.fullmatch(space + unit) is not None
    return number if is_unit and _number(number) is not None else None
