"""Short answers in words: articles, plurals and synonyms that do not change what is meant."""

import re

_ARTICLE = re.compile(r"(?:a|an|the|some|my|its|their) (?=[\w\"'])")
# Signs of mathematics, where neither a hyphen nor an "a" or an "s" may go; "red/blue" is none.
_MATHEMATICS = re.compile(r"[\\^=+*<>|]|(?<![^\W\d_]{2})/|/(?![^\W\d_]{2})")
# A hyphen, and not a minus: "x-ray", "covid-19", "5-pointed", but neither "x-y" nor "log-1".
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_])|(?<=\w)-(?=[^\W\d_]{2})|(?<=[^\W\d_]{4})-(?=[0-9])")
# Ways of saying one thing, whatever the words.
_COLORS = "red|blue|green|yellow|black|white|gray|grey|brown|orange|purple|pink|violet|gold|silver|beige|tan|navy"
_NUMBER = r"-?[0-9]{1,30}(?:[.,][0-9]{1,30})?%?"
_SAME = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=[^\W\d_])'(?=[^\W\d_])", ""),  # McDonald's
        (r"(?<=[^\W\d_])\.(?= )", ""),  # St. Louis
        (r", then ", " then "),
        (r",? (?:and|&) |, ", " and "),  # "I, II, and III"
        (r" and (?:an?|the) ", " and "),
        (r"^(?:(?:to|on|at|in) )?(?:the )?(left|right|top|bottom|front|back)(?: hand)?(?: side)?$", r"\1"),
        (r"^([0-9]{3}) (?=[0-9]{4}$)", r"\1-"),  # a telephone number
        (rf"^(?:from )?({_NUMBER})(?: to |-)({_NUMBER})(?= |$)", r"\1 to \2"),
        (rf"^(?:colou?r )?({_COLORS})(?: in colou?r| colou?r(?:ed)?)?$", r"\1"),
    )
)
_AMERICAN = {
    "colour": "color", "grey": "gray", "centre": "center", "theatre": "theater", "favourite": "favorite",
    "neighbour": "neighbor", "flavour": "flavor", "harbour": "harbor", "armour": "armor", "honour": "honor",
    "labour": "labor", "litre": "liter", "metre": "meter", "fibre": "fiber", "aluminium": "aluminum",
    "tyre": "tire", "moustache": "mustache", "pyjamas": "pajamas", "jewellery": "jewelry", "colours": "colors",
}  # fmt: skip
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
)
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf",
    "loaves": "loaf", "potatoes": "potato", "tomatoes": "tomato", "oxen": "ox", "dice": "die",
}  # fmt: skip
_NO_PLURAL = ("ss", "us", "is")  # glass, cactus, tennis
_SINGULAR = frozenset("gas canvas atlas christmas chaos cosmos lens news series species physics mathematics".split())


def word_form(text: str) -> str:
    """A lower-case answer without its article; up to three words, also in the singular, with synonyms unified.

    Mathematics stays as it is: "-x" is not "x".
    """
    if _MATHEMATICS.search(text):
        return text
    text = _HYPHEN.sub(" ", text.removeprefix("both "))
    text = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    for pattern, new in _SAME:
        text = pattern.sub(new, text)
    words = [_AMERICAN.get(word, word) for word in text.split()]
    text = " ".join(words)
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
    if len(word) > 3 and word.endswith("s") and word[-2].isalpha() and not word.endswith(_NO_PLURAL):
        return word[:-1]
    return word


_SYNONYM = {" ".join([*w.split()[:-1], _singular(w.split()[-1])]): group[0] for group in _SYNONYMS for w in group}
