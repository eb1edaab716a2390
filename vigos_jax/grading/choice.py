"""Which option of a multiple-choice question an answer names: by its letter, by its text, or by both."""

import re
from collections.abc import Sequence

from vigos_jax.grading.letters import with_text
from vigos_jax.grading.reading import Reading, agree, read
from vigos_jax.grading.spelling import MAX_ANSWER_CHARS

_JOINS = r"(?:\b(?:or|and|maybe|perhaps|possibly|also|either|nor)\b|[,;/&+])"
_LETTERS = re.compile(r"[(\[]?([A-Z])[)\]]?[.,]?(?:(?: ?[,;&/+]| and|,? and)? ?[(\[]?([A-Z])[)\]]?[.,]?){1,25}")

_SMALL_LETTERS = re.compile(r"[a-z](?: ?[,;] ?[a-z]){1,25}")
_AND = re.compile(r"(?:,? and |[,;&] ?) ?")


def letter_set(answer: Reading, options: Sequence[Reading]) -> frozenset[str] | None:
    """The letters of an answer that names several options together; None for any other.

    "AC", "A, C" and "(A) and (C)" do, and so do "A. red, C. green" and "red and green".
    """
    if len(answer.body) > MAX_ANSWER_CHARS:
        return None
    letters = (
        re.findall("[A-Z]", answer.body) if _LETTERS.fullmatch(answer.body) else _letters_of_parts(answer, options)
    )
    if not letters or len(set(letters)) < len(letters) or max(letters) > chr(ord("A") + len(options) - 1):
        return None
    return frozenset(letters)


def _letters_of_parts(answer: Reading, options: Sequence[Reading]) -> list[str]:
    parts = _AND.split(answer.body)
    named = [named_option(read(part), options) for part in parts] if 1 < len(parts) <= len(options) else []
    return [] if None in named else [chr(ord("A") + index) for index in named if index is not None]


def same_letters(answer: Reading, reference: Reading) -> bool:
    """Whether both name the same set of letters, for unknown options: "A, C" and "AC".

    A reference without separators ("AC") must be in alphabetical order, as few words are, and end at "J" at most.
    """
    ours, theirs = answer.body, reference.body
    if max(len(ours), len(theirs)) > MAX_ANSWER_CHARS or not _LETTERS.fullmatch(theirs):
        return False
    ours = ours.upper() if _SMALL_LETTERS.fullmatch(ours) else ours
    if not _LETTERS.fullmatch(ours) or (theirs.isalpha() and (list(theirs) != sorted(theirs) or theirs[-1] > "J")):
        return False
    if ours.isalpha() and theirs.isalpha() and len(theirs) > 2:
        return ours == theirs
    letters = [re.findall("[A-Z]", text) for text in (ours, theirs)]
    return sorted(letters[0]) == sorted(letters[1])


def option_index(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer names, None for none or several."""
    return named_option(read(answer), [read(option) for option in options])


def named_option(answer: Reading, options: Sequence[Reading]) -> int | None:
    """The option that an answer names: by its letter ("B", "(B) red", "B - red"), or by its text if only one has it.

    A letter next to another option's text names none. A lone letter is read as an option's label first, even if it is
    the text of another option.
    """
    if answer.letter:
        index = ord(answer.letter) - ord("a")
        if index < len(options):
            return index if not answer.rest or _supports(answer.rest, index, options) else None
    if (by_text := _by_text(answer, options)) is not None:
        return by_text
    marked = None if len(answer.body) > MAX_ANSWER_CHARS else with_text(answer.body)
    if marked is None or ord(marked.letter) - ord("a") >= len(options):
        return None
    index = ord(marked.letter) - ord("a")
    return index if _by_text(read(marked.rest), options) == index else None


def _by_text(answer: Reading, options: Sequence[Reading]) -> int | None:
    same = [i for i, option in enumerate(options) if option.text and option.text == answer.text]
    same = same or [i for i, option in enumerate(options) if agree(answer, option)]
    return same[0] if len(same) == 1 else None


def _supports(rest: str, index: int, options: Sequence[Reading]) -> bool:
    """Whether the text beside a letter does not speak for another option."""
    reading = read(rest)
    if agree(reading, options[index]):
        return True
    opposite = reading.text[1:].strip() if reading.text.startswith("-") else f"-{reading.text}"
    if any(agree(reading, option) for option in options) or agree(read(opposite), options[index]):
        return False
    text = reading.text
    own = re.search(_whole(options[index].text), text) if options[index].text else None
    for i, option in enumerate(options):
        if i == index or len(option.text) < 2 and not option.is_quantity or option.text in options[index].text:
            continue
        joined = rf"{_JOINS} ?(?:the |a |an )?{_whole(option.text)}"
        if re.search(joined, text) or (own is None and re.search(rf"(?<!not ){_whole(option.text)}", text)):
            return False
    return True


def _whole(text: str) -> str:
    return rf"(?<![\w.]){re.escape(text)}(?![\w]|\.[0-9])"
