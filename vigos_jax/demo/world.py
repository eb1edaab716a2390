"""The demo's two worlds: images of everyday things that usually, but not always, look as one expects.

In the first world a question asks for something directly visible: one attribute of one kind of thing. In the second
the answer takes one or two more steps: a sum, a comparison, or a rule given in the question. Half of the questions
first state the prior as a fact. A model that trusts the text answers with the prior; a model that looks answers with
what is shown, if it also reasons well.

Everything is a pure function of (world, seed, setting, index): `item` makes one question with its image, and
`demo.source` makes rows of them.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vigos_jax.demo.questions import Look, More, Question, Sum, Things, Worth, described_things
from vigos_jax.demo.scenes import ATTRIBUTES, GRID, KINDS, PRIORS, Scene, Thing, render

FOLLOW_PRIOR = 0.9  # how often an attribute that is not forced follows its prior
SETTINGS = ("train", "conflict", "prior")
RULES = (2, 3)  # what a large thing is worth


@dataclass(frozen=True)
class World:
    """What is asked.

    Attributes:
      second_kind: share of images with two kinds of thing.
      draw_question: draws one from a generator and the kinds in an image, those asked about first.
      questions: all that there are.
      base: folder of the model that ships with it.
    """

    second_kind: float
    draw_question: Callable[[np.random.Generator, Sequence[str]], Question]
    questions: Callable[[], Iterable[Question]]
    base: pathlib.Path


def _look(rng: np.random.Generator, kinds: Sequence[str]) -> Question:
    return Look(kinds[0], list(ATTRIBUTES)[rng.integers(len(ATTRIBUTES))])


def _all_looks() -> Iterable[Question]:
    return (Look(kind, attribute) for attribute in ("color", "size", "count") for kind in KINDS)


def _reason(rng: np.random.Generator, kinds: Sequence[str]) -> Question:
    first, second = kinds
    match rng.integers(3):
        case 0:
            return Sum(first, second)
        case 1:
            return More(first, second)
        case _:
            return Worth(first, RULES[rng.integers(len(RULES))])


def _all_reasonings() -> Iterable[Question]:
    for first, second in itertools.permutations(KINDS, 2):
        yield from (Sum(first, second), More(first, second))
    for kind, rule in itertools.product(KINDS, RULES):
        yield Worth(kind, rule)


# By the names that `config.data.source` has for them, and `config.model.path` for the models made for them.
_BASES = pathlib.Path(__file__).parent
WORLDS = {
    "demo": World(0.25, _look, _all_looks, _BASES / "base"),
    "demo_reasoning": World(1.0, _reason, _all_reasonings, _BASES / "base_reasoning"),
}


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
      id: unique per (setting, seed, index) of a world.
      image: uint8 [84, 84, 3].
      asks: what is asked.
      states_prior: the question states what one expects as a fact first.
    """

    id: str
    image: np.ndarray = field(repr=False, compare=False)
    scene: Scene
    asks: Question
    states_prior: bool

    @property
    def question(self) -> str:
        """`Usually the bananas are yellow. What color are the bananas?`, the first part only if `states_prior`."""
        return f"{self.asks.prior_text} {self.asks.text}" if self.states_prior else self.asks.text

    @property
    def things(self) -> dict[str, Thing]:
        """What the image shows, by kind."""
        return {thing.kind: thing for thing in self.scene.things}

    @property
    def answer(self) -> str:
        """One word, the truth in the image."""
        return self.asks.answer(self.things)

    @property
    def prior_value(self) -> str:
        """The answer that one would expect."""
        return self.asks.answer(PRIORS)

    @property
    def is_conflict(self) -> bool:
        """Whether the scene contradicts what one expects."""
        return self.answer != self.prior_value

    @property
    def pil_image(self) -> Image.Image:
        """The image, as a source's row has it."""
        return Image.fromarray(self.image)


def make_item(
    rng: np.random.Generator,
    *,
    id: str,
    world: str = "demo",
    follow_prior: float = FOLLOW_PRIOR,
    conflict: bool | None = None,
) -> Item:
    """Draws one item.

    Args:
      world: one of WORLDS.
      follow_prior: probability of the prior value, independently per attribute; else uniform over the other values.
      conflict: None draws the asked attributes at random too; True makes the answer differ from the expected one;
        False sets all asked attributes to their priors.
    """
    kinds = [KINDS[k] for k in rng.permutation(len(KINDS))[: 1 + (rng.random() < WORLDS[world].second_kind)]]
    asks = WORLDS[world].draw_question(rng, kinds)
    forced = {None: (), False: asks.asked, True: (asks.asked[rng.integers(len(asks.asked))],)}[conflict]
    while True:
        things = {kind: _draw_thing(rng, kind, follow_prior, forced, is_prior=not conflict) for kind in sorted(kinds)}
        if not conflict or asks.answer(things) != asks.answer(PRIORS):
            break  # of two counts that differ from what one expects, the sum may be as expected
    pieces = [n for n, t in enumerate(things.values()) for _ in range(1 + ATTRIBUTES["count"].index(t.count))]
    cells = rng.permutation(pieces + [-1] * (GRID * GRID - len(pieces)))
    scene = Scene(tuple(things.values()), tuple(cells.tolist()))
    states_prior = bool(rng.random() < 0.5)
    return Item(id=id, image=render(rng, scene), scene=scene, asks=asks, states_prior=states_prior)


def _draw_thing(
    rng: np.random.Generator, kind: str, follow_prior: float, forced: Sequence[tuple[str, str]], *, is_prior: bool
) -> Thing:
    """A thing whose attributes follow their priors at random; those of `forced` do where `is_prior`, else do not."""
    thing = PRIORS[kind]
    for name, values in ATTRIBUTES.items():
        follows = bool(rng.random() < follow_prior)
        if (kind, name) in forced:
            follows = is_prior
        if not follows:
            others = [value for value in values if value != getattr(PRIORS[kind], name)]
            thing = thing.replace(name, others[rng.integers(len(others))])
    return thing


def item(seed: int, index: int, *, setting: str, world: str = "demo") -> Item:
    """The item at `index` of a setting: "train" (what is asked is left to chance), "conflict" or "prior"."""
    if setting not in SETTINGS:
        raise ValueError(f"unknown demo setting {setting!r}; choices: {', '.join(SETTINGS)}")
    if world not in WORLDS:
        raise ValueError(f"unknown demo world {world!r}; choices: {', '.join(WORLDS)}")
    rng = np.random.default_rng([seed, SETTINGS.index(setting), index])
    conflict = {"train": None, "conflict": True, "prior": False}[setting]
    return make_item(rng, id=f"{setting}-{seed}-{index}", world=world, conflict=conflict)


def description_states_prior(description_text: str, asked: Item) -> bool:
    """Whether a description has all that is asked as one expects it; on conflict items that is a leak."""
    return _states(description_text, asked, PRIORS)


def description_states_truth(description_text: str, asked: Item) -> bool:
    """Whether a description gives every asked attribute as shown; what is left is reasoning."""
    return _states(description_text, asked, asked.things)


def _states(description_text: str, asked: Item, things: Things) -> bool:
    said = described_things(asked.asks, description_text)
    return said is not None and all(getattr(said[k], a) == getattr(things[k], a) for k, a in asked.asks.asked)
