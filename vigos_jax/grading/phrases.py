"""The phrases around an answer: "the answer is", "about", "x =", "the sky is"."""

import re

from vigos_jax.grading.numbers import leading_number
from vigos_jax.grading.spelling import strip_surroundings

_IS = r"(?:is|are|was|were|equals?|would be|should be|will be|must be)"
_VERB = rf"(?: {_IS}(?: (?:just|simply|therefore|thus))?(?: ?:)?| ?[:=]) ?"
_LEADS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:so|thus|hence|therefore|then|finally|overall|ok|okay|well|clearly|in conclusion|in total)\b,? ",
        r"(?:i|we) (?:think|believe|guess|choose|pick|select|get|have|find|see|obtain|would say|count)(?: that)?:? ",
        r"(?:the |my |our |your )?(?:(?:correct|right|final|best|most likely|only|closest) ){0,3}"
        rf"(?:answer|option|choice|result|solution|response)(?: (?:choice|option|letter|to the question))?{_VERB}",
        r"(?:the )?(?:correct |right |final )?(?:answer|option|choice|letter|choose|pick|select) "
        r"(?=[(\[]?[A-Z](?:[^\w']|$))",
        rf"(?:it|this|that|there|they|he|she|these|those)(?:'s|'re|(?= (?:is|are|was|were) ){_VERB}) ?(?:a total of )?",
        r"a total of (?=[0-9a-z])",
        r"(?:it|that) (?:equals|shows|says|reads) ",
        r"(?:the|this) statement is ",
        r"答案(?:是|为|:)? ?",
        r"选(?:择|项)?:? ?(?=[(\[]?[A-Z])",
        r"(?:about|approximately|approx\.?|around|roughly|nearly|circa|ca\.|exactly|precisely|only|just|\\approx) ?"
        r"(?=[-+]? ?[0-9.$€£¥\\√]|(?:a |an )?[a-z]+)",
        r"in (?=[12][0-9]{3}$)",
        r"(?:#|no\. ?|number |(?:in )?(?:the )?year )(?=[0-9])",
    )
)
_APPROXIMATE = _LEADS[-3]
_MAX_LEADS = 6
# "x = 5", "\angle ABC = 30°", "f(x) = 2x": a name and its value; "the sky is blue": a subject and what is said of it.
_SYMBOL = re.compile(
    r"((?:\\[A-Za-z]{2,10} ?)?(?:[A-Za-z][A-Za-z ]{0,30})?(?:_(?:\{\w{1,8}\}|\w))?'?(?:\([a-z]\))?)"
    r" ?(?:=|\\approx|:(?= ?[-+]?[0-9.$€£¥])) ?([^=]+)"
)
_POINT = re.compile(r"\([A-Za-z](?: ?, ?[A-Za-z]){1,3}\) ?= ?(\(.+\))")  # "(x, y) = (1, 2)"
_NAMED_POINT = re.compile(r"([A-Z]'?) ?= ?(\([^()=]*\))")  # "P = (3, 4)"
_CHAIN = re.compile(r"([^=,;]{0,200}[-+*/^\\][^=,;]{0,200}) ?= ?([^=,;]+)")  # "7 - 2 = 5"
_SUBJECT = re.compile(
    r"(?:the|its|his|her|their|this|that|these|those) ([^.,;:=<>\\]{1,60}?) (?:is|are|was|were|equals?) (.+)",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[,;]|\b(?:or|and)\b")


def without_leads(text: str) -> str:
    """A spelled text without "the answer is", "it is", "about" and the like at its head."""
    for _ in range(_MAX_LEADS):
        match = next((m for lead in _LEADS if (m := lead.match(text)) and _may_go(lead, text[m.end() :])), None)
        if match is None:
            return text
        text = strip_surroundings(text[match.end() :])
    return text


def _may_go(lead: re.Pattern, rest: str) -> bool:
    """Whether a lead can be removed: some text must remain, and a number after "about" and the like."""
    if lead is _APPROXIMATE:
        return leading_number(rest) is not None or rest[:1] in tuple("$€£¥\\")
    return bool(rest.strip())


def name_and_body(text: str) -> tuple[str, str]:
    """(the symbol or subject of a text, "" without one; what is said of it): "x = 5" -> ("x", "5")."""
    if point := _POINT.fullmatch(text):
        return "", point[1]
    if point := _NAMED_POINT.fullmatch(text):
        return point[1], point[2]
    if "=" in text or ":" in text or "\\approx" in text:
        if match := _CHAIN.fullmatch(text):
            return "", match[2]
        match = _SYMBOL.fullmatch(text)
        if match and match[1].strip() and not _JOINED.search(text):
            return " ".join(match[1].split()), match[2]
    if match := _SUBJECT.fullmatch(text):
        return match[1].casefold(), strip_surroundings(match[2])
    return "", text
