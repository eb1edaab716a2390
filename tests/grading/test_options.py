"""Options and references from whatever a column holds."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vigos_jax.grading.options import first_number, parse_options, parse_references

RED_BLUE = ("red", "blue")


@pytest.mark.parametrize(
    "value",
    [
        ["red", "blue"],
        ("red", "blue"),
        np.array(["red", "blue"]),
        ["red", "blue", None],
        ["red", "blue", "", float("nan")],
        '["red","blue",null]',
        "['red', 'blue', None]",
        {"A": "red", "B": "blue"},
        {"B": "blue", "A": "red"},
        {"A": "red", "B": "blue", "C": None},
        {"a": "red", "b": "blue"},
        {"(A)": "red", "(B)": "blue"},
        {"0": "red", "1": "blue"},
        {1: "red", 2: "blue"},
        '{"A": "red", "B": "blue"}',
        "{'A': 'red', 'B': 'blue'}",
        {"label": ["A", "B"], "text": ["red", "blue"]},
        {"label": ["B", "A"], "text": ["blue", "red"]},
        {"text": np.array(["red", "blue"])},
        [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}],
        [{"text": "red"}, {"text": "blue"}],
        [{"A": "red"}, {"B": "blue"}],
        "A. red\nB. blue",
        "A. red B. blue",
        "(A) red\n(B) blue\n",
        "(A) red; (B) blue",
        "A) red\r\nB) blue",
        "a) red\nb) blue",
        "A: red, B: blue",
        "[A] red [B] blue",
        "red\nblue",
        ["A. red", "B. blue"],
        ["(A) red", "(B) blue"],
        ["A: red", "B: blue"],
        ["a) red", "b) blue"],
        '["A. red", "B. blue"]',
        {"A": "A. red", "B": "B. blue"},
        {"option_a": "red", "option_b": "blue"},
        "['red' 'blue']",  # as numpy writes it
        "['red'\n \"blue\"]",
        "Choices:\n(A) red\n(B) blue",
        "Options: A. red B. blue",
        "A.red B.blue",
        "（A）red（B）blue",
        "(A)red (B)blue",
        "A:red\tB:blue",
        ["**A.** red", "**B.** blue"],
        ["**A**: red", "**B**: blue"],
        ["A - red", "B - blue"],
        ["Option A: red", "Option B: blue"],
    ],
    ids=lambda value: str(value)[:30],
)
def test_one_list_in_many_forms(value):
    assert parse_options(value) == RED_BLUE


@pytest.mark.parametrize(
    "value, options",
    [
        (None, ()),
        ("", ()),
        (" None ", ()),
        ("[]", ()),
        ("{}", ()),
        ([], ()),
        (float("nan"), ()),
        (["a", None, "c", None, ""], ("a", "", "c")),  # C is the third
        (["only one"], ("only one",)),
        ("[1, 2.5]", ("1", "2.5")),
        ([True, False], ("True", "False")),
        (["A", "B", "C"], ("A", "B", "C")),  # texts, not marks of empty ones
        (["B. red", "A. blue"], ("B. red", "A. blue")),  # not their own letters
        (["A. red", "blue"], ("A. red", "blue")),
        (["A. Smith", "B. Jones"], ("Smith", "Jones")),
        ("A. the U.S. B. Mr. A. Smith", ("the U.S.", "Mr. A. Smith")),
        ("A．红\nB．蓝", ("红", "蓝")),
        (["A. 5", "B. 6", "E. none"], ("5", "6", "", "", "none")),  # E stays E
        (["A. thaliana", "E. coli"], ("A. thaliana", "E. coli")),
        (["A - B", "B - A"], ("A - B", "B - A")),  # differences
        (["Option A", "Option B"], ("Option A", "Option B")),
        ("A.M. or P.M.\nB.C.", ("A.M. or P.M.", "B.C.")),
        ("(A)3 (B)4", ("3", "4")),
        ("[\"it's 'a' 'b'\", \"c\"]", ("it's 'a' 'b'", "c")),
    ],
)
def test_what_options_are(value, options):
    assert parse_options(value) == options


@pytest.mark.parametrize(
    "value",
    [
        "red or blue",
        "['red' 'blue', 'green']",  # two or three?
        "Is it A. red or B. blue?",
        "[__import__('os')]",
        "[" * 5000,
        "(" * 300 + ")" * 300,
        "[1, [2]]",
        5,
        [["a", "b"], {"c": 1}],
        {"A": "red", "C": "blue"},  # where is B?
        {"red": 1, "blue": 2},
        {"2": "red", "3": "blue"},
        {"A": ["red"], "B": ["blue"]},
        {"label": ["A"], "text": ["red", "blue"]},
        [{"label": "A", "text": "red"}, {"label": "A", "text": "blue"}],
        [{"picture": 1}, {"picture": 2}],
        b"red",
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_understood_is_none(value):
    assert parse_options(value) is None


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1), min_size=2, max_size=5))
def test_literals_say_what_lists_do(texts):
    assert parse_options(json.dumps(texts)) == parse_options(repr(texts)) == parse_options(texts)


def test_long_options_are_read_as_json_alone():
    texts = ["a" * 25_000, "b" * 25_000]
    assert parse_options(json.dumps(texts)) == tuple(texts)
    assert parse_options(repr(texts)) is None


@pytest.mark.parametrize(
    "text",
    [
        "A. " * 30_000,
        "A. x\n" * 20_000,
        "[" * 90_000,
        "(A) (B) " * 10_000,
        "a" + " " * 90_000 + "A. x",
        "[" + "'a' " * 20_000 + "]",
        "[" + "'a' " * 4_900 + "]",  # just short enough to be read
    ],
)
def test_hostile_options_are_cheap(text):
    start = time.perf_counter()
    parse_options(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "value, references",
    [
        ("5", ["5"]),
        (5, [5]),
        (None, [None]),
        (["5", "five"], ["5", "five"]),
        ('["5", "five"]', ["5", "five"]),
        ("['5' 'five']", ["5", "five"]),
        ("['5' 'five', 'V']", ["['5' 'five', 'V']"]),
        ("['5', 'five']", ["5", "five"]),
        ("[2, 5]", ["[2, 5]"]),  # an interval
        ("(1, 2)", ["(1, 2)"]),
        ("[]", ["[]"]),
        ("[a", ["[a"]),
    ],
)
def test_references(value, references):
    assert parse_references(value) == references


@pytest.mark.parametrize(
    "value, number",
    [
        ({"1": "red", "2": "blue"}, 1),
        ('{"1": "red", "2": "blue"}', 1),
        ({1: "red", 2: "blue"}, 1),
        ({"label": ["1", "2"], "text": ["red", "blue"]}, 1),
        ([{"label": "1", "text": "red"}, {"label": "2", "text": "blue"}], 1),
        ({"0": "red", "1": "blue"}, 0),
        ({"A": "red", "B": "blue"}, 0),
        (["1", "2"], 0),
        ([{"text": "1"}, {"text": "2"}], 0),
        ("red\nblue", 0),
        (None, 0),
        (float("nan"), 0),
    ],
)
def test_numbers_that_label_options_are_what_an_answer_counts_with(value, number):
    assert first_number(value) == number
