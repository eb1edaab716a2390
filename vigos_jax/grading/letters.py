"""Option letters in an answer: the one that it names, and whether it names another beside it."""

import dataclasses
import re

_BARE = re.compile(r"[(\[<]?(?P<letter>[A-Za-z])[)\]>]?[.:)]?")
_CALLED_RIGHT = re.compile(
    r"[(\[]?(?P<letter>[A-Z])[)\]]? is (?:the )?(?:correct|right|best)(?: (?:answer|option|choice|one))?"
)
_HEADS = (  # the letter, and what stands beside it
    re.compile(r"[(\[](?P<letter>[A-Za-z])[)\]][.:,]? ?(?:- )?(?P<rest>.+)"),
    re.compile(r"(?P<letter>[A-Za-z])(?:\)[.:,]?|[.:] | ?: ?|\.(?=[A-Z0-9\\\"'(-])) ?(?P<rest>.+)"),
    re.compile(
        r"(?P<letter>[A-Z])(?:[.:]| ?-+>? ?| ?= ?(?=[^\W\d_]{2})|, ?|,? (?=\(|because |since |as ))(?P<rest>.+)"
    ),
    re.compile(r"(?P<rest>.*[^\s,;/]) [(\[](?P<letter>[A-Z])[)\]]"),
    re.compile(r"(?P<rest>[0-9]{1,30}[°%]?)\((?P<letter>[A-Z])\)"),  # "13(B)"
)
_UNMARKED = re.compile(r"(?P<letter>[A-Z]) (?P<rest>.+)")
# A letter that names an option: marked as one, or after a word that joins alternatives.
_NAMED = re.compile(
    r"(?<![\w'])(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])\)|([A-Z])[.:](?= ?\S)(?![A-Z]\.))"
    r"|(?:^|[,;/&|+]|\b(?:or|and|maybe|perhaps|possibly|probably|also|either|answer|option|choice|be|is|but|else|no|guess"
    r"|think|rather|actually|wait)\b)"
    r" ?[(\[]?([A-Z])(?=$|[\s.,;:)\]/&|+])(?! [a-z])"
)
_NOT_BEFORE = re.compile(r"\bnot (?:option |answer )?$", re.IGNORECASE)
# A letter that is spoken against: "anything except (B)", "It can't be (B)"; "(B) is not correct", "A: wrong".
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|never|no|nor|neither|except|excepting|excluding|excludes?|excluded|without|unlike"
    r"|(?<!none other )than|(?:all|any|anything|everything) but|out|against|avoid|opposite of|instead of"
    r"|eliminat(?:e|es|ed|ing)|reject(?:s|ed)?)|n't)"
    r"(?: (?:think|believe|it's|that's|that|for|be|is|are|being|have|choose|pick|select|say|the|a|an|it|option|answer"
    r"|choice|letter|really|definitely))* ?:?$"
    r"|\b(?:wrong|incorrect|false) ?:?$",
    re.IGNORECASE,
)
_ANSWER = r"(?:it|right|true|correct|valid|(?:the |an? )?(?:right |correct |best |valid )?(?:answer|option|choice|one))"
_DENIED_AFTER = re.compile(  # and nothing else: "B: cannot be determined" is an option and its text
    r"(?:(?:it|that|this|which|option|answer|choice)? ?(?:is|was|'s|must be|would be|can be|seems|looks) )?"
    r"(?:(?:definitely|clearly|certainly|also|simply|obviously) )?"
    rf"(?:not(?: {_ANSWER})?|wrong|incorrect|false|untrue|excluded|eliminated|ruled out)"
    r"|(?:(?:it|that|this) )?(?:isn't|wasn't|is not|was not|(?:can|could|wo|would|will)(?:n't|'t| ?not) be)"
    rf" {_ANSWER}|n?or\b.*",
    re.IGNORECASE,
)
_NAME = re.compile(r"[A-Z]-[^\W_].*")  # B-52, B-flat, X-ray; "B - red" and "B->red" are a letter and a text


@dataclasses.dataclass(frozen=True)
class Lettered:
    """An answer that names one option: its letter in lower case, and the text beside it, "" if there is none."""

    letter: str
    rest: str = ""


def lettered(text: str) -> Lettered | None:
    """The one option letter that a spelled answer names; None if it names none, or several."""
    if bare := _BARE.fullmatch(text) or _CALLED_RIGHT.fullmatch(text):
        return Lettered(bare["letter"].lower())
    match = None if _NAME.fullmatch(text) else _head(text)
    return None if match is None else _alone(match)


def with_text(text: str) -> Lettered | None:
    """A letter and all that stands beside it, also with nothing between ("B a dog"): an option's text, perhaps."""
    match = _head(text) or _UNMARKED.fullmatch(text)
    return None if match is None else Lettered(match["letter"].lower(), match["rest"].strip())


def _head(text: str) -> re.Match | None:
    return next((match for head in _HEADS if (match := head.fullmatch(text))), None)


def _alone(match: re.Match) -> Lettered | None:
    letter, rest = match["letter"].lower(), match["rest"].strip()
    if rest.startswith("(") and rest.endswith(")") and "(" not in rest[1:]:
        rest = rest[1:-1].strip()
    if _DENIED_BEFORE.search(rest) if match.start("rest") == 0 else _DENIED_AFTER.fullmatch(rest):
        return None
    if len(rest.strip("().[] ")) <= 1 and rest.strip("().[] ").isalpha():
        return Lettered(letter) if rest.strip("().[] ").lower() == letter else None
    for other in _NAMED.finditer(rest):
        name = next(g for g in other.groups() if g)
        if name.lower() != letter and not _NOT_BEFORE.search(rest[: other.start()]):
            return None
    return Lettered(letter, rest)
