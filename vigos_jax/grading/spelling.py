r"""One spelling for what Unicode, LaTeX and Markdown spell in many ways: "√３" -> "\sqrt{3}", "\mathsf{B}" -> "B".

Case is kept, as algebra and units need it. Mathematics is spelled in LaTeX, everything else in plain text. Every
pattern is linear, and no step evaluates anything.
"""

import re
import unicodedata

from vigos_jax.grading.braces import closing_brace

MAX_ANSWER_CHARS = 1000  # a longer answer is compared as plain text, without any rewriting

# Before NFKC, which would turn "x²" into "x2", "1½" into "11/2" and "30º" into "30o".
_TABLE = {
    **dict.fromkeys("−–—‐‑‒―﹣－", "-"),
    **dict.fromkeys("’‘‛′´ʹ", "'"),
    **dict.fromkeys("“”„‟″＂", '"'),
    **dict.fromkeys("º˚∘", "°"),
    **dict.fromkeys("。｡", "."),
    **dict.fromkeys("、､", ","),
    **dict.fromkeys("≤≦⩽", "\\le "),
    **dict.fromkeys("≥≧⩾", "\\ge "),
    **dict.fromkeys("≈≅≃∼", "\\approx "),
    **dict.fromkeys("·⋅∙", "\\cdot "),
    **dict.fromkeys("\u00a0\u2009\u202f", "\\,"),  # no-break and thin spaces, as between the digits of 1 234
    **{"×": "\\times ", "÷": "/", "⁄": "/", "∕": "/", "π": "\\pi ", "∞": "\\infty ", "≠": "\\ne ", "±": "\\pm "},
    **{
        "∈": "\\in ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∅": "\\emptyset ",
        "∠": "\\angle ",
        "△": "\\triangle ",
        "∛": "\\sqrt[3]",
    },
    **{chr(0x1F150 + i): chr(ord("A") + i) for i in range(26)},  # letters in a filled circle
    **{chr(0x1F170 + i): chr(ord("A") + i) for i in range(26)},  # and in a filled square
}
_TRANSLATE = str.maketrans(_TABLE)
# Formatting marks that nobody sees: zero width, direction, variation selectors, keycaps.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\u20e3]")
_SUPERSCRIPT, _SUBSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻]+"), re.compile("[₀-₉]+")
_VULGAR_AFTER_DIGIT = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")
_GREEK = re.compile(r"(?<![^\W\d_])[α-ωΓΔΘΛΞΠΣΦΨ](?![^\W\d_])")  # one that stands alone is a symbol
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))")

_WRAPPERS = "text[a-z]*|math(?:rm|bf|sf|it|tt|bb|cal|frak|scr|normal)|operatorname|[mhf]box|boxed|emph|underline|bm"
_WRAPPERS += "|boldsymbol|pmb|overline(?= ?{[A-Z]{2}})"
_OPENING_OR_BRACE = re.compile(rf"\\(?:{_WRAPPERS}) ?\{{|\\?[{{}}]")
_LATEX = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:textcolor|color) ?\{[^{}]*\}", ""),
        (r"</?(?:answer|b|i|strong|em|p|span)>", ""),
        (r"\\(?:displaystyle|textstyle|rm|bf|it|sf|tt|boldmath)(?![A-Za-z]) ?", ""),
        (r"\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z]) ?", ""),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z]) ?\.?", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\leq(?:slant|q)?(?![A-Za-z])", r"\\le"),
        (r"\\geq(?:slant|q)?(?![A-Za-z])", r"\\ge"),
        (r"\\(?:neq)(?![A-Za-z])", r"\\ne"),
        (r"\\lt(?![A-Za-z]) ?", "<"),
        (r"\\gt(?![A-Za-z]) ?", ">"),
        (r"\\(?:sim(?:eq)?|cong)(?![A-Za-z])", r"\\approx"),
        (r"\\(?:div)(?![A-Za-z]) ?", "/"),
        (r"\\(?:pounds)(?![A-Za-z]) ?", "£"),
        (r"\\(?:euro)(?![A-Za-z]) ?", "€"),
        (r"\\(?:yen)(?![A-Za-z]) ?", "¥"),
        (r"\\Omega(?![A-Za-z])", "Ω"),
        (r" ?\^? ?\{? ?(?:\\circ|\\degrees?|\\textdegree)(?![A-Za-z]) ?\}?", "°"),
        (r" ?\^ ?\{? ?° ?\}?", "°"),
        (r"(?<=[0-9]) ?\^ ?(?:\{o\}|o(?![A-Za-z]))", "°"),
        (r"\\\\ ?$", ""),  # the end of a line
        (r"(?<![A-Za-z\\])\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"([\^_])\{([A-Za-z0-9])\}(?![0-9])", r"\1\2"),
        (r"(?<=[0-9]0)'s(?![A-Za-z])", "s"),  # "the 1990's"
        (r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))", ""),  # thin spaces between groups of digits
        (r"\\!", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))", " "),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?:^|(?<= ))~ ?(?=[0-9.$€£-])", r"\\approx "),
        (r"~", " "),
        (r"\\\$", "＄"),  # a currency; what is left of $ is a delimiter of mathematics
        (r"\\([%#&_])", r"\1"),
        (r"\$\$", "$"),
    )
)
_MICRO = re.compile(r"(?<=[0-9 ])\\mu ?(?=(?:m|s|g|A|V|F|L|C|W|H)(?![A-Za-z]))")
_FRAC_DIGITS = re.compile(r"\\frac ?([0-9]) ?([0-9])")
_ROOT_DIGIT = re.compile(r"\\sqrt ?([0-9])")
_QUOTES = {'"': '"', "'": "'", "`": "`", "「": "」", "『": "』", "【": "】", "《": "》", "〈": "〉", "«": "»", "‹": "›"}
_MARKDOWN = ("**", "__", "*", "_")
_BULLET = re.compile(r"(?:[•◦▪] ?|#+ |\* |- (?=[^\W\d]))")
_WORD_IN_PARENTHESES = re.compile(r"\(([^\W\d_]{2,}(?:[ '-][^\W\d_]+)*)\)")
_BRACKETED = r"[+-]?[0-9.]{1,30}(?:/[0-9]{1,30})?[%°]?"
_NUMBER_IN_BRACKETS = re.compile(rf"\( ?{_BRACKETED} ?\)|\[ ?{_BRACKETED} ?\]")


