"""Is an answer right, and who says so? A router: options, yes or no, numbers, words, text, then algebra.

`graders` holds the normal forms that these rules compare. Every verdict names the rule that gave it, so that a table
can be questioned answer by answer.
"""

import dataclasses
import re
from collections.abc import Sequence

from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.answer_text import MAX_ANSWER_CHARS, answer_kind, is_correct, normalize_answer, number_and_unit
from vigos_jax.grading.braces import is_balanced

GRADERS = ("no_answer", "option", "yes_no", "number", "word", "text", "math")
_YES_NO = {"yes": True, "true": True, "correct": True, "no": False, "false": False, "incorrect": False}
_FIRST_WORD = re.compile(r"([a-z]+)(?:[,.;:!]| -)")
_LETTER_FIRST = re.compile(r"[(\[]?(?P<letter>[a-z])(?:[)\]][.:]?|[.:])(?P<rest> ?.*)")
_LETTER_LAST = re.compile(
    r"(?:the )?(?:(?:correct |final )?answer|option|choice)(?: is)?:? [(\[]?(?P<letter>[a-z])[)\]]?(?P<rest>)"
)
_ARTICLE = re.compile(r"(?:a|an|the|some|my|its|their) ")
_MATH = re.compile(r"[\\^=+*/()\[\]{}_|<>≤≥π√∞0-9]|\b[a-z] ?-")
_NUMBER_WORDS = {
    word: str(n)
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
# Names of one thing, as short answers about images have them.
_SYNONYMS = (
    ("gray", "grey"),
    ("refrigerator", "fridge"),
    ("airplane", "aeroplane", "plane"),
    ("bike", "bicycle"),
    ("motorbike", "motorcycle"),
    ("tv", "television"),
    ("phone", "telephone", "cellphone", "smartphone", "mobile phone", "cell phone"),
    ("couch", "sofa"),
    ("car", "automobile"),
    ("photo", "photograph", "picture"),
    ("mom", "mum", "mother"),
    ("dad", "father"),
    ("kid", "child"),
    ("bunny", "rabbit"),
    ("hippo", "hippopotamus"),
    ("rhino", "rhinoceros"),
    ("donut", "doughnut"),
    ("ketchup", "catsup"),
    ("trash", "garbage", "rubbish"),
    ("pants", "trousers"),
    ("sneakers", "trainers"),
    ("soccer", "football"),
    ("u.s", "us", "usa", "u.s.a", "united states", "united states of america"),
    ("uk", "u.k", "united kingdom", "britain", "great britain"),
    ("velocity", "speed"),
    ("purple", "violet"),
    ("zero", "none", "0"),
)
_SYNONYM = {word: group[0] for group in _SYNONYMS for word in group}
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf",
    "loaves": "loaf", "potatoes": "potato", "tomatoes": "tomato", "oxen": "ox", "dice": "die",
}  # fmt: skip
_NO_PLURAL = ("ss", "us", "is")  # glass, cactus, tennis
_SINGULAR = frozenset("gas canvas atlas christmas chaos cosmos lens news series species physics mathematics".split())


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`grader` is one of GRADERS, the rule that decided."""

    is_correct: bool
    grader: str


def grade(
    prediction: str | None,
    reference: str,
    *,
    options: Sequence[str] = (),
    precision: int | None = None,
    math: MathGrader | None = None,
) -> Verdict:
    """Whether an extracted answer means the reference.

    Args:
      prediction: what the box holds; None without one.
      reference: the right answer; with options, its letter or its text.
      options: texts of options A, B, ... of a multiple-choice question.
      precision: decimals that numbers are rounded to before they are compared; None compares them exactly.
      math: decides about expressions, where nothing else does; None leaves them unequal.
    """
    if prediction is None or not normalize_answer(prediction):
        return Verdict(False, "no_answer")
    if options:
        return Verdict(_is_option(prediction, reference, options), "option")
    kind = answer_kind(reference)
    if kind == "letter":
        return Verdict(is_correct(prediction, reference), "option")
    if kind == "yes_no":
        return Verdict(_yes_no(prediction) == _yes_no(reference), "yes_no")
    if is_correct(prediction, reference):
        return Verdict(True, {"integer": "number", "number": "number"}.get(kind, "text"))
    if kind in ("integer", "number"):
        return _number(prediction, reference, precision, math)
    if _word(prediction) == _word(reference):
        return Verdict(True, "word")
    if math is not None and _MATH.search(reference) and _is_short(prediction, reference):
        if (equal := math.is_equal(prediction, reference)) is not None:
            return Verdict(equal, "math")
    return Verdict(False, "text" if " " in reference.strip() else "word")


def _is_short(*texts: str) -> bool:
    return max(map(len, texts)) <= MAX_ANSWER_CHARS


def option_index(answer: str, options: Sequence[str]) -> int | None:
    """The option an answer names: by its letter ("B", "(B) red", "B. red"), or by its text, if that is one's alone.

    A letter with another option's text behind it names none.
    """
    normal = [normalize_answer(o) for o in options]
    text = normalize_answer(answer)
    same = [i for i, o in enumerate(normal) if o == text]
    letter, rest = (text, "") if re.fullmatch("[a-z]", text) else (None, "")
    if match := _LETTER_FIRST.fullmatch(text) or _LETTER_LAST.fullmatch(text):
        letter, rest = match["letter"], normalize_answer(match["rest"] or "")
    if letter is None or ord(letter) - ord("a") >= len(options):
        return same[0] if len(same) == 1 else None
    index = ord(letter) - ord("a")
    # "C" may be the text of option A: a letter that stands alone names its place first.
    contradicts = rest and rest != normal[index] and rest in normal
    return None if contradicts else index


def _is_option(prediction: str, reference: str, options: Sequence[str]) -> bool:
    right = option_index(reference, options)
    if right is None:
        return is_correct(prediction, reference)
    ours = option_index(prediction, options)
    if ours is None:  # the text of an option that stands there twice
        return normalize_answer(prediction) == normalize_answer(options[right])
    return ours == right


def _yes_no(answer: str) -> bool | None:
    text = normalize_answer(answer)
    if match := _FIRST_WORD.match(text):  # "Yes, it is."
        text = match[1]
    return _YES_NO.get(text)


def _number(prediction: str, reference: str, precision: int | None, math: MathGrader | None) -> Verdict:
    text = _NUMBER_WORDS.get(normalize_answer(prediction))
    ours, theirs = number_and_unit(text or prediction), number_and_unit(reference)
    if ours is not None and theirs is not None:
        if ours[1] and theirs[1] and ours[1] != theirs[1]:
            return Verdict(False, "number")
        if precision is not None:
            return Verdict(round(ours[0], precision) == round(theirs[0], precision), "number")
        return Verdict(ours[0] == theirs[0], "number")
    # "7;7" would be the set {7}, and so 7.
    if math is not None and _is_short(prediction, reference) and ";" not in prediction and is_balanced(prediction):
        if (equal := math.is_equal(prediction, reference)) is not None:
            return Verdict(equal, "math")
    return Verdict(False, "number")


def _word(answer: str) -> str:
    """A short answer without article, plural and choice of synonym; longer than three words it stays as it is."""
    text = normalize_answer(answer).replace("-", " ")
    text = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    words = text.split()
    if not 1 <= len(words) <= 3:
        return text
    words[-1] = _singular(words[-1])
    text = " ".join(words)
    return _SYNONYM.get(text, text)


def _singular(word: str) -> str:
    if word in _IRREGULAR or word in _SINGULAR:
        return _IRREGULAR.get(word, word)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(_NO_PLURAL):
        return word[:-1]
    return word
