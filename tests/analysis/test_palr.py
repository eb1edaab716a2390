"""The leakage ratio's arithmetic, and where wrong answers come from."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vigos_jax.analysis import palr
from vigos_jax.analysis.palr import TokenCorrections
from vigos_jax.analysis.wrong_answers import choices_of, choose, read_file
from vigos_jax.errors import InputError
from vigos_jax.grading.rules import grade


def test_mixture_is_the_mean_probability():
    logps = np.log(np.array([[0.5, 1e-30], [0.25, 3e-30], [1e-3, 0.5]]))
    used = np.array([True, True, False])
    np.testing.assert_allclose(palr.mixture_logp(logps, used), np.log([0.375, 2e-30]))
    np.testing.assert_allclose(palr.mixture_logp(logps, ~used), logps[2])
    # A mean of log-probabilities would be another number.
    assert abs(palr.mixture_logp(logps, used) - logps[:2].mean(0)).min() > 0.05


def test_token_scores():
    scores = palr.token_corrections(
        position=np.array([4, 5, 6]),
        role=np.array([0, 1, 1]),
        shows_reference=np.array([False, True, True]),
        student=np.array([-1.0, -1.0, -3.0]),
        teacher=np.array([-2.0, -0.5, -3.5]),
        wrong=np.array([-9.0, -2.0, -1.0]),  # the first role is shown no answer; the last finds a wrong one likelier
        image=np.array([-2.5, -0.5, -4.0]),
    )
    np.testing.assert_allclose(scores.strength, [1.0, 0.5, 0.5])
    np.testing.assert_allclose(scores.answer, [0.0, 1.5, 0.0])
    np.testing.assert_allclose(scores.image, [0.5, 0.0, 0.5])


SCORES = TokenCorrections(
    *(np.array(x) for x in ([0, 1, 3], [0, 0, 0], [1.0, 2.0, 0.5], [0.5, 0.0, 2.0], [1.5, 1.0, 0.0]))
)


def test_group_sums_and_ratio():
    everything = palr.group_sums(SCORES, np.ones(5, bool))
    np.testing.assert_allclose(everything, [1.5, 3.5, 3.5, 2.5, 2.5, 3])
    assert palr.ratio(everything) == pytest.approx(1.5 / 5.0)
    first = palr.group_sums(SCORES, np.array([True, True, False, False, False]))
    assert palr.ratio(first) == pytest.approx(0.5 / 4.0)
    assert palr.ratio(palr.group_sums(SCORES, np.zeros(5, bool))) == 0.0
    # The ratio of sums, not the mean of the tokens' ratios.
    assert palr.ratio(everything) != pytest.approx(np.mean([0.25, 0.0, 1.0]), abs=0.01)


def test_interval_covers_and_shrinks():
    rng = np.random.default_rng(0)
    answers, images = rng.exponential(1.0, 400), rng.exponential(3.0, 400)
    sums = [palr.Sums(a, i, 0.0, 0.0, 0.0, 0.0) for a, i in zip(answers, images, strict=True)]
    value = palr.ratio(palr.total(sums))
    low, high = palr.interval(sums, seed=1)
    assert low < value < high and high - low < 0.1
    few = palr.interval(sums[:20], seed=1)
    assert few[1] - few[0] > 2 * (high - low)
    assert palr.interval(sums, seed=1) == (low, high)
    assert palr.interval(sums[:1] * 9, seed=1) == pytest.approx((palr.ratio(sums[0]),) * 2)


# Wrong answers.


def test_given_answers_come_first():
    pools = {"given": ["blue", "red"], "options": ["green"], "others": {"text": ["pink"]}}
    assert choose(reference="red", count=3, seed="0", **pools) == ("given", ["blue"])
    assert choose(reference="red", count=3, seed="0", **pools | {"given": ["Red", ""]}) == ("options", ["green"])
    assert choose(reference="red", count=3, seed="0", others={"text": ["pink", "red"]}) == ("rows", ["pink"])
    assert choose(reference="red", count=3, seed="0", others={"integer": ["3"]}) == ("none", [])
    assert choose(reference="4", count=3, seed="0", others={"integer": ["4.0", "3"]}) == ("rows", ["3"])


def test_letters_stand_for_options():
    where, wrong = choose(reference="B", count=9, seed="0", options=["red", "green", "blue"])
    assert (where, sorted(wrong)) == ("options", ["A", "C"])
    assert sorted(choose(reference="green", count=9, seed="0", options=["red", "green", "blue"])[1]) == ["blue", "red"]


ANSWERS = st.sampled_from(["a cat", "A cat", "dog", "3", "3.0", "four", "x", ""])


@given(st.lists(ANSWERS, max_size=12), st.integers(1, 6))
def test_choices_are_wrong_different_and_repeatable(pool, count):
    where, wrong = choose(reference="dog", count=count, seed="s", given=pool)
    assert len(wrong) <= count and not any(grade(a, "dog").is_correct for a in wrong)
    assert not any(grade(a, b).is_correct for i, a in enumerate(wrong) for b in wrong[:i])
    assert choose(reference="dog", count=count, seed="s", given=pool) == (where, wrong)


def test_another_seed_chooses_others():
    pool = [f"thing {i}" for i in range(30)]
    assert len({tuple(choose(reference="dog", count=3, seed=str(s), given=pool)[1]) for s in range(9)}) > 5


@pytest.mark.parametrize(
    "raw, problem, options",
    [
        ({"options": ["red", 3]}, "", ["red", "3"]),
        ({"options": "['red', 'blue']"}, "", ["red", "blue"]),
        ({"options": "__import__('os').system('true')"}, "(A) x\n(B) y", ["A", "B"]),
        ({}, "Which?\n(A) red\n(B) green\n(C) blue", ["A", "B", "C"]),
        ({}, "Which? A. red B. green", ["A", "B"]),
        ({}, "Which? A) red\nB) green", ["A", "B"]),
        ({}, "Is figure (B) larger than (A) or not?", []),  # not in order: no list of options
        ({}, "A. Smith wrote it.", []),
        ({"options": []}, "What?", []),
    ],
)
def test_options(raw, problem, options):
    assert choices_of(raw, problem) == options


def test_file(tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"id": 7, "wrong_answers": ["a", 3]}\n\n{"id": "x", "wrong_answers": []}\n')
    assert read_file(str(path)) == {"7": ["a", "3"], "x": []}
    for line in ("{", "[]", '{"id": 1}', '{"id": 1, "wrong_answers": "abc"}', '{"id": 1, "wrong_answers": 3}'):
        path.write_text(json.dumps({"id": 0, "wrong_answers": ["a"]}) + "\n" + line + "\n")
        with pytest.raises(InputError, match=":2 must be") as e:
            read_file(str(path))
        assert "\n" not in str(e.value)
    path.write_bytes('\ufeff{"id": 1, "wrong_answers": ["a\u2028b\u0085c"]}\n'.encode())
    assert len(read_file(str(path))["1"]) == 1
    path.write_bytes('{"id": 1, "wrong_answers": ["红"]}\n'.encode("gbk"))
    with pytest.raises(InputError, match=":1 must be UTF-8: invalid start byte at byte"):
        read_file(str(path))
    with pytest.raises(InputError, match="cannot read config.diagnose.wrong_answers_file"):
        read_file(str(tmp_path / "none.jsonl"))
