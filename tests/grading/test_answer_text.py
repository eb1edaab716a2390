"""Grading: which answers count as equal, which near misses do not, and that hostile ones cost nothing."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vigos_jax.grading.answer_text import (
    answer_kind,
    last_boxed,
    mentions,
    normalize_answer,
)
from vigos_jax.grading.rules import grade
from vigos_jax.grading.spelling import MAX_ANSWER_CHARS


def is_correct(prediction, reference):
    return grade(prediction, reference).is_correct


@pytest.mark.parametrize(
    "text, content",
    [
        ("", None),
        ("red", None),
        (r"\boxed{12}", "12"),
        (r"\boxed{a} and \boxed{b}", "b"),
        (r"\boxed{\frac{1}{2}} x}", r"\frac{1}{2}"),
        (r"\boxed{ red }", "red"),
        (r"\boxed{}", ""),
        (r"\boxed{a}, then \boxed{}", ""),  # the last one, even if nothing is in it
        (r"\boxed{a}, then \boxed{b", "a"),  # ... but only if it is closed
        (r"\boxed{a \boxed{b}", "b"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{a} \boxed{b} \boxed{{c}", "b"),
        (r"}}{ \boxed{a}", "a"),
        (r"\boxed {a} boxed{b} \Boxed{c}", None),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{a\}b}", "a\\"),  # an escaped brace is a brace, as in training
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def slow_last_boxed(text):
    for start in reversed(range(len(text))):
        if text.startswith("\\boxed{", start):
            rest = text[start + 7 :]
            for end in range(len(rest)):
                if rest[: end + 1].count("}") == rest[: end + 1].count("{") + 1:
                    return rest[:end].strip()
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", " "]), max_size=20).map("".join))
@example("\\boxed{\\boxed{}a}")
def test_last_boxed_agrees_with_a_search_from_every_start(text):
    assert last_boxed(text) == slow_last_boxed(text)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("", ""),
        (" \n ", ""),
        ("$$", ""),
        ("...", ""),
        ("Red", "red"),
        ("  light \n blue ", "light blue"),
        ('"red."', "red"),
        ("'red'.", "red"),
        ("“Red”", "red"),
        ("`red`", "red"),
        ("**red**", "red"),
        ("Yes!", "yes"),
        (r"\text{red}", "red"),
        (r"\textbf{\text{ Red }}", "red"),
        (r"$\mathrm{red}$", "red"),
        (r"\(red\)", "red"),
        ("B", "b"),
        ("(B)", "b"),
        ("B.", "b"),
        ("B)", "b"),
        ("[B]", "b"),
        (r"\text{(B)}.", "b"),
        ("7", "7"),
        ("007", "7"),
        ("+7", "7"),
        ("−7.50", "-15/2"),
        ("7.", "7"),
        ("2.0", "2"),
        (".5", "1/2"),
        ("1/2", "1/2"),
        ("2 / 4", "1/2"),
        ("-1/2", "-1/2"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac{1}{2}", "-1/2"),
        (r"\tfrac12", "1/2"),
        (r"\frac{0.5}{-2}", "-1/4"),
        ("1,234,567", "1234567"),
        ("$1,200.0$", "1200"),
        (r"\$5", "5 $"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("1e3", "1000"),
        ("1.5E-2", "3/200"),
        ("12cm", "12 cm"),
        (r"12.0\text{ cm}", "12 cm"),
        (r"50\%", "50 %"),
        (r"30^\circ", "30 °"),
        (r"30^{\circ}", "30 °"),
        ("30º", "30 °"),
        (r"1\frac{1}{2}", "3/2"),
        ("1½", "3/2"),
        ("２．５", "5/2"),
        ("2.5×10⁻³", "1/400"),
        ("twenty-one", "21"),
        ("minus two", "-2"),
        ("3rd", "3 th"),
        ("third", "3 th"),
        ("Three cats", "3 cat"),
        ("60 km/h", "60 h^-1 km"),
        ("5 meters per second squared", "5 m s^-2"),
        ("€5.00", "5 €"),
        ("√３", r"\sqrt{3}"),
        ("red\u200b。", "red"),
        (r"\mathsf{\mathbf{B}}", "b"),
        ("March 1st, 2024", "2024-03-01"),
        # what is not a number stays text
        ("1/0", "1/0"),
        (r"\frac{1}{0}", "1/0"),
        ("1,23", "1,23"),
        ("0,123", "0,123"),
        ("1,2345", "1,2345"),
        ("1.2.3", "1.2.3"),
        ("1_000", "1_000"),
        ("--1", "--1"),
        ("5!", "5!"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("0x10", "0x10"),
        ("٣", "٣"),  # a digit for str.isdigit() and int(), but not for us
        ("x²", "x^2"),
        ("1990s", "1990s"),
        ("5m", "5m"),
        ("1e999999999", "1e999999999"),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    "prediction, reference",
    [
        ("red", "Red"),
        ("(B)", "b"),
        ("B. tree", "B"),
        ("(B) tree", "B"),
        ("B", "B: tree"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        ("0.50", ".5"),
        ("1,000", "1000"),
        ("1e3", "1000"),
        ("12 cm", "12"),
        ("12", r"12\text{ cm}"),
        ("12cm", "12.0 cm"),
        ("90°", "90"),
        (r"\text{red}", "red"),
        ("True", "true"),
        ("-3", "−3"),
        ("0", "0.0"),
    ],
)
def test_correct(prediction, reference):
    assert is_correct(prediction, reference)
    assert is_correct(reference, prediction)


@pytest.mark.parametrize(
    "prediction, reference",
    [
        (None, "a"),
        (None, ""),
        ("", ""),
        ("", "a"),
        (".", "a"),
        ("a", ""),
        ("B", "C"),
        ("B tree", "B"),
        ("A. tree", "B"),
        ("B. tree", "B. house"),
        ("AB", "A"),
        ("A, B", "A"),
        ("dark red", "red"),
        ("no", "on"),
        ("not yes", "yes"),
        ("12 cm", "12 mm"),
        ("12 cm", "13"),
        ("12 and 13", "12"),
        ("12x", "12"),
        ("12 x", "12"),
        ("5m", "5"),
        ("1990s", "1990"),
        (".5", "5"),
        ("-5", "5"),
        ("1/2", "2"),
        ("12", "1/2"),
        ("0.3333", "1/3"),
        ("1.0000001", "1"),
        ("1234", "1,2,3,4"),
        ("1.234", "1,234"),
        ("1\\frac{1}{2}", "11/2"),
        ("x²", "x2"),
        ("٣", "3"),
        ("9**9**9", "9"),
        ("__import__('os')", "0"),
    ],
)
def test_wrong(prediction, reference):
    assert not is_correct(prediction, reference)
    if prediction is not None:
        assert not is_correct(reference, prediction)


@pytest.mark.parametrize(
    "kind, answers",
    [
        ("", ["", "  ", "$$", "...", "\\text{}"]),
        ("letter", ["b", "B", "(B)", "[B]", "B.", r"\text{(B)}.", "I", "x"]),
        ("yes_no", ["yes", "No.", "TRUE", '"false"', "Yes!"]),
        ("integer", ["7", "007", "+7", "-3", "1,200", "$12$", "2.0", "1e3", "12 cm", "50%", "3 kg"]),
        ("number", ["2.5", ".5", "1/2", r"\frac12", "-7/3", "0.5 kg", "12.5%"]),
        ("text", ["red", "two", "3 apples", "12:30", "1990s", "5!", "x+1", "B. red", "é", "yes and no", "a b"]),
    ],
)
def test_answer_kind(kind, answers):
    assert {answer: answer_kind(answer) for answer in answers} == dict.fromkeys(answers, kind)


@pytest.mark.parametrize(
    "text, answer, found",
    [
        ("a red square", "red", True),
        ("Red.", "red", True),
        ("a RED square", "Red", True),
        ("two dark  red\nsquares", "dark red", True),
        ("it shows (red)!", "red", True),
        ("a dark-red one", "red", True),
        ("redred, then red", "red", True),  # not the first time, but later
        ("3 apples", "3", True),
        ("sale: 50% off", "50%", True),
        ("it is -3", "-3", True),
        ("I see 日本 there", "日本", True),
        ("a reddish square", "red", False),  # not as a word of its own
        ("an infrared lamp", "red", False),
        ("red3 3red", "red", False),
        ("13 or 31", "3", False),
        ("it is 12.5 cm", "12", False),  # nor inside another number
        ("it is 12.5 cm", "5", False),
        ("it is -12", "12", False),
        ("it is -12", "-12", True),
        ("-12", "12", False),
        ("a half, 1/2", "2", False),
        ("1,200 of them", "200", False),
        ("1, 200 or more", "200", True),
        ("from 5-12", "12", True),  # a range
        ("it is 12.", "12", True),
        ("150% off", "50%", False),
        ("squares of dark red", "dark squares", False),  # not in this order
        ("dark and red", "dark red", False),
        ("", "red", False),
        ("red", "red square", False),
        ("option B", "B", None),  # a lone letter proves nothing
        ("option B", "(b)", None),
        ("anything", "", None),
        ("anything", "  ", None),
    ],
)
def test_mentions(text, answer, found):
    assert mentions(text, answer) is found


@given(st.text(max_size=5), st.text(st.sampled_from("abc 1-%"), min_size=1, max_size=6), st.text(max_size=5))
def test_an_answer_that_stands_by_itself_is_mentioned(before, answer, after):
    expected = None if answer_kind(answer) == "letter" or not answer.strip() else True
    assert mentions(f"{before} {answer} {after}", answer) is expected


HOSTILE = [
    "9**9**9",
    "9^{9^{9^{9}}}",
    "9" * 10_000,
    "9" * 10_000 + " cm",
    "1e" + "9" * 20,
    "1/" + "9" * 900,
    "1," * 490,
    "1,234" * 190,
    "0." + "0" * 900,
    r"\frac" * 180,
    r"\frac{" * 150,
    r"\text{" * 160,
    r"\text{" * 100 + "}" * 100,
    "{" * 100_000,
    "}" * 100_000,
    "\\boxed{" * 20_000,
    "\\boxed{" * 20_000 + "}" * 20_000,
    "$" * 100_000,
    '"' * 900,
    "!" * 900,
    "ab" + "!" * 900 + "c",
    " " * 100_000 + "x",
    "(" * 900 + "b" + ")" * 900,
    "12 " + "cm " * 300,
    "\x00",
    "\ud800",
    "²³",
    "٣/٤",
    "ß" * 900,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_answers_are_cheap(text):
    start = time.perf_counter()
    last_boxed(text)
    assert is_correct(text, text) == bool(normalize_answer(text))
    assert not is_correct(text, "another answer") and not is_correct("another answer", text)
    assert time.perf_counter() - start < 2  # milliseconds each; a blow-up would not end


def test_a_very_long_answer_is_compared_as_text():
    long = "9" * (MAX_ANSWER_CHARS + 1)
    assert normalize_answer(long + ".0") == long + ".0"
    assert is_correct(long, long) and not is_correct(long + ".0", long)


@given(st.text(st.sampled_from("aB1029.,/-+$ (){}\\\"'!?%°e")) | st.text(), st.text(max_size=8))
def test_grading_any_text(prediction, reference):
    normal = normalize_answer(prediction)
    assert is_correct(prediction, prediction) == bool(normal)
    assert is_correct(prediction, reference) == is_correct(reference, prediction)
