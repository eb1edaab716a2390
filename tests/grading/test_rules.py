"""The router of graders: a table of pairs, who decided each, and what hostile text may cost."""

import json
import pathlib
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vigos_jax.grading import algebra
from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.choice import option_index
from vigos_jax.grading.rules import GRADERS, grade

# Lines of: a reference, its options, the precision of numbers, right and wrong answers, and which grader decides
# about the wrong ones, where that is certain.
TABLE = pathlib.Path(__file__).parents[1] / "fixtures" / "answers.jsonl"
PAIRS = [
    (answer, row["reference"], tuple(row["options"]), row["precision"], is_right, None if is_right else row["decides"])
    for row in map(json.loads, TABLE.read_text(encoding="utf-8").splitlines())
    for answers, is_right in ((row["right"], True), (row["wrong"], False))
    for answer in answers
]


# Lines of: kind, prediction, reference, options, precision, and what a person says.
PEOPLE = [json.loads(line) for line in (pathlib.Path(__file__).parent / "pairs.jsonl").read_text("utf-8").splitlines()]
NEEDS_ALGEBRA = 0.97  # the share of the pairs that is right without it is at least this


@pytest.fixture(scope="module")
def math():
    with MathGrader(deadline=2.0) as grader:
        yield grader


def test_the_table_is_large():
    assert len(PAIRS) >= 300 and len({(p[0], p[1], p[2], p[3]) for p in PAIRS}) == len(PAIRS)


def test_the_table(math):
    """All at once: every wrong verdict is shown."""
    faults = []
    for answer, reference, options, precision, is_right, who in PAIRS:
        verdict = grade(answer, reference, options=options, precision=precision, math=math)
        assert verdict.grader in GRADERS
        expected = "no_answer" if not answer else who or verdict.grader
        if (verdict.is_correct, verdict.grader) != (is_right, expected):
            faults.append((answer[:40], reference, options, verdict))
    assert not faults, "\n".join(map(str, faults))


def wrong_pairs(math):
    for row in PEOPLE:
        asked = {key: row[key] for key in ("options", "precision")}
        verdict = grade(row["prediction"], row["reference"], **asked, math=math)
        assert verdict.grader in GRADERS
        if verdict.is_correct != row["correct"]:
            yield row["kind"], row["prediction"], row["reference"], verdict


def test_every_pair_is_graded_as_a_person_would(math):
    """The size and the share that docs/evaluation.md tells."""
    assert len(PEOPLE) == 1305 and sum(not row["correct"] for row in PEOPLE) == 628
    faults = list(wrong_pairs(math))
    assert not faults, "\n".join(map(str, faults))


def test_without_algebra_no_pair_is_right_that_should_not_be():
    faults = list(wrong_pairs(None))
    assert not any(verdict.is_correct for *_, verdict in faults)
    assert len(faults) <= (1 - NEEDS_ALGEBRA) * len(PEOPLE)


@pytest.mark.parametrize(
    "answer", ["\\frac{\\sqrt{3}}{2}", "[2,5)", "x=2 or x=-2", "\\{1,2\\}", "(1,2)", "90°", "B. red"]
)
def test_a_second_meaning_makes_an_answer_wrong(math, answer):
    """However the right one is spelled: beside another one it is not an answer."""
    assert grade(answer, answer, math=math).is_correct
    for other in ("7", "(C)", "yes", "blue"):
        for joined in (f"{answer} or {other}", f"{answer}, {other}", f"either {other} or {answer}", f"not {answer}"):
            assert not grade(joined, answer, math=math).is_correct, joined


def test_without_algebra_expressions_are_text(math):
    assert grade(r"\sqrt{8}", r"2\sqrt{2}", math=math).is_correct
    assert not grade(r"\sqrt{8}", r"2\sqrt{2}").is_correct


def test_no_answer():
    for answer in (None, "", "  ", "$$", "..."):
        assert grade(answer, "7") == grade(answer, "A", options=("x", "y")) and grade(answer, "7").grader == "no_answer"


def test_option_index():
    assert option_index("(b) y", ("x", "y")) == 1 and option_index("z", ("x", "y")) is None
    assert option_index("C", ("x", "y")) is None and option_index("x", ("x", "x")) is None


@given(st.text(max_size=60), st.text(max_size=20), st.lists(st.text(max_size=8), max_size=4))
def test_any_text_gets_a_verdict(answer, reference, options):
    assert grade(answer, reference, options=options, precision=1).grader in GRADERS


# -- the worker -------------------------------------------------------------------------------------------------


def test_a_worker_that_hangs_is_killed_and_replaced():
    with MathGrader(deadline=0.7) as math:
        assert math.is_equal("1/2", "0.5")
        first = math._worker.pid
        start = time.monotonic()
        assert math.is_equal("10^{10^{10}}", "5") is None
        assert time.monotonic() - start < 30 and math.killed == 1
        assert math.is_equal("1/2", "0.5") and math._worker.pid != first
        math._worker.kill()  # as the system does when memory is short
        math._worker.wait()
        assert math.is_equal("1/2", "0.5") and math.killed == 1
    assert math._worker is None


@pytest.mark.parametrize("text", ["{}", "${}$", "1+{}", r"\text{{{}}}", "(lambda: {})()", "2*3;{}"])
def test_an_answer_is_never_run(math, tmp_path, text):
    file = tmp_path / "made"
    for code in (f"open('{file}','w')", f"__import__('os').system('touch {file}')"):
        for reference in ("7", "x=7", r"\sqrt{2}"):
            assert not math.is_equal(text.format(code), reference) and not math.is_equal(reference, text.format(code))
    assert not file.exists()


def test_threads_share_a_worker():
    with MathGrader() as math:
        pairs = [(f"{n}+{n}", str(2 * n + n % 2)) for n in range(20)]
        results = [None] * len(pairs)

        def ask(i):
            results[i] = math.is_equal(*pairs[i])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(pairs))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert results == [n % 2 == 0 for n in range(20)]


def test_a_worker_that_does_not_start(monkeypatch):
    monkeypatch.setattr(algebra.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        MathGrader().is_equal("1", "1")


def test_a_comparison_that_missed_its_deadline_is_not_tried_again():
    with MathGrader(deadline=0.7) as math:
        hostile = ("10^{10^{10}}", "5")
        assert math.is_equal(*hostile) is None and math.killed == 1
        start = time.monotonic()
        assert math.is_equal(*hostile) is None and math.killed == 1
        assert time.monotonic() - start < 0.2
        assert math.is_equal("10^{10}", "10000000000")


def test_a_text_that_is_no_answer_costs_nothing_however_long_it_is():
    long = "A, B or (C) of the 5 options; " * 20_000
    start = time.perf_counter()
    for options in ((), ("red", "blue", "green")):
        assert not grade(long, "B", options=options).is_correct
    assert time.perf_counter() - start < 0.5
    assert grade(f" {long} ", long.upper()).is_correct
