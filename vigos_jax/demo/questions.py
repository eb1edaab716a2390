"""The demo's questions: what each answer depends on, and the reasoning steps that lead to it.

A question does not depend on an image: given things, as shown, described or expected, it returns the answer and its
rationale.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vigos_jax.demo.scenes import ATTRIBUTES, PRIORS, Thing, description_states

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEITHER = "neither"

Things = Mapping[str, Thing]  # kind -> thing


class Question(Protocol):
    """What is asked about things."""

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """The (kind, attribute) pairs that the answer follows from."""
        ...

    @property
    def choices(self) -> tuple[str, ...]:
        """Every right answer there is."""
        ...

    @property
    def text(self) -> str:
        """The question."""
        ...

    @property
    def prior_text(self) -> str:
        """What one expects of what is asked, stated as a fact."""
        ...

    def answer(self, things: Things) -> str:
        """The right answer where things are like this."""
        ...

    def rationale(self, things: Things, answer: str) -> str:
        """The steps from what is seen of `things` to `answer`, which need not be the right one."""
        ...

    def mistaken(self, things: Things) -> str:
        """The answer given correct perception but a wrong last reasoning step; it may happen to be right."""
        ...


@dataclass(frozen=True)
class Look:
    """One attribute of one kind, which is there to be seen."""

    kind: str
    attribute: str

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """See `Question`."""
        return ((self.kind, self.attribute),)

    @property
    def choices(self) -> tuple[str, ...]:
        """See `Question`."""
        return ATTRIBUTES[self.attribute]

    @property
    def text(self) -> str:
        """`What color are the bananas?`."""
        if self.attribute == "count":
            return f"How many {self.kind} are there?"
        return f"What {self.attribute} are the {self.kind}?"

    @property
    def prior_text(self) -> str:
        """`Usually the bananas are yellow.`."""
        return f"Usually the {self.kind} are {self.answer(PRIORS)}."

    def answer(self, things: Things) -> str:
        """See `Question`."""
        return getattr(things[self.kind], self.attribute)

    def rationale(self, things: Things, answer: str) -> str:
        """`the bananas are blue`: what is to be seen is already the answer."""
        return f"the {self.kind} are {answer}"

    def mistaken(self, things: Things) -> str:
        """The right answer: there is no step to get wrong."""
        return self.answer(things)


@dataclass(frozen=True)
class _TwoCounts:
    """What is asked follows from how many there are of two kinds."""

    first: str
    second: str

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """See `Question`."""
        return ((self.first, "count"), (self.second, "count"))

    @property
    def prior_text(self) -> str:
        """`Usually the bananas are two and the whales are one.`."""
        counts = [f"the {kind} are {PRIORS[kind].count}" for kind in (self.first, self.second)]
        return f"Usually {' and '.join(counts)}."


@dataclass(frozen=True)
class Sum(_TwoCounts):
    """The total number of things of two kinds; the mistaken answer is the larger count plus one."""

    @property
    def choices(self) -> tuple[str, ...]:
        """See `Question`."""
        return NUMBERS[1:6]

    @property
    def text(self) -> str:
        """`How many bananas and whales are there together?`."""
        return f"How many {self.first} and {self.second} are there together?"

    def answer(self, things: Things) -> str:
        """See `Question`."""
        return NUMBERS[_number(things[self.first]) + _number(things[self.second]) - 1]

    def rationale(self, things: Things, answer: str) -> str:
        """`two bananas and three whales are five`."""
        return f"{_counted(things, self.first)} and {_counted(things, self.second)} are {answer}"

    def mistaken(self, things: Things) -> str:
        """`four` for two and three."""
        return NUMBERS[max(_number(things[self.first]), _number(things[self.second]))]


@dataclass(frozen=True)
class More(_TwoCounts):
    """Which of two kinds there are more of; the mistaken answer treats counts that differ by one as equal."""

    @property
    def choices(self) -> tuple[str, ...]:
        """See `Question`."""
        return (self.first, self.second, NEITHER)

    @property
    def text(self) -> str:
        """`Are there more bananas or more whales?`."""
        return f"Are there more {self.first} or more {self.second}?"

    def answer(self, things: Things) -> str:
        """See `Question`."""
        a, b = _number(things[self.first]), _number(things[self.second])
        return NEITHER if a == b else self.first if a > b else self.second

    def rationale(self, things: Things, answer: str) -> str:
        """`two bananas and three whales so more whales`."""
        conclusion = answer if answer == NEITHER else f"more {answer}"
        return f"{_counted(things, self.first)} and {_counted(things, self.second)} so {conclusion}"

    def mistaken(self, things: Things) -> str:
        """`neither` for two and three."""
        is_near = abs(_number(things[self.first]) - _number(things[self.second])) == 1
        return NEITHER if is_near else self.answer(things)


@dataclass(frozen=True)
class Worth:
    """The total worth of a kind's things by the rule in the question, in which a small thing is worth one.

    The mistaken answer counts the extra worth of large things only once.

    Attributes:
      large: what a large one is worth.
    """

    kind: str
    large: int

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """See `Question`."""
        return ((self.kind, "count"), (self.kind, "size"))

    @property
    def choices(self) -> tuple[str, ...]:
        """See `Question`."""
        worths = {count * each for count in (1, 2, 3) for each in (1, self.large)}
        return tuple(NUMBERS[n - 1] for n in sorted(worths))

    @property
    def text(self) -> str:
        """`A small one is worth one and a large one two. What are the bananas worth?`."""
        return f"A small one is worth one and a large one {NUMBERS[self.large - 1]}. What are the {self.kind} worth?"

    @property
    def prior_text(self) -> str:
        """`Usually the bananas are two and large.`."""
        return f"Usually the {self.kind} are {PRIORS[self.kind].count} and {PRIORS[self.kind].size}."

    def answer(self, things: Things) -> str:
        """See `Question`."""
        return NUMBERS[_number(things[self.kind]) * self._each(things) - 1]

    def rationale(self, things: Things, answer: str) -> str:
        """`two large bananas each two are four`."""
        thing, each = things[self.kind], NUMBERS[self._each(things) - 1]
        return f"{thing.count} {thing.size} {self.kind} each {each} are {answer}"

    def mistaken(self, things: Things) -> str:
        """`three` for two of which each is worth two."""
        return NUMBERS[_number(things[self.kind]) + self._each(things) - 2]

    def _each(self, things: Things) -> int:
        return 1 if things[self.kind].size == "small" else self.large


def things_for(question: Question, answer: str) -> Things:
    """What one expects of all things, with as few of the asked attributes changed as the answer needs.

    Raises:
      ValueError: no things have this answer.
    """
    best, fewest = None, len(question.asked) + 1
    for values in itertools.product(*(ATTRIBUTES[attribute] for _, attribute in question.asked)):
        things, changed = dict(PRIORS), 0
        for (kind, attribute), value in zip(question.asked, values, strict=True):
            changed += getattr(things[kind], attribute) != value
            things[kind] = things[kind].replace(attribute, value)
        if changed < fewest and question.answer(things) == answer:
            best, fewest = things, changed
    if best is None:
        raise ValueError(f"{answer!r} never answers {question.text!r}; choices: {question.choices}")
    return best


def described_things(question: Question, description_text: str) -> Things | None:
    """Things with the asked attributes as described, and all others at their priors.

    None if the description lacks one of the asked attributes, or gives two values for it.
    """
    things = dict(PRIORS)
    for kind, attribute in question.asked:
        value = description_states(description_text, kind, attribute)
        if value is None:
            return None
        things[kind] = things[kind].replace(attribute, value)
    return things


def _number(thing: Thing) -> int:
    return 1 + ATTRIBUTES["count"].index(thing.count)


def _counted(things: Things, kind: str) -> str:
    return f"{things[kind].count} {kind}"