def spell(text: str) -> str:
    r"""The text in one spelling, white space folded, without what surrounds it; case is kept.

    `text` has at most MAX_ANSWER_CHARS characters. Paired `$` go; a single one, or `\$`, stays as a currency's "$".
    """
    text = _INVISIBLE.sub("", text)
    text = _SUPERSCRIPT.sub(lambda m: _script("^", m[0]), text)
    text = _SUBSCRIPT.sub(lambda m: _script("_", m[0]), text)
    text = _VULGAR_AFTER_DIGIT.sub(" ", text).translate(_TRANSLATE)
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_TRANSLATE).split())
    text = _GREEK.sub(_greek, _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2]}}}", text))
    for pattern, new in _LATEX:
        text = pattern.sub(new, text)
    text = _MICRO.sub("μ", _unwrap(text))
    text = _ROOT_DIGIT.sub(r"\\sqrt{\1}", _FRAC_DIGITS.sub(r"\\frac{\1}{\2}", text))
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    return strip_surroundings(" ".join(text.replace("＄", "$").split()))


def strip_surroundings(text: str) -> str:
    """Without bullets, quotes, Markdown, a group's braces and closing punctuation around it."""
    before = None
    while text != before:  # each round takes at least one character off
        before = text
        text = text.rstrip(".,;:? ").lstrip(",;:= ")
        text = re.sub(r"(?<=[^\W\d_]{2})!+$", "", text)  # "yes!", but not the factorials "5!" and "n!"
        text = "" if text == "$" else text
        if bullet := _BULLET.match(text):
            text = text[bullet.end() :]
        elif len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
            text = text[1:-1]
        elif text.startswith("{") and closing_brace(text, 1) == len(text) - 1:
            text = text[1:-1]
        elif _WORD_IN_PARENTHESES.fullmatch(text) or _NUMBER_IN_BRACKETS.fullmatch(text):
            text = text[1:-1]
        else:
            mark = next(
                (m for m in _MARKDOWN if len(text) > 2 * len(m) and text.startswith(m) and text.endswith(m)), ""
            )
            text = text[len(mark) : len(text) - len(mark)]
    return text


def _script(mark: str, run: str) -> str:
    digits = unicodedata.normalize("NFKC", run).replace("−", "-")
    return f"{mark}{digits}" if len(digits) == 1 else f"{mark}{{{digits}}}"


def _greek(match: re.Match) -> str:
    _, case, _, *_, name = unicodedata.name(match[0]).split()
    return f"\\{name.title() if case == 'CAPITAL' else name.lower()} "


def _unwrap(text: str) -> str:
    r"""Removes `\text{...}` and similar wrappers at any depth; a space separates a unit from its number.

    An unclosed wrapper stays as it is.
    """
    out: list[str] = []
    open_ones: list[int | None] = []  # where in `out` a wrapper opens; None for a plain brace
    last = 0
    for token in _OPENING_OR_BRACE.finditer(text):
        out += [text[last : token.start()], token[0]]
        last = token.end()
        if token[0].endswith("{") and token[0] != "\\{":
            open_ones.append(len(out) - 1 if len(token[0]) > 2 else None)
        elif token[0] == "}" and open_ones and (opening := open_ones.pop()) is not None:
            before, content = "".join(out[max(0, opening - 3) : opening]), "".join(out[opening + 1 : opening + 2])
            content = content or text[last : last + 1]
            is_number = before[-1:].isdigit() and before[-2:-1] not in ("_", "^")
            out[opening] = " " if (is_number or before[-1:] == "}") and content[:1].isalpha() else ""
            out[-1] = ""
    return "".join([*out, text[last:]])
