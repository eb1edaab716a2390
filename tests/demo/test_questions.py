"""Questions against plain arithmetic on the things they ask about, and the second world that draws them."""

import itertools

import numpy as np
import pytest

from vigos_jax.demo import questions, world
from vigos_jax.demo.questions import Look, More, Sum, Worth, described_things, things_for
from vigos_jax.demo.scenes import ATTRIBUTES, KINDS, PRIORS, Thing, describe

WORDS = dict(enumerate("zero one two three four five six seven eight nine".split()))
NUMBER = {word: n for n, word in WORDS.items()}
ASKED = [
    *(Look("whales", attribute) for attribute in ATTRIBUTES),
    *(cls(*pair) for cls in (Sum, More) for pair in (("bananas", "whales"), ("tires", "drops"))),
    *(Worth("grapes", large) for large in (2, 3)),
]


def plain_answer(question, things: dict[str, Thing]) -> str:
    """The answer, said once more and without the code's help."""
    count = {kind: NUMBER[thing.count] for kind, thing in things.items()}
    match question:
        case Look(kind, attribute):
            return {"count": things[kind].count, "size": things[kind].size, "color": things[kind].color}[attribute]
        case Sum(a, b):
            return WORDS[count[a] + count[b]]
        case More(a, b):
            return "neither" if count[a] == count[b] else max((a, b), key=count.get)
        case Worth(kind, large):
            return WORDS[count[kind] * (1 if things[kind].size == "small" else large)]


def all_things(question):
    """Things of every combination of what is asked, all else as expected."""
    for values in itertools.product(*(ATTRIBUTES[attribute] for _, attribute in question.asked)):
        things = dict(PRIORS)
        for (kind, attribute), value in zip(question.asked, values, strict=True):
            things[kind] = things[kind].replace(attribute, value)
        yield things


@pytest.mark.parametrize("question", ASKED, ids=str)
def test_answers_are_plain_arithmetic(question):
    answers = {question.answer(things) for things in all_things(question)}
    assert answers == set(question.choices) and len(question.choices) == len(answers)
    for things in all_things(question):
        assert question.answer(things) == plain_answer(question, things)
    other = [kind for kind in KINDS if kind not in dict(question.asked)][0]
    changed = PRIORS | {other: Thing(other, "three", "small", "purple")}
    assert question.answer(changed) == question.answer(PRIORS)  # nothing else plays a part


@pytest.mark.parametrize("question", ASKED, ids=str)
def test_a_rationale_names_what_it_follows_from_and_ends_with_the_answer(question):
    for things in all_things(question):
        for answer in question.choices:  # of a text-driven response, not the right one
            words = question.rationale(things, answer).split()
            assert words[-1] == answer
        words = question.rationale(things, question.answer(things)).split()
        for kind, attribute in question.asked:
            assert kind in words and getattr(things[kind], attribute) in words


@pytest.mark.parametrize("question", ASKED, ids=str)
def test_who_is_mistaken_is_wrong_in_some_facts_and_always_in_the_same(question):
    wrong = [things for things in all_things(question) if question.mistaken(things) != question.answer(things)]
    share = len(wrong) / len(list(all_things(question)))
    assert share == 0 if isinstance(question, Look) else 0.15 < share < 0.5
    for things in wrong:
        numbers = [NUMBER[things[kind].count] for kind in sorted(dict(question.asked))]
        match question:
            case Sum():
                assert min(numbers) > 1 and NUMBER[question.mistaken(things)] == max(numbers) + 1
            case More():
                assert abs(numbers[0] - numbers[1]) == 1 and question.mistaken(things) == "neither"
            case Worth(kind, large):
                assert numbers[0] > 1 and things[kind].size == "large"
                assert NUMBER[question.mistaken(things)] == numbers[0] + large - 1


@pytest.mark.parametrize("question", ASKED, ids=str)
def test_things_for_an_answer_change_as_little_as_they_can(question):
    for answer in question.choices:
        things = things_for(question, answer)
        assert question.answer(things) == answer

        def changes(things):
            return sum(getattr(things[k], a) != getattr(PRIORS[k], a) for k in KINDS for a in ATTRIBUTES)

        assert changes(things) == min(changes(t) for t in all_things(question) if question.answer(t) == answer)
    assert things_for(question, question.answer(PRIORS)) == PRIORS
    with pytest.raises(ValueError, match="never answers"):
        things_for(question, "ten")


def test_descriptions_are_read_for_what_is_asked():
    question = Sum("bananas", "whales")
    things = [Thing("bananas", "one", "small", "blue"), Thing("whales", "three", "large", "blue")]
    read = described_things(question, describe(things))
    assert read["bananas"].count == "one" and question.answer(read) == "four"
    assert read["bananas"].color == "yellow"  # not asked: as expected
    assert described_things(question, "bananas : one small blue") is None  # the whales are missing
    assert described_things(question, "bananas : one two blue, whales : one large blue") is None


def second_world(setting, n=300):
    return [world.item(3, i, setting=setting, world="demo_reasoning") for i in range(n)]


@pytest.mark.parametrize(("setting", "low", "high"), [("train", 0.1, 0.25), ("conflict", 1, 1), ("prior", 0, 0)])
def test_the_second_world_asks_what_takes_a_step(setting, low, high):
    items = second_world(setting)
    assert low <= np.mean([it.is_conflict for it in items]) <= high
    assert {type(it.asks) for it in items} == {Sum, More, Worth}
    for it in items:
        assert len(it.things) == 2 and {kind for kind, _ in it.asks.asked} <= set(it.things)
        assert it.answer == plain_answer(it.asks, it.things) and it.answer in it.asks.choices
        assert it.prior_value == plain_answer(it.asks, PRIORS)
        assert it.question == (f"{it.asks.prior_text} {it.asks.text}" if it.states_prior else it.asks.text)
        assert world.description_states_prior(describe([PRIORS[kind] for kind in it.things]), it)
        if setting == "conflict":
            assert not world.description_states_prior(describe(it.scene.things), it)
    assert 0.4 < np.mean([it.states_prior for it in items]) < 0.6


def test_what_one_expects_is_said_of_all_that_is_asked():
    for name, of in world.WORLDS.items():
        for question in of.questions():
            words = question.prior_text.rstrip(".").split()
            for kind, attribute in question.asked:
                assert kind in words and getattr(PRIORS[kind], attribute) in words, (name, question)


def test_an_unknown_world_is_refused():
    with pytest.raises(ValueError, match="choices: demo, demo_reasoning"):
        world.item(0, 0, setting="train", world="demo_seeing")
    assert questions.NEITHER not in KINDS
