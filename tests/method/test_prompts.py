"""Prompt templates: what is filled in and what is not; and the cleaning of a data row's texts."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vigos_jax.data.cleaning import clean_problem, clean_reference
from vigos_jax.errors import InputError
from vigos_jax.method.prompts import fields, fill, unknown_fields


@pytest.mark.parametrize(
    "template, filled",
    [
        ("", ""),
        ("P: {problem}", "P: Q?"),
        ("{problem}{reference}{problem}", "Q?R.Q?"),
        (r"Put it in \boxed{}.", r"Put it in \boxed{}."),
        (r"\boxed{{reference}}", r"\boxed{R.}"),
        ("{} {0} {x} {problem!r} {problem:>9} {problem.a} { problem } {Problem} }{", None),  # all literal
        ("{{problem}}", "{Q?}"),
        ("{problem", None),
        ("%s %(problem)s $problem", None),
    ],
)
def test_fill(template, filled):
    assert fill(template, problem="Q?", reference="R.") == (template if filled is None else filled)


@pytest.mark.parametrize("text", ["{reference}", "{problem}", r"\1 \g<0> \n", "{}", ""])
def test_what_is_filled_in_is_left_alone(text):
    assert fill("<{problem}|{reference}>", problem=text, reference="R") == f"<{text}|R>"
    assert fill("<{problem}|{reference}>", problem="P", reference=text) == f"<P|{text}>"
    assert fill("<{problem}>", problem=text) == f"<{text}>"


@given(st.text(), st.text(st.sampled_from("{}problemrfnc")), st.text())
@example("a", "{reference}", "b")
def test_text_around_the_fields_is_kept(before, problem, after):
    if not fields(before) | fields(after):
        assert fill(before + "{problem}" + after, problem=problem) == before + problem + after


def test_a_template_that_asks_for_a_missing_reference():
    with pytest.raises(InputError) as error:
        fill("Given {reference}:\n{problem}" + "x" * 500, problem="Q?")
    message = str(error.value)
    assert "{reference}" in message and "{problem}" in message
    assert "\n" not in message and len(message) < 200
    assert fill("{problem}", problem="Q?") == "Q?"
    assert fill("<{reference}>", problem="Q?", reference="") == "<>"


def test_fields():
    assert fields("") == fields(r"\boxed{} {problems} {0}") == frozenset()
    assert fields("{problem}") == {"problem"}
    assert fields("{reference} {problem} {reference}") == {"problem", "reference"}


def test_names_of_further_columns():
    assert fields("{caption} {problem} {hint}", ("caption", "hints")) == {"caption"}
    assert fill("{caption}|{problem}|{hint}", problem="Q?", caption="C") == "C|Q?|{hint}"
    assert fill("{caption}{hint}", problem="Q?", caption="{hint} {problem}", hint="H") == "{hint} {problem}H"
    assert fill("{problem} {reference}", problem="Q?", reference="R", caption="C") == "Q? R"


@pytest.mark.parametrize(
    "template, unknown",
    [
        ("", []),
        ("{problem} {reference}", []),
        ("{caption}", ["caption"]),
        ("a{b} {c}d ({e}) \n{f_1},{_g}{h}", ["c", "e", "f_1", "_g"]),
        (r"\boxed{answer} x_{max} e^{x} \frac{a}{b}", []),
        ("{{caption}}", ["caption"]),
        ("{} {0} {1st} { caption } {problem!r} {a-b} {a.b}", []),
        ("{Problem} {REFERENCE}", ["Problem", "REFERENCE"]),
    ],
)
def test_unknown_fields(template, unknown):
    assert unknown_fields(template) == unknown
    assert unknown_fields(template, unknown) == []
    assert unknown_fields(template, ("other",)) == unknown


@given(st.text(st.sampled_from("{}\\^_ ab1")))
def test_no_unknown_field_is_ever_filled_in(template):
    """What is not refused and not a field stays as it is; what is refused would have been filled in by its name."""
    assert fill(template, problem="Q?", reference="R") == template
    for word in unknown_fields(template):
        assert fill(template, problem="Q?", **{word: "#"}) != template


@pytest.mark.parametrize(
    "text, clean",
    [
        ("  How many?\n", "How many?"),
        ("<image>\nHow many?", "How many?"),
        ("How many?<image>", "How many?"),
        ("Look at <image> and say", "Look at the image and say"),
        ("a\n\n  b", "a\n\n  b"),  # inner white space is the author's
        ("an image, <img>", "an image, <img>"),
        (" <image> ", ""),
        ("", ""),
        (None, ""),
        (3, ""),
    ],
)
def test_clean_problem(text, clean):
    assert clean_problem(text) == clean


@pytest.mark.parametrize(
    "answer, clean",
    [
        ("red", "red"),
        ("  Dark red \n", "Dark red"),
        (r"\boxed{12}", "12"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a} and \boxed{b}", "b"),
        (r"\boxed{a} and \boxed{b", "a"),
        (r"so \boxed{7}.", "7"),
        (r"\boxed{", r"\boxed{"),
        (r"\boxed{}", ""),
        ("```python\n7\n```", "7"),
        ("```\n\\boxed{12}\n```", "12"),
        ("```7```", "7"),
        ("``````", "``````"),
        ("answer：  D ", "D"),
        ("Answer: C", "C"),
        ("ANSWER :C", "C"),
        ("answers: C", "answers: C"),
        ("<ANSWER>No</ANSWER>", "No"),
        ("<answer> yes </answer>", "yes"),
        (r"<answer>\boxed{9}</answer>", "9"),
        ("<answer>Answer: 'B'</answer>", "B"),
        ("<answer>", "<answer>"),
        ("It is wet, so <answer>B</answer>.", "B"),
        ("<answer>A</answer> no, <answer> C </answer>", "C"),
        ("<think>Why?\n<answer>A</answer></think>\n<answer>B</answer>", "B"),
        ("<answer><answer>B</answer>", "B"),
        ("He has 9 * 2 = 18.\n#### 18", "18"),
        ("#### 18\nand more", "#### 18\nand more"),
        ("**Answer:** B", "B"),
        ("答案：B", "B"),
        ("'quoted'", "quoted"),
        ('"42"', "42"),
        ("'a' or 'b'", "'a' or 'b'"),
        ("'", "'"),
        ("none", "none"),
        ("", ""),
        ("  ", ""),
        (None, ""),
        ([], ""),
        (["red"], ""),
        (b"red", ""),
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (12, "12"),
        (-3, "-3"),
        (2.0, "2"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (float("nan"), ""),
        (float("inf"), ""),
        (True, "True"),
        (np.int64(0), "0"),
        (np.float32(2.5), "2.5"),
    ],
)
def test_clean_reference(answer, clean):
    assert clean_reference(answer) == clean


@given(st.text() | st.floats() | st.integers() | st.none())
def test_clean_reference_of_anything_is_a_stripped_text(answer):
    clean = clean_reference(answer)
    assert clean == clean.strip()


def test_a_column_may_have_any_name():
    assert fill("<{template}> {problem}", problem="Q?", **{"template": "T"}) == "<T> Q?"
